"""The image, built and run for real by an ordinary user: what is in it, what stays out, that it is the same twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from definition_file import read_definition
from directory_of_user import directory_of_user
from spython.main import get_client

from nanogpt.image.build import SUITES
from nanogpt.image.labels import read_built
from nanogpt.image.sources import locked_versions

Run = Callable[..., "subprocess.CompletedProcess[str]"]
pytestmark = pytest.mark.timeout(2400)  # the first test waits for the image
COMMANDS = ("nanogpt", "prep-fineweb", "prep-text", "build-flash-attn", "torchrun", "python", "gcc", "g++")


@pytest.fixture
def scratch(as_user: Run) -> Iterator[Path]:
    """A directory of the user's own, outside home."""
    with directory_of_user(as_user) as made:
        yield made


class Demo(NamedTuple):
    """A short demo, run once in the image for all tests that look at it."""

    home: Path  # was empty before
    runs: Path  # data and run
    output: str


@pytest.fixture(scope="module")
def demo(sif: Path, as_user: Run) -> Iterator[Demo]:
    """A quarter of the demo's steps, with a home of its own. CI runs all of them outside of the image."""
    with directory_of_user(as_user) as place:
        as_user(["mkdir", place / "home", place / "work"], check=True)
        options = ["--home", place / "home", "--bind", place / "work", "--pwd", place / "work"]
        done = as_user(
            ["apptainer", "run", *options, sif, "demo", "--steps", "30", "--dir", "runs"], check=True, timeout=1800
        )
        yield Demo(place / "home", place / "work" / "runs", done.stdout)


def inside(as_user: Run, sif: Path, *command: str, options: tuple[str, ...] = (), **keywords: object) -> str:
    """Standard output of a command in the image, which must succeed."""
    return as_user(["apptainer", "exec", *options, sif, *command], check=True, **keywords).stdout


