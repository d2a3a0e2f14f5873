"""`make sif` without Apptainer: what it looks at first, what it stages, what it says when a build fails."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from nanogpt.errors import InputError, RunError
from nanogpt.image import build as image_build
from nanogpt.image import build_checks, sources
from nanogpt.image.build import Options, Stages, build, explain
from nanogpt.image.labels import Built, read_built, sidecar
from nanogpt.image.sources import (
    build_arguments,
    find_source,
    host_part,
    locked_versions,
    pip_setting,
    pip_settings,
    public_url,
    stage,
    wheel_directory,
)

ROOT = Path(__file__).parents[2]


def script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def only_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is all of PATH, but for the shell and the core tools."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    return directory


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout with little in each place that an image is made of."""
    root = tmp_path / "checkout"
    for name in (
        "containers/nanogpt.def",
        "containers/cpu.lock",
        "nanogpt/a.py",
        "recipes/r.yaml",
        "README.md",
        "LICENSE",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{name}\n")
    (root / "containers/cpu.lock").write_text(
        "torch==2.13.0+cpu \\\n    --hash=sha256:0\nnumpy==2.4.6 \\\n    --hash=sha256:1\n"
    )
    (root / "pyproject.toml").write_text('[project]\nlicense = "MIT"\nauthors = [{ name = "A" }, { name = "B" }]\n')
    (root / ".gitignore").write_text("*.pyc\n")
    for arguments in (
        ("init", "-q"),
        ("add", "-A"),
        ("-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "first"),
    ):
        subprocess.run(["git", "-C", root, *arguments], check=True)
    return root


# --- checks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("says", "status", "word"),
    [
        (None, "failed", "module load"),
        ("apptainer version 1.1.9", "failed", "1.2 or newer"),
        ("apptainer version 1.2.0-1.el9", "passed", "1.2.0"),
        ("apptainer version 1.10.3", "passed", "1.10.3"),
        ("segfault", "failed", "segfault"),
    ],
)
def test_apptainer_is_there_and_new_enough(only_path: Path, says: str | None, status: str, word: str) -> None:
    if says:
        script(only_path / "apptainer", f"echo '{says}'")
    check = build_checks.check_apptainer()
    assert check.status == status
    assert word in check.line()


@pytest.mark.parametrize(
    ("says", "status"), [("mksquashfs version 4.3 (2014)", "failed"), ("mksquashfs version 4.6.1", "passed")]
)
def test_squashfs_tools_are_new_enough(only_path: Path, says: str, status: str) -> None:
    script(only_path / "mksquashfs", f"echo '{says}'")
    assert build_checks.check_squashfs_tools().status == status


def mksquashfs_without(directory: Path, *compressors: str) -> None:
    """A mksquashfs that was built without these compressors, and says so as the real one does."""
    script(
        directory / "mksquashfs",
        '[ "$1" = -version ] && { echo mksquashfs version 4.6.1; exit; }\n'
        '[ -z "$(ls "$1")" ] || exit 3\n'  # tried on an empty directory
        f'case " $* " in {"|".join(f"*-comp?{name}?*" for name in compressors)})'
        ' echo "$0: Compressor is not supported!" >&2; exit 1;; esac',
    )
    (directory / "ls").symlink_to("/bin/ls")


def test_without_zstd_gzip_is_taken_and_its_price_told(only_path: Path) -> None:
    mksquashfs_without(only_path, "zstd")
    check = build_checks.check_squashfs_tools()
    assert check.status == "warning"
    assert "%" in check.line() and "gzip" in check.line()
    assert build_checks.choose_compression(None).startswith("-comp gzip")
    asked = build_checks.check_squashfs_tools("zstd")
    assert asked.status == "failed"
    assert "COMPRESSION=gzip" in asked.line() and "not supported" in asked.line()
    assert build_checks.check_squashfs_tools("-comp lz4 -Xhc").status == "passed"


def test_a_mksquashfs_that_packs_nothing_is_refused(only_path: Path) -> None:
    mksquashfs_without(only_path, "zstd", "gzip")
    assert build_checks.check_squashfs_tools().status == "failed"


@pytest.mark.skipif(build_checks.find_mksquashfs() is None, reason="needs squashfs-tools")
@pytest.mark.parametrize("name", build_checks.COMPRESSIONS)
def test_the_real_mksquashfs_takes_our_arguments(name: str) -> None:
    assert build_checks.refusal(build_checks.find_mksquashfs() or "", build_checks.choose_compression(name)) is None
    assert build_checks.refusal(build_checks.find_mksquashfs() or "", "-comp none-such") is not None


def test_privileges(tmp_path: Path, only_path: Path) -> None:
    proc, etc = tmp_path / "proc", tmp_path / "etc"
    (proc / "sys/user").mkdir(parents=True)
    (proc / "self").mkdir()
    etc.mkdir()
    (proc / "sys/user/max_user_namespaces").write_text("0\n")
    assert "switched off" in build_checks.check_privileges(proc, etc, "me").found
    (proc / "sys/user/max_user_namespaces").write_text("100\n")
    missing = build_checks.check_privileges(proc, etc, "me")
    assert (missing.status, "usermod" in missing.line()) == ("failed", False)
    script(only_path / "fakeroot", "true")
    assert build_checks.check_privileges(proc, etc, "me").status == "warning"
    for name in ("subuid", "subgid"):
        (etc / name).write_text("you:1:2\nme:100000:65536\n")
    script(only_path / "newuidmap", "true")
    assert build_checks.check_privileges(proc, etc, "me").status == "passed"
    (proc / "self/status").write_text("Name:\tx\nCapEff:\t000001fffeffffff\n")
    assert "ordinary user" in build_checks.check_privileges(proc, etc, "root").advice
    (proc / "self/status").write_text("Name:\tx\nCapEff:\t000001ffffffffff\n")
    assert build_checks.check_privileges(proc, etc, "root").status == "passed"


def test_space(tmp_path: Path) -> None:
    there = build_checks.check_space("x", tmp_path / "not" / "yet", 1000, "elsewhere")
    assert there.status == "passed"
    full = build_checks.check_space("x", tmp_path, 10**18, "export APPTAINER_TMPDIR=/scratch")
    assert full.status == "failed"
    assert "1000000.0 TB" in full.line()
    assert "export APPTAINER_TMPDIR" in full.line()


def test_certificates(tmp_path: Path) -> None:
    assert build_checks.check_certificates(build_checks.certificate_authority({})).status == "passed"
    path = tmp_path / "ca.crt"
    found = build_checks.certificate_authority({"SSL_CERT_FILE": str(path)}, None)
    assert build_checks.check_certificates(found).status == "failed"
    path.write_text("-----BEGIN CERTIFICATE-----\n")
    check = build_checks.check_certificates(found)
    assert check.status == "passed"
    assert "SSL_CERT_FILE" in check.found
    assert build_checks.certificate_authority({}, str(path)) == (path, "pip's configuration, cert")


def test_base(tmp_path: Path, only_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "apt install mmdebstrap" in build_checks.check_base("tree").line()
    script(only_path / "mmdebstrap", "true")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(build_checks, "has_subordinate_ids", lambda: False)
    refused = build_checks.check_base("tree")
    assert (refused.status, "BASE=DIRECTORY" in refused.line()) == ("failed", True)
    monkeypatch.setattr(build_checks, "has_subordinate_ids", lambda: True)
    assert build_checks.check_base("tree").status == "passed"
    assert build_checks.check_base(str(tmp_path)).status == "passed"
    assert build_checks.check_base(str(tmp_path / "none")).status == "failed"
    assert "BASE=tree" in build_checks.check_base("debian:x").found


# --- what goes in -----------------------------------------------------------------------------------------------


def test_the_source_is_the_commit_s_and_changes_are_told(checkout: Path, tmp_path: Path) -> None:
    source = find_source(checkout)
    assert (len(source.commit), source.clean) == (40, True)
    assert source.files == [
        "LICENSE",
        "README.md",
        "containers/cpu.lock",
        "containers/nanogpt.def",
        "nanogpt/a.py",
        "pyproject.toml",
        "recipes/r.yaml",
    ]
    first = stage(checkout, source, tmp_path / "stage")
    (checkout / "nanogpt/a.pyc").write_text("ignored")
    (checkout / "notes.txt").write_text("not of the image")
    again = find_source(checkout)
    assert again == source
    assert stage(checkout, again, tmp_path / "stage") == first
    assert not (tmp_path / "stage" / "nanogpt/a.pyc").exists()

    (checkout / "nanogpt/b.py").write_text("new")
    changed = find_source(checkout)
    assert changed.clean is False
    assert stage(checkout, changed, tmp_path / "stage") != first
    (checkout / "nanogpt/b.py").unlink()
    (checkout / "nanogpt/a.py").chmod(0o755)
    assert stage(checkout, source, tmp_path / "stage") != first
    assert (tmp_path / "stage" / "nanogpt/a.py").stat().st_mode & 0o777 == 0o755


def test_an_archive_without_git_has_no_commit(checkout: Path) -> None:
    (checkout / ".git").rename(checkout.parent / "git")
    source = find_source(checkout)
    assert (source.commit, source.clean, source.epoch) == ("unknown", None, 0)
    assert "nanogpt/a.py" in source.files
    assert build_arguments(checkout, "cpu", "x", source, "containers/cpu.lock", b"")["CLEAN"] == "unknown"
    with pytest.raises(InputError, match=r"containers/nanogpt\.def"):
        find_source(checkout.parent)


@pytest.mark.parametrize(
    ("remote", "url"),
    [
        ("https://host.org/me/repo.git", "https://host.org/me/repo"),
        ("https://me:secret@host.org:8443/me/repo/", "https://host.org/me/repo"),
        ("git@host.org:me/repo.git", "https://host.org/me/repo"),
        ("ssh://git@host.org:22/me/repo", "https://host.org/me/repo"),
        ("/home/me/repo", "unknown"),
        ("../repo.git", "unknown"),
        ("file:///home/me/repo", "unknown"),
        ("", "unknown"),
    ],
)
def test_the_source_s_address_tells_neither_passwords_nor_directories(remote: str, url: str) -> None:
    assert public_url(remote) == url


def test_the_labels_name_source_licence_authors_and_base(checkout: Path) -> None:
    subprocess.run(["git", "-C", checkout, "remote", "add", "origin", "git@host.org:me/repo.git"], check=True)
    source = find_source(checkout)
    given = build_arguments(checkout, "cpu", Path("../../base-bookworm"), source, "containers/cpu.lock", b"")
    assert [given[name] for name in ("SOURCE", "LICENSES", "AUTHORS", "BASE_NAME")] == [
        "https://host.org/me/repo",
        "MIT",
        "A, B",
        "base-bookworm",
    ]


def test_what_the_host_lends_is_not_copied_into_the_image(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl").write_bytes(b"wheel")
    authority = tmp_path / "ca.crt"
    authority.write_text("BEGIN CERTIFICATE")
    environ = {"https_proxy": "http://proxy:3128/a b", "PIP_INDEX_URL": "https://mirror/simple"}
    environ |= {"PIP_EXTRA_INDEX_URL": "https://cpu-builds/whl", "OTHER": "1", "PIP_CONFIG_FILE": os.devnull}
    options = host_part(tmp_path / "host", environ, authority, wheels)
    assert options == ["--mount", f'type=bind,"src={tmp_path / "host"}",dst=/mnt,ro']
    names = ("https_proxy", "PIP_INDEX_URL", "PIP_CERT", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "OTHER")
    show = "; ".join(f'echo "${name}"' for name in names)
    sourced = f". {tmp_path / 'host' / 'build-env.sh'}; {show}"
    done = subprocess.run(["sh", "-c", sourced], capture_output=True, text=True, check=True, env={})
    assert done.stdout.splitlines() == [
        "http://proxy:3128/a b",
        "https://mirror/simple",
        "/mnt/certificates.crt",
        "/mnt/wheels",
        "https://cpu-builds/whl",
        "",
    ]
    host_part(tmp_path / "host", {"PIP_CONFIG_FILE": os.devnull}, None, None)
    assert (tmp_path / "host" / "build-env.sh").read_text() == ""


def test_pip_s_settings_are_found_in_each_file_that_pip_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIP_CONF", tmp_path / "etc-pip.conf")
    environ = {"HOME": str(tmp_path / "home"), "XDG_CONFIG_DIRS": str(tmp_path / "system")}
    assert pip_setting("no-such-setting", environ) is None
    system, own = tmp_path / "system/pip/pip.conf", tmp_path / "home/.config/pip/pip.conf"
    for file in (system, own):
        file.parent.mkdir(parents=True)
    system.write_text("[global]\ncert = /system.crt\nindex-url = file:///here\nextra-index-url = /a https://b\n")
    assert pip_setting("cert", environ) == "/system.crt"
    assert pip_settings(environ)["PIP_EXTRA_INDEX_URL"] == "https://b"
    assert "PIP_INDEX_URL" not in pip_settings(environ)
    own.write_text("[global]\ncert = /own.crt\n[download]\ncert = /other.crt\n")
    assert pip_setting("cert", environ) == "/own.crt"
    system.write_text("[install]\ncert = /system.crt\n")
    assert pip_setting("cert", environ) == "/system.crt"
    own.write_text("no configuration\n")
    assert pip_setting("cert", environ) == "/system.crt"
    assert pip_setting("cert", environ | {"PIP_CERT": "/variable.crt"}) == "/variable.crt"
    assert pip_setting("cert", environ | {"PIP_CONFIG_FILE": os.devnull}) is None


def test_wheels_come_from_where_pip_looks_or_from_a_flag(tmp_path: Path) -> None:
    assert wheel_directory(str(tmp_path), "cuda", None) == tmp_path
    assert wheel_directory(None, "cpu", f"https://x/ {tmp_path}") == tmp_path
    assert wheel_directory(None, "cuda", str(tmp_path)) is None
    with pytest.raises(InputError, match="WHEELS="):
        wheel_directory(str(tmp_path / "none"), "cpu", None)


def test_locked_versions() -> None:
    assert locked_versions("a-b==1.0 \\\n    --hash=sha256:0\nC_d==2.0+cpu ; x\n") == {"a-b": "1.0", "C_d": "2.0+cpu"}


# --- building ---------------------------------------------------------------------------------------------------


def fake_machine(only_path: Path, apptainer: str) -> None:
    """A PATH where Apptainer does as told, and everything passes."""
    for name in ("git", "sh", "sleep", "cp"):
        (only_path / name).symlink_to(
            subprocess.run(
                ["/bin/sh", "-c", f"PATH=/usr/bin:/bin command -v {name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
        )
    script(only_path / "mksquashfs", "echo 'mksquashfs version 4.6.1'")
    script(
        only_path / "apptainer", f'if [ "$1" = --version ]; then echo apptainer version 1.4.5; exit; fi\n{apptainer}'
    )


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    """A build of the CPU flavour from a directory, on a machine where unprivileged builds work and space is free."""
    (tmp_path / "tree").mkdir()
    passed = build_checks.Check("unprivileged build", "passed", "")
    monkeypatch.setattr(build_checks, "check_privileges", lambda: passed)
    monkeypatch.setattr(build_checks, "TEMPORARY_NEEDED", {"cpu": 1})
    monkeypatch.setattr(build_checks, "IMAGE_NEEDED", {"cpu": 1})
    out, work = tmp_path / "out" / "n.sif", tmp_path / "work"
    return Options(flavour="cpu", base=str(tmp_path / "tree"), out=out, work=work, test=False)


BUILDS = """
if [ "$1" = build ]; then
    for last; do :; done; target=; for word; do target=$previous; previous=$word; done
    echo "==> Python packages"; echo "$*" > "$APPTAINER_TMPDIR/arguments"; echo image > "$target"; exit
fi
[ "$2" = list ] && echo "4 |1 |NONE |0-6 |FS (Squashfs/*System/amd64)"
"""


def test_a_build_says_what_came_out_and_is_not_repeated(
    checkout: Path, options: Options, only_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_machine(only_path, BUILDS)
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "APPTAINER_TMPDIR": str(tmp_path / "tmp")}
    options.kernels = "80,90"
    built = build(checkout, options, environ)
    said = capsys.readouterr().err
    assert built.sha256 in said
    assert "Python packages" in said
    assert options.out.read_text() == "image\n"
    assert read_built(options.out) == built
    arguments = (tmp_path / "tmp" / "arguments").read_text()
    assert f'--build-arg "COMMIT={built.commit}"' in arguments
    assert '--build-arg "KERNELS=80,90"' in arguments  # Apptainer splits what is not quoted at commas
    assert "BASE=../../../tree" in arguments  # does not tell where it was built
    assert not (options.work / "cpu" / "host").exists()

    (tmp_path / "tmp" / "arguments").unlink()
    assert build(checkout, options, environ) == built
    assert "nothing that goes into it has changed" in capsys.readouterr().err
    assert not (tmp_path / "tmp" / "arguments").exists()
    options.out.write_text("another file")
    build(checkout, options, environ)
    assert (tmp_path / "tmp" / "arguments").exists()


def test_compiled_code_goes_into_the_image(
    checkout: Path, options: Options, only_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_machine(only_path, BUILDS)
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "APPTAINER_TMPDIR": str(tmp_path / "tmp")}
    file = tmp_path / "h200-torch.compiled"
    torch_version = locked_versions((checkout / "containers/cpu.lock").read_text())["torch"]

    def write(made_with: str) -> None:
        rest = json.dumps({"key": {"torch": [made_with, "", None]}}).encode() + b"\ncode"
        file.write_bytes(b"nanogpt compiled code 1 sha256 " + hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)

    write(torch_version)
    without = build(checkout, options, environ)
    options.cache = str(file)
    built = build(checkout, options, environ)
    assert built.key != without.key
    staged = options.work / "cpu" / "stage" / "containers" / "compiled" / file.name
    assert staged.read_bytes() == file.read_bytes()
    assert build(checkout, options, environ) == built
    assert "nothing that goes into it has changed" in capsys.readouterr().err

    file.chmod(0o666)
    with pytest.raises(InputError, match="others own or may write it"):
        build(checkout, options, environ)
    file.chmod(0o644)
    write("1.0.0")
    with pytest.raises(InputError, match=rf"made with PyTorch 1\.0\.0, but the image has {re.escape(torch_version)}"):
        build(checkout, options, environ)
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(InputError, match="not a file of compiled code, or damaged"):
        build(checkout, options, environ)
    file.unlink()
    with pytest.raises(InputError, match="No such file"):
        build(checkout, options, environ)


def test_a_failed_build_says_what_to_do_and_leaves_no_image(
    checkout: Path, options: Options, only_path: Path, tmp_path: Path
) -> None:
    fake_machine(only_path, "echo '==> Python packages'; echo 'OSError: [Errno 28] No space left on device'; exit 255")
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "APPTAINER_TMPDIR": str(tmp_path / "tmp")}
    with pytest.raises(RunError) as error:
        build(checkout, options, environ)
    for word in ("'Python packages'", "APPTAINER_TMPDIR=/scratch", "Errno 28", "build.log"):
        assert word in str(error.value)
    assert "APPTAINER_TMPDIR=/scratch" in str(error.value).splitlines()[-1]
    assert list(options.out.parent.iterdir()) == []


def test_what_builds_has_a_mask_of_its_own_and_the_image_the_user_s(
    checkout: Path, options: Options, only_path: Path, tmp_path: Path
) -> None:
    fake_machine(only_path, 'umask > "$APPTAINER_TMPDIR/mask"\n' + BUILDS)
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "APPTAINER_TMPDIR": str(tmp_path / "tmp")}
    before = os.umask(0o077)
    try:
        build(checkout, options, environ)
    finally:
        os.umask(before)
    assert int((tmp_path / "tmp" / "mask").read_text(), 8) == 0o022
    assert options.out.stat().st_mode & 0o777 == 0o700


def test_a_machine_that_cannot_build_is_refused_before(
    checkout: Path, options: Options, only_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_machine(only_path, "touch /no/build")
    (only_path / "mksquashfs").unlink()
    with pytest.raises(InputError) as error:
        build(checkout, options, {"HOME": str(tmp_path), "APPTAINER_TMPDIR": str(tmp_path)})
    assert "failed   mksquashfs" in capsys.readouterr().err
    assert str(error.value).splitlines()[-1] == f"  mksquashfs: {build_checks.check_squashfs_tools().advice}"


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]", "SSL_CERT_FILE"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", "make lock"),
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", "WHEELS="),
        ("FATAL: While making image from oci registry: dial tcp: i/o timeout", "BASE=tree"),
        ('FATAL: While performing build: conveyor failed to get: Get "https://r/v2/": no such host', "BASE=tree"),
        ('Get "https://r/v2/": x509: certificate signed by unknown authority', "SSL_CERT_FILE"),
        ("Temporary failure in name resolution", "login node"),
        ("FATAL: could not use fakeroot: no mapping entry found", "--check"),
        ("something else", "make pull"),
    ],
)
def test_logs_are_explained(tmp_path: Path, line: str, advice: str) -> None:
    log = tmp_path / "log"
    log.write_text(f"begin\n{line}\nFATAL: While performing build\n")
    explained = explain(log).splitlines()
    assert advice in explained[-1]
    assert f"    {line}" in explained


