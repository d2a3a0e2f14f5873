"""The image on its way: signed, pushed to a real registry, pulled by another user, interrupted, tampered with."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from directory_of_user import directory_of_user

Run = Callable[..., "subprocess.CompletedProcess[str]"]
pytestmark = pytest.mark.timeout(2400)  # the first test waits for the image
INTERRUPTED = """
set -m
file=$1
shift
"$@" &
while kill -0 $! && (($(stat -c %s "$file" || echo 0) < 10000000)); do sleep 0.05; done 2> /dev/null
kill -TERM -- -$!
wait $!
"""  # once the file has 10 MB


class Store(NamedTuple):
    """A registry on this machine, and what its image is signed with."""

    address: str  # oras://127.0.0.1:PORT
    files: Path
    place: Path  # everybody can read it; the image's owner writes here
    key: Path  # private
    public: Path


@pytest.fixture(scope="module")
def store(as_user: Run) -> Iterator[Store]:
    """Debian's docker-registry on a free port of the loopback address."""
    place = Path(as_user(["mktemp", "-d", "/var/tmp/registry-test-XXXXXX"], check=True).stdout.strip())
    as_user(["chmod", "755", place], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(place / "files")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    (place / "registry.yml").write_text(yaml.safe_dump(settings))
    with (place / "log").open("w") as log:
        registry = subprocess.Popen(["docker-registry", "serve", place / "registry.yml"], stdout=log, stderr=log)
    try:
        while registry.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        key, public = place / "key.pem", place / "public.pem"
        as_user(["openssl", "genrsa", "-out", key, "2048"], check=True)
        as_user(["openssl", "rsa", "-in", key, "-pubout", "-out", public], check=True)
        as_user(["chmod", "644", public], check=True)
        yield Store(f"oras://127.0.0.1:{port}", place / "files", place, key, public)
    finally:
        registry.terminate()
        registry.wait()
        shutil.rmtree(place)


@pytest.fixture(scope="module")
def pushed(store: Store, sif: Path, as_user: Run, user_checkout: Path) -> str:
    """The image's sha256, once it is signed and in the registry as test/nanogpt:1."""
    copy, to = store.place / "n.sif", f"TO={store.address}/test/nanogpt:1"
    as_user(["cp", sif, copy], check=True)
    refused = as_user(["make", "push", f"SIF={copy}", f"KEY={store.public}", to], cwd=user_checkout)
    assert refused.returncode != 0
    assert "make sign" in refused.stderr
    as_user(["make", "sign", f"SIF={copy}", f"KEY={store.key}"], cwd=user_checkout, check=True)
    as_user(["make", "verify", f"SIF={copy}", f"KEY={store.public}"], cwd=user_checkout, check=True)
    as_user(["make", "push", f"SIF={copy}", f"KEY={store.public}", to], cwd=user_checkout, check=True)
    return hashlib.sha256(copy.read_bytes()).hexdigest()


@pytest.fixture
def elsewhere(as_other: Run) -> Iterator[Path]:
    """A directory of the other user's."""
    with directory_of_user(as_other) as made:
        yield made


@pytest.fixture
def pull(store: Store, user_checkout: Path, as_other: Run, elsewhere: Path) -> Run:
    """`make pull` by the other user, on a machine with little: `pull("test/nanogpt:1", "KEY=...")`."""
    programs = elsewhere / "programs"
    programs.mkdir()
    programs.chmod(0o755)
    for program in Path("/usr/bin").iterdir():
        if not program.name.startswith(("python", "mksquashfs")):
            (programs / program.name).symlink_to(program)

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "pull", f"FROM={store.address}/{name}", f"OUT={elsewhere / 'n.sif'}", *arguments]
        return as_other(command, cwd=user_checkout, environment={"PATH": str(programs)})

    return run