@pytest.fixture(scope="module")
def labels(sif: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The labels of the image's file, as spython reads them."""
    link = tmp_path_factory.mktemp("bin") / "singularity"  # spython's word for it; most packages of Apptainer have it
    link.symlink_to(shutil.which("apptainer") or "apptainer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{link.parent}:{os.environ['PATH']}")
        return get_client(quiet=True).inspect(str(sif))["attributes"]["labels"]


def test_commands_are_on_the_path_and_run_is_nanogpt(sif: Path, as_user: Run) -> None:
    found = inside(as_user, sif, "sh", "-c", f"for name in {' '.join(COMMANDS)}; do command -v $name; done")
    assert [Path(line).name for line in found.split()] == list(COMMANDS)
    assert "Train GPT-2-sized models fast" in as_user(["apptainer", "run", sif, "--help"], check=True).stdout
    text = as_user(["apptainer", "run-help", sif], check=True).stdout
    variables = (f"NANOGPT_{name}" for name in ("SRC", "CACHE", "FLASH_ATTN", "EXTRA"))
    for word in ("prep-fineweb", "torchrun", "--nv", *variables):
        assert word in text


def test_its_own_test_passes(sif: Path, as_user: Run) -> None:
    done = as_user(["apptainer", "test", sif], check=True)
    assert "training: two steps" in done.stdout
    assert "failed" not in done.stdout


def test_labels_and_version_name_commit_lock_and_hash(
    sif: Path, as_user: Run, user_checkout: Path, labels: dict[str, str]
) -> None:
    commit = labels["org.opencontainers.image.revision"]
    assert len(commit) == 40
    flavour = labels["nanogpt.flavour"]
    lock = (user_checkout / "containers" / f"{flavour}.lock").read_bytes()
    assert labels["nanogpt.lock.sha256"] == hashlib.sha256(lock).hexdigest()
    assert labels["org.opencontainers.image.licenses"] == "MIT"
    assert labels["org.opencontainers.image.authors"] == "The nanogpt-speedrun authors"
    assert labels["org.opencontainers.image.base.name"].startswith("base-")
    assert labels["org.opencontainers.image.source"].startswith(("https://", "unknown"))
    assert labels["org.label-schema.build-date"] == labels["org.opencontainers.image.created"]

    found = json.loads(as_user(["apptainer", "run", sif, "version", "--json"], check=True).stdout)
    assert found["commit"] == commit + ("+changes" if labels["nanogpt.clean"] == "false" else "")
    assert found["torch"] == locked_versions(lock.decode())["torch"]
    assert found["lock_sha256"] == labels["nanogpt.lock.sha256"]
    built = read_built(sif)
    assert built
    assert found["sif_sha256"] == built.sha256 == hashlib.sha256(sif.read_bytes()).hexdigest()
    with directory_of_user(as_user) as elsewhere:
        copy = elsewhere / "copy.sif"  # without the file of facts beside it
        as_user(["cp", sif, copy], check=True)
        told = as_user(["apptainer", "run", "--bind", elsewhere, copy, "version", "--json"], check=True).stdout
    assert json.loads(told)["sif_sha256"] == built.sha256


def test_the_list_of_contents_is_what_the_lock_says(
    sif: Path, as_user: Run, user_checkout: Path, labels: dict[str, str]
) -> None:
    bill = json.loads(inside(as_user, sif, "cat", "/opt/nanogpt/sbom.cdx.json"))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    python = {entry["name"]: entry["version"] for entry in bill["components"] if entry["purl"].startswith("pkg:pypi/")}
    locked = locked_versions((user_checkout / "containers" / f"{labels['nanogpt.flavour']}.lock").read_text())
    not_kept = (user_checkout / "containers" / "not-kept.txt").read_text().split()
    assert {name: version for name, version in python.items() if name in locked} == {
        name: version for name, version in locked.items() if name not in not_kept
    }
    assert any(entry["purl"].startswith("pkg:deb/debian/libc6@") for entry in bill["components"])


def test_nothing_of_the_build_stays_inside(sif: Path, as_user: Run) -> None:
    places = "/mnt /opt/build /var/cache/apt/archives/*.deb /etc/apt/sources.list /etc/apt/sources.list.d"
    left = inside(as_user, sif, "sh", "-c", f"ls -A {places} 2>/dev/null; true")
    assert [line for line in left.split() if line not in ("/mnt:", "/etc/apt/sources.list.d:")] == []
    settings = inside(as_user, sif, "sh", "-c", "cat /.singularity.d/env/* /.singularity.d/labels.json")
    assert "/mnt/" not in settings
    assert "proxy" not in settings.lower()
    written = as_user(["apptainer", "exec", sif, "touch", "/opt/venv/here"])
    assert written.returncode != 0


def test_what_an_import_of_torch_reads_is_asked_for_by_one_process(sif: Path, as_user: Run) -> None:
    lists = "import fcntl, os, sys; pieces = open('/opt/nanogpt/read-ahead.txt'); lines = pieces.readlines()"
    whole = "assert all(int(a) + int(b) <= os.path.getsize(c) for a, b, c in (line.split() for line in lines))"
    libraries = inside(as_user, sif, "python", "-c", f"{lists}\n{whole}\nprint(*lines)")
    assert "/torch/lib/libtorch_cpu.so" in libraries
    assert "/torch/nn/__pycache__/functional." in libraries
    second = "sys.meta_path[0].find_spec('torch'); fcntl.flock(pieces, fcntl.LOCK_EX | fcntl.LOCK_NB)"
    refused = as_user(["apptainer", "exec", sif, "python", "-c", f"{lists}; {second}"])
    assert "BlockingIOError" in refused.stderr  # a reader is at work


def test_home_and_the_hosts_python_do_not_leak_in(sif: Path, as_user: Run, scratch: Path) -> None:
    version = inside(as_user, sif, "python", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    user_site = scratch / "home" / ".local" / "lib" / f"python{version}" / "site-packages"
    module = "raise SystemExit('the host leaked in')"
    as_user(["mkdir", "-p", user_site, scratch / "path"], check=True)
    for place in (user_site / "typing_extensions.py", user_site / "sitecustomize.py", scratch / "path" / "torch.py"):
        as_user(["sh", "-c", f'echo "{module}" > {place}'], check=True)
    paths = inside(
        as_user,
        sif,
        "python",
        "-c",
        "import sys, typing_extensions; print(sys.path)",
        options=("--home", str(scratch / "home"), "--bind", str(scratch)),
        environment={"PYTHONPATH": str(scratch / "path"), "PYTHONHOME": "/nowhere", "PYTHONSTARTUP": "/nowhere"},
    )
    assert str(scratch) not in paths


def test_a_run_needs_no_home_and_leaves_nothing_there(
    sif: Path, as_user: Run, demo: Demo, labels: dict[str, str]
) -> None:
    assert list(demo.home.iterdir()) == []
    records = list(demo.runs.glob("*/record.json"))
    assert len(records) == 1
    record = json.loads(records[0].read_text())
    assert record["state"] == "finished"
    assert record["code"]["commit"] == labels["org.opencontainers.image.revision"]
    assert record["code"]["clean"] == {"true": True, "false": False}[labels["nanogpt.clean"]]
    assert record["container"]["base"].startswith("localimage base-")
    assert record["container"]["labels"]["nanogpt.lock.sha256"] == labels["nanogpt.lock.sha256"]

    nothing = ["apptainer", "exec", "--no-home", "--contain", sif, "nanogpt", "version"]
    assert "torch" in as_user(nothing, cwd=Path("/"), check=True).stdout


def test_the_code_of_a_checkout_runs_instead(sif: Path, as_user: Run, user_checkout: Path, scratch: Path) -> None:
    as_user(["cp", "-r", user_checkout / "nanogpt", user_checkout / "recipes", scratch], check=True)
    as_user(["sed", "-i", 's/__version__ = .*/__version__ = "9.9.9"/', scratch / "nanogpt" / "__init__.py"], check=True)
    command = ["apptainer", "run", "--bind", scratch, sif, "version"]
    found = as_user(command, environment={"NANOGPT_SRC": str(scratch)}, check=True)
    assert "nanogpt-speedrun  9.9.9" in found.stdout
    assert str(scratch) in found.stderr  # says which code runs
    wrong = as_user(["apptainer", "run", sif, "version"], environment={"NANOGPT_SRC": "/no/such/checkout"})
    assert wrong.returncode == 2
    assert "NANOGPT_SRC" in wrong.stderr
    assert "/no/such/checkout" in wrong.stderr


def test_the_demo_learns_inside(demo: Demo) -> None:
    assert "What it writes after" in demo.output
    (record,) = demo.runs.glob("*/record.json")
    assert json.loads(record.read_text())["val_loss"] < 7.5  # 10.8 untrained


def test_a_report_is_written_inside(sif: Path, as_user: Run, scratch: Path, demo: Demo) -> None:
    (run,) = (path.parent for path in demo.runs.glob("*/record.json"))
    options = ("--bind", str(scratch), "--bind", str(demo.runs))
    inside(as_user, sif, "nanogpt", "report", str(run), "--out", str(scratch / "report.html"), options=options)
    assert 'id="figures"' in (scratch / "report.html").read_text()


def test_trackers(sif: Path, as_user: Run, scratch: Path, demo: Demo) -> None:
    """TensorBoard's writer is inside; another tracker's package comes from a directory, here a stub."""
    options = ("--bind", str(scratch), "--bind", str(demo.runs), "--pwd", str(scratch))
    train = ["nanogpt", "train", "demo", "--steps", "4", "--data", demo.runs / "data", "--set"]
    train += ["evaluation={tokens: 2048, micro_batch_tokens: 512, every: 60, target_loss: null}", "--set"]
    inside(as_user, sif, *map(str, train), "output.tracker=tensorboard", "--out", "tracked", options=options)
    (events,) = (scratch / "tracked").glob("*/tensorboard/events.out.tfevents.*")
    assert b"val_loss" in events.read_bytes()

    tracked = ["apptainer", "exec", *options, sif, *train, "output.tracker=wandb", "--out", "more"]
    refused = as_user(tracked)
    assert refused.returncode == 2
    assert "--only-binary :all: wandb`; NANOGPT_EXTRA=DIR" in refused.stderr
    stub = "import pathlib\n\n\nclass Settings(dict): pass\n\n\ndef init(**options): return Run(options['mode'])\n\n\n"
    stub += "class Run:\n    def __init__(self, mode): self.lines = [mode]\n"
    stub += "    def log(self, values, step): self.lines.append(f'{step} {sorted(values)}')\n"
    stub += "    def finish(self): pathlib.Path('tracked.txt').write_text('\\n'.join(self.lines))\n"
    as_user(["mkdir", "-p", scratch / "extra"], check=True)
    as_user(["sh", "-c", f'printf "%s" "$0" > {scratch}/extra/wandb.py', stub], check=True)
    as_user(tracked, environment={"NANOGPT_EXTRA": str(scratch / "extra")}, check=True)
    told = (scratch / "tracked.txt").read_text()
    assert told.startswith("offline\n") and "val_loss" in told
    as_user(["chmod", "g+w", scratch / "extra"], check=True)
    assert "NANOGPT_EXTRA=" in as_user(tracked, environment={"NANOGPT_EXTRA": str(scratch / "extra")}).stderr


def test_torchrun_trains_on_two_processes_inside(sif: Path, as_user: Run, scratch: Path, demo: Demo) -> None:
    options = ("--bind", str(scratch), "--bind", str(demo.runs), "--pwd", str(scratch), "--env", f"TMPDIR={scratch}")
    train = ["-m", "nanogpt", "train", "demo", "--steps", "4", "--set", "hardware.gpus_per_node=2"]
    train += ["--set", "evaluation={tokens: 2048, micro_batch_tokens: 512, every: 60, target_loss: null}"]
    place = ["--data", str(demo.runs / "data"), "--out", "two"]
    inside(as_user, sif, "torchrun", "--nproc-per-node", "2", *train, *place, options=options, timeout=900)
    record = json.loads(next((scratch / "two").glob("*/record.json")).read_text())
    assert (record["state"], record["hardware"]["world_size"]) == ("finished", 2)


def test_two_builds_have_the_same_files(
    sif: Path, as_user: Run, as_other: Run, user_checkout: Path, scratch: Path
) -> None:
    """The second by another user: without subordinate ids, by the fakeroot command, and with another umask."""
    first = read_built(sif)
    assert first
    command = ["make", "sif", f"FLAVOUR={first.flavour}", "BASE=tree"]
    head = as_user(["git", "rev-parse", "HEAD"], cwd=user_checkout, check=True).stdout.strip()
    if first.commit != head:  # an image of an earlier commit with the same sources, whose times are that commit's
        sif = scratch / "first.sif"
        as_user([*command, f"OUT={sif}"], cwd=user_checkout, timeout=2000, check=True)
        first = read_built(sif)
        assert first
    with directory_of_user(as_other) as place:
        copy, built_there = place / "checkout", user_checkout / "build" / "sif"
        tree = next(built_there.glob(f"base-{SUITES[first.flavour]}"))
        subprocess.run(["cp", "-a", user_checkout, copy], check=True)
        shutil.rmtree(copy / "build")
        (copy / "build" / "sif").mkdir(parents=True)
        subprocess.run(["cp", "-a", tree, copy / "build" / "sif"], check=True)
        subprocess.run(["chown", "-hR", "--reference", place, copy], check=True)
        base = copy / "build" / "sif" / tree.name
        other = ["sh", "-c", 'umask 077; exec "$@"', "sh", "make", "sif", f"FLAVOUR={first.flavour}", f"BASE={base}"]
        refused = as_other(["make", "sif", f"FLAVOUR={first.flavour}", "BASE=tree", "OUT=no.sif"], cwd=copy)
        assert refused.returncode != 0
        assert "BASE=DIRECTORY|IMAGE" in [line for line in refused.stderr.splitlines() if ": *** [" not in line][-1]
        done = as_other([*other, f"OUT={place / 'again.sif'}"], cwd=copy, timeout=2000, check=True)
        assert "uses the fakeroot command" in done.stderr
        assert (place / "again.sif").stat().st_mode & 0o777 == 0o700
        again = scratch / "again.sif"
        for name in ("again.sif", "again.sif.json"):
            subprocess.run(["cp", "--preserve=timestamps", place / name, scratch], check=True)
            subprocess.run(["chown", "--reference", scratch, scratch / name], check=True)
    compared = as_user(["make", "-s", "sif-diff", f"A={sif}", f"B={again}"], cwd=user_checkout)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    second = read_built(again)
    assert second
    assert second.content_sha256 == first.content_sha256
    quick = as_user([*command, f"OUT={sif}"], cwd=user_checkout, timeout=60, check=True)
    assert "nothing that goes into it has changed" in quick.stderr


def test_signing_and_verifying(sif: Path, as_user: Run, user_checkout: Path, scratch: Path) -> None:
    copy = scratch / "signed.sif"
    as_user(["cp", sif, copy], check=True)
    keys = {"APPTAINER_KEYSDIR": str(scratch / "keys")}
    unsigned = as_user(["make", "verify", f"SIF={copy}"], cwd=user_checkout, environment=keys)
    assert unsigned.returncode != 0
    new_key = ["--name", "Test", "--email", "test@example.org", "--comment", "none", "--password", "", "--push=false"]
    as_user(["apptainer", "key", "newpair", *new_key], environment=keys, check=True)
    as_user(["make", "sign", f"SIF={copy}"], cwd=user_checkout, environment=keys, check=True)
    as_user(["make", "verify", f"SIF={copy}"], cwd=user_checkout, environment=keys, check=True)
    with copy.open("r+b") as stream:
        stream.seek(copy.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
    assert as_user(["make", "verify", f"SIF={copy}"], cwd=user_checkout, environment=keys).returncode != 0


def test_the_definition_inside_is_the_one_of_the_checkout(
    sif: Path, as_user: Run, user_checkout: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "definition"
    copy.write_text(inside(as_user, sif, "cat", "/.singularity.d/Singularity"))
    ours = read_definition(user_checkout / "containers" / "nanogpt.def", tmp_path)
    inside_it = read_definition(copy, tmp_path)
    assert inside_it.environment == ours.environment
    assert inside_it.files == ours.files