def test_stages_are_said_as_they_begin(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(image_build.time, "monotonic", lambda: now[0])
    stages = Stages(packages=3)
    for line in ("INFO:    Starting build...", "==> Python packages", "Collecting a==1", "Collecting b==2"):
        stages.line(line)
    now[0] = 105.0
    stages.tick()
    now[0] = 111.0
    stages.tick()
    stages.line("INFO:    Creating SIF file...")
    assert [line.split(maxsplit=2)[2] for line in capsys.readouterr().err.splitlines()] == [
        "Python packages",
        "... Python packages, 2 of 3",
        "packing",
    ]


def test_facts_of_an_image_are_for_that_file_only(tmp_path: Path) -> None:
    image = tmp_path / "n.sif"
    assert read_built(image) is None
    image.write_bytes(b"x")
    sidecar(image).write_text("{}")
    assert read_built(image) is None
    status = image.stat()
    built = Built("k", "s", 1, status.st_mtime_ns, "c", 1.0, "cpu", "commit", True)
    import dataclasses
    import json

    sidecar(image).write_text(json.dumps(dataclasses.asdict(built)))
    assert read_built(image) == built
    image.write_bytes(b"xy")
    assert read_built(image) is None


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert image_build.main(["--base", "tree"]) == 2
    assert "run `make sif` in a checkout" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        image_build.main(["--flavour", "rocm"])


def test_a_python_that_is_too_old_is_told_with_the_ways_out(tmp_path: Path) -> None:
    old = script(tmp_path / "python3.6", '[ "$1" != -V ] || { echo Python 3.6.8; exit; }\nexit 1')
    done = subprocess.run(["make", "sif", f"PYTHON={old}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    for word in ("Python 3.6.8", "3.11 or newer", "module load miniforge", "make pull FROM="):
        assert word in done.stderr


def test_a_job_builds_where_the_checkout_is(tmp_path: Path) -> None:
    """Slurm runs a copy of the script, and `scontrol` knows whose."""
    here = ROOT / "slurm" / "build_sif.sh"
    copy = tmp_path / "spool" / "slurm_script"
    copy.parent.mkdir()
    copy.write_text(here.read_text())
    script(tmp_path / "bin" / "make", 'echo "$@"')
    script(tmp_path / "bin" / "scontrol", f"echo '   Command={here} BASE=tree'")
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    for path in (here, copy):
        command = ["bash", path, "BASE=tree", "OUT=n.sif"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == f"--no-print-directory -C {ROOT / 'slurm'}/.. sif BASE=tree OUT=n.sif\n"