def test_another_user_pulls_what_one_has_pushed(
    store: Store, pushed: str, pull: Run, as_other: Run, elsewhere: Path
) -> None:
    done = pull("test/nanogpt:1", f"KEY={store.public}", f"SHA256={pushed}")
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256((elsewhere / "n.sif").read_bytes()).hexdigest() == pushed
    ran = as_other(["apptainer", "run", "--bind", elsewhere, elsewhere / "n.sif", "version", "--json"], check=True)
    assert f'"sif_sha256": "{pushed}"' in ran.stdout
    again = pull("test/nanogpt:1", f"KEY={store.public}")
    assert "already" in again.stderr
    assert [path.name for path in elsewhere.glob("n.sif*")] == ["n.sif"]


def test_an_interrupted_pull_goes_on(
    store: Store, pushed: str, pull: Run, as_other: Run, user_checkout: Path, elsewhere: Path
) -> None:
    (elsewhere / ".curlrc").write_text("limit-rate = 20M\n")  # so that it can be interrupted
    part = elsewhere / f"n.sif.part-{pushed[:16]}"
    command = ["make", "pull", f"FROM={store.address}/test/nanogpt:1", f"OUT={elsewhere / 'n.sif'}", "UNSIGNED=yes"]
    ended = as_other(
        ["bash", "-c", INTERRUPTED, "bash", part, *command], cwd=user_checkout, environment={"HOME": str(elsewhere)}
    )
    assert ended.returncode != 0
    before = part.stat().st_size
    assert before >= 10_000_000
    assert not (elsewhere / "n.sif").exists()
    (elsewhere / ".curlrc").unlink()
    done = pull("test/nanogpt:1", f"KEY={store.public}")
    assert done.returncode == 0, done.stderr
    assert part_size(done.stderr) >= before // 1_000_000
    assert hashlib.sha256((elsewhere / "n.sif").read_bytes()).hexdigest() == pushed


def part_size(said: str) -> int:
    """From how many MB on a pull says that it continues."""
    return int(said.partition(", at ")[2].partition(" MB")[0])


def test_what_the_registry_has_changed_is_refused(store: Store, pushed: str, pull: Run, elsewhere: Path) -> None:
    blob = store.files / "docker/registry/v2/blobs/sha256" / pushed[:2] / pushed / "data"
    with blob.open("r+b") as stream:
        stream.seek(blob.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
        stream.flush()
        try:
            done = pull("test/nanogpt:1", f"KEY={store.public}")
        finally:
            stream.seek(-1, os.SEEK_CUR)
            stream.write(byte)
    assert "damaged or changed" in done.stderr
    assert list(elsewhere.glob("n.sif*")) == []


def test_an_image_that_somebody_else_has_put_there_is_refused(
    store: Store, sif: Path, pull: Run, as_user: Run, user_checkout: Path, elsewhere: Path
) -> None:
    """Without a signature, and with one of another key; it is taken where that is said."""
    empty = store.place / "root"
    as_user(["mkdir", "-p", empty / "bin"], check=True)
    small = store.place / "small.sif"
    as_user(["apptainer", "build", "--force", small, empty], check=True)
    to = f"TO={store.address}/test/nanogpt:other"
    as_user(["make", "push", f"SIF={small}", to, "UNSIGNED=yes"], cwd=user_checkout, check=True)
    for key in (f"KEY={store.public}", "KEY="):
        unsigned = pull("test/nanogpt:other", key)
        assert unsigned.returncode != 0
        assert "signature" in unsigned.stderr
        assert not (elsewhere / "n.sif").exists()
    assert pull("test/nanogpt:other", "UNSIGNED=yes").returncode == 0
    (elsewhere / "n.sif").unlink()
    as_user(["openssl", "genrsa", "-out", store.place / "other.pem", "2048"], check=True)
    as_user(["make", "sign", f"SIF={small}", f"KEY={store.place / 'other.pem'}"], cwd=user_checkout, check=True)
    as_user(["make", "push", f"SIF={small}", to, "UNSIGNED=yes"], cwd=user_checkout, check=True)
    assert pull("test/nanogpt:other", f"KEY={store.public}").returncode != 0
    assert not (elsewhere / "n.sif").exists()


def test_run_sh_refuses_an_image_that_is_not_the_pinned_one(
    store: Store, sif: Path, pushed: str, as_user: Run, user_checkout: Path
) -> None:
    command = [user_checkout / "slurm" / "run.sh", "--dry-run", "demo"]
    signed = {"NANOGPT_SIF": str(store.place / "n.sif"), "NANOGPT_SIF_KEY": str(store.public)}
    for environment, said in (
        (signed | {"NANOGPT_SIF_SHA256": "0" * 64}, f"its sha256 is {pushed}"),
        (signed | {"NANOGPT_SIF": str(sif)}, "no signature of NANOGPT_SIF_KEY"),
    ):
        refused = as_user(command, cwd=store.place, environment=environment)
        assert (refused.returncode, said in refused.stderr) == (2, True), refused.stderr
    pinned = signed | {"NANOGPT_SIF_SHA256": pushed}
    done = as_user([user_checkout / "slurm" / "nanogpt.sh", "version"], cwd=store.place, environment=pinned)
    assert (done.returncode, "nanogpt-speedrun" in done.stdout) == (0, True), done.stderr


LMOD = ". /usr/share/lmod/lmod/init/bash && module use {modules} && module load {name} && "


def test_the_module_file_brings_the_commands(sif: Path, as_user: Run, user_checkout: Path, store: Store) -> None:
    modules = store.place / "modules"
    as_user(["mkdir", "-p", modules / "nanogpt"], check=True)
    as_user(["cp", user_checkout / "containers" / "modulefile.lua", modules / "nanogpt" / "1.lua"], check=True)
    load = LMOD.format(modules=modules, name="nanogpt/1")
    missing = as_user(["bash", "-c", load + "true"])
    assert "1.sif" in missing.stderr
    as_user(["ln", "-s", sif, modules / "nanogpt" / "1.sif"], check=True)
    script = load + 'nanogpt version && echo "$NANOGPT_SIF" && module unload nanogpt && ! type nanogpt'
    done = as_user(["bash", "-c", script], check=True)
    assert done.stdout.startswith("nanogpt-speedrun")
    assert str(modules / "nanogpt" / "1.sif") in done.stdout


def test_shpc_makes_a_module_of_the_image(sif: Path, as_user: Run, user_checkout: Path, store: Store) -> None:
    place = store.place / "shpc"
    entry, programs = place / "registry" / "nanogpt" / "speedrun", place / "programs"
    as_user(["mkdir", "-p", entry, programs], check=True)
    as_user(["cp", user_checkout / "containers" / "container.yaml", entry], check=True)
    as_user(["ln", "-s", sif, entry / "nanogpt.sif"], check=True)
    (programs / "singularity").symlink_to(shutil.which("apptainer") or "apptainer")
    settings = {"registry": place / "registry", "module_base": place / "modules", "container_base": place / "images"}
    settings["wrapper_base"] = place / "wrappers"
    first, *others = (f"{name}:{value}" for name, value in settings.items())
    for arguments in (
        ["config", "inituser"],
        ["config", "add", first],
        *(["config", "set", other] for other in others),
        ["install", "nanogpt/speedrun"],
    ):
        environment = os.environ | {"HOME": str(place), "PATH": f"{programs}:{os.environ['PATH']}"}
        shpc = [Path(sys.executable).with_name("shpc"), *arguments]
        done = subprocess.run(shpc, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    load = LMOD.format(modules=place / "modules", name="nanogpt/speedrun/current")
    environment = {"PATH": f"{programs}:/usr/bin:/bin"}
    done = as_user(["bash", "-c", load + "nanogpt version"], environment=environment, check=True)
    assert done.stdout.startswith("nanogpt-speedrun")
