"""`make sif`: check the machine, stage the sources, build the image, and report the result.

    python3 -m nanogpt.image.build [--flavour cpu] [--base tree] [--out nanogpt.sif] ...

Notable features:
- Standard library only: it runs on a login node before anything is installed.
- What goes into the image is copied aside first and identified by a hash: if an image with that hash exists,
  nothing is built. Uncommitted files go in too; the image's labels then say that it is not clean.
- File times in the image are the commit's, so that two builds of one commit have identical files.
- What the build needs from this machine (proxy, certificate authority, wheels) is bound to /mnt for its duration.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nanogpt.console import human_bytes, say
from nanogpt.errors import InputError, NanogptError, RunError
from nanogpt.image import build_checks
from nanogpt.image.labels import Built, read_built, sidecar
from nanogpt.image.sources import (
    DEFINITION,
    PROXIES,
    UMASK,
    build_arguments,
    find_source,
    host_part,
    last_lines,
    locked_versions,
    make_tree,
    pip_setting,
    quoted,
    stage,
    stage_compiled,
    wheel_directory,
)
from nanogpt.image.tree import content_sha256, file_sha256

FLAVOURS = ("cuda", "cpu")
# The Debian release of each flavour: the lock file is made for its Python.
SUITES = {"cuda": "trixie", "cpu": "bookworm"}
REGISTRY_BASES = {"cuda": "debian:trixie-20250811-slim", "cpu": "debian:bookworm-20250811-slim"}
PASSED_ON = ("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "XDG_RUNTIME_DIR", "TERM")

# Patterns in the log of a failed build, and what they mean.
MEANINGS = (
    (
        "No space left on device",
        "A disk is full: point APPTAINER_TMPDIR at a larger one (export APPTAINER_TMPDIR=/scratch/$USER).",
    ),
    ("Disk quota exceeded", "A quota is used up: point APPTAINER_TMPDIR and APPTAINER_CACHEDIR at scratch."),
    (
        "CERTIFICATE_VERIFY_FAILED|certificate signed by unknown authority",
        "A proxy with its own certificate authority is in between: export SSL_CERT_FILE=/path/to/its/bundle.crt.",
    ),
    (
        "DO NOT MATCH THE HASHES",
        "A downloaded file is not the one that the lock names. If the download broke, build again; for your own wheels:"
        " make lock.",
    ),
    (
        "compiled code: ",
        "A file in CACHE was made by a different installation; the end of the log says what differs.",
    ),
    (
        "No matching distribution found for torch",
        "The index does not have this build of PyTorch. CPU builds are on an index of their own, named on PyTorch's"
        " installation page: export PIP_EXTRA_INDEX_URL=that, or give a directory with the wheel: make sif WHEELS=DIR.",
    ),
    (
        "requirements have to have their versions pinned",
        "The lock is not complete; write it again with `make lock`.",
    ),
    (
        "toomanyrequests",
        "The registry refuses requests for now; try later, log in with `apptainer registry login`, or use BASE=tree.",
    ),
    (
        "while making image from oci registry|failed to get checksum for docker|unable to retrieve auth token"
        "|error pinging|conveyor failed to get|initializing source docker",
        "The base image's registry cannot be reached; BASE=tree makes a Debian tree without one.",
    ),
    (
        "Temporary failure in name resolution|Could not resolve|Network is unreachable|Connection timed out",
        "No network: build where the internet is reachable (a login node), or set http_proxy and https_proxy.",
    ),
    (
        "newuidmap|user namespace|could not use fakeroot|unshare",
        "The machine does not let a user become root in a namespace; `python3 -m nanogpt.image.build --check`"
        " says why.",
    ),
    (
        "Killed|Cannot allocate memory|signal: killed",
        "The machine ran out of memory; build on a node with 8 GB or more.",
    ),
)
UNKNOWN = (
    "The cause is not a known one. Read further up in the log; `make pull` fetches an image that was built elsewhere"
    " (docs/container.md)."
)


# --- building ---------------------------------------------------------------------------------------------------


class Stages:
    """Reports progress: one line per stage, and every ten seconds how far the stage has come."""

    def __init__(self, packages: int) -> None:
        self.start = time.monotonic()
        self.stage = "starting"
        self.packages = packages
        self._collected = 0
        self._installing = False
        self._said = self.start

    def line(self, text: str) -> None:
        """Look at a line of Apptainer's output."""
        text = text.strip()
        if text.startswith("==> "):
            self.enter(text[4:])
        elif text.startswith("INFO:    Creating SIF file"):
            self.enter("packing")
        elif text.startswith("Collecting "):
            self._collected += 1
        elif text.startswith("Installing collected packages"):
            self._installing = True

    def enter(self, stage: str) -> None:
        """A stage begins."""
        self.stage, self._said = stage, time.monotonic()
        say(f"{time.monotonic() - self.start:5.0f} s  {stage}")

    def tick(self) -> None:
        """Some time has passed."""
        if time.monotonic() - self._said < 10:
            return
        self._said = time.monotonic()
        detail = ""
        if self.stage == "Python packages":
            detail = ", unpacking" if self._installing else f", {self._collected} of {self.packages}"
        say(f"{time.monotonic() - self.start:5.0f} s    ... {self.stage}{detail}")


def run_apptainer(command: Sequence[str], cwd: Path, log: Path, environment: Mapping[str, str], stages: Stages) -> None:
    """Run a build, with its output in `log` and its stages on standard error.

    Raises:
        RunError: the build failed; the message explains why if the log shows it.
    """
    done = threading.Event()

    def tell() -> None:
        while not done.wait(1):
            stages.tick()

    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            umask=UMASK,
        )
        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                stream.write(line)
                stream.flush()
                stages.line(line)
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            done.set()
            teller.join()
    if code != 0:
        raise RunError(f"apptainer build failed in the stage {stages.stage!r}. {explain(log)}")


def explain(log: Path) -> str:
    """The last lines of a failed build's log, and below them what they mean and what to do."""
    text = log.read_text(errors="replace")
    meaning = next((said for pattern, said in MEANINGS if re.search(pattern, text, re.IGNORECASE)), UNKNOWN)
    return f"The end of {log}:\n{last_lines(log)}\n{meaning}"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Allow only one build at a time in a checkout."""
    import fcntl

    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"another build holds {path}; waiting for it")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@dataclass
class Options:
    """The options of `make sif`."""

    flavour: str = "cuda"
    base: str | None = None  # "tree", a directory, an image, a name in a registry; None: a Debian image
    out: Path = Path("nanogpt.sif")
    wheels: str | None = None
    work: Path = Path("build/sif")
    compression: str | None = None  # a name in COMPRESSIONS or arguments for mksquashfs; None: zstd, else gzip
    kernels: str = "all"  # GPU architectures whose kernels are kept: all, or "80,90"
    cache: str | None = None  # files of compiled code to ship in the image
    test: bool = True


def machine_checks(options: Options, environ: Mapping[str, str]) -> list[build_checks.Check]:
    """Everything that is checked before a build."""
    temporary, cache = build_checks.temporary_directory(environ), build_checks.cache_directory(environ)
    scratch = "Point it at scratch: export APPTAINER_TMPDIR=/scratch/$USER/tmp (make the directory first)."
    checks = [
        build_checks.check_apptainer(),
        build_checks.check_squashfs_tools(options.compression),
        build_checks.check_privileges(),
        build_checks.check_base(options.base or REGISTRY_BASES[options.flavour]),
        build_checks.check_space(
            "APPTAINER_TMPDIR", temporary, build_checks.TEMPORARY_NEEDED[options.flavour], scratch
        ),
        build_checks.check_space(
            "image",
            options.out.absolute().parent,
            build_checks.IMAGE_NEEDED[options.flavour],
            "Choose another place: make sif OUT=DIR/nanogpt.sif.",
        ),
        build_checks.check_certificates(build_checks.certificate_authority(environ, pip_setting("cert", environ))),
    ]
    if options.base is None or not (options.base == "tree" or options.base.startswith(("/", "."))):
        way_out = "Point it at scratch: export APPTAINER_CACHEDIR=/scratch/$USER/apptainer."
        checks.append(build_checks.check_space("APPTAINER_CACHEDIR", cache, 500_000_000, way_out))
    return checks


def build(root: Path, options: Options, environ: Mapping[str, str]) -> Built:
    """Make the image, unless it exists already.

    Raises:
        InputError: the machine cannot build it, or an option is wrong; all failed checks are listed.
        RunError: the build failed.
    """
    started = time.monotonic()
    source = find_source(root)
    lock_path = f"containers/{options.flavour}.lock"
    work = options.work / options.flavour
    work.mkdir(parents=True, exist_ok=True)
    out = options.out.absolute()
    with _locked(work / "lock"):
        files = stage(root, source, work / "stage")
        lock = (work / "stage" / lock_path).read_bytes()
        torch = locked_versions(lock.decode())["torch"]
        compiled = stage_compiled(options.cache, work / "stage" / "containers" / "compiled", torch)
        base_name = options.base or REGISTRY_BASES[options.flavour]
        compression = build_checks.choose_compression(options.compression)
        key = hashlib.sha256(
            "\0".join(
                [
                    *(files, compiled, options.flavour, base_name, compression, options.kernels),
                    *(str(source.clean), source.url),
                ]
            ).encode()
        ).hexdigest()
        built = read_built(out)
        if built is not None and built.key == key:
            say(f"{options.out} exists; nothing that goes into it has changed since commit {built.commit[:12]}")
            return built

        checks = machine_checks(options, environ)
        refused = [check for check in checks if check.status == "failed"]
        for check in checks:
            say((check._replace(advice="") if check in refused else check).line())  # what to do comes last
        if refused:
            ways_out = "".join(f"\n  {check.name}: {check.advice}" for check in refused)
            raise InputError(f"The image cannot be built here as it stands.{ways_out}")

        base: Path | str = base_name
        if base_name == "tree":
            say("    0 s  Debian tree")
            base = make_tree(SUITES[options.flavour], options.work, source.epoch)
        elif base_name.startswith(("/", ".")):
            base = Path(base_name)
        authority = build_checks.certificate_authority(environ, pip_setting("cert", environ))
        wheels = wheel_directory(options.wheels, options.flavour, pip_setting("find-links", environ))
        host = (work / "host").absolute()
        binds = host_part(host, environ, authority[0] if authority else None, wheels)
        if isinstance(base, Path):
            # Relative, so that the image does not reveal where it was built.
            base = Path(os.path.relpath(base.resolve(), (work / "stage").resolve()))
        arguments = build_arguments(work / "stage", options.flavour, base, source, lock_path, lock, options.kernels)

        new = out.with_name(out.name + ".new")
        out.parent.mkdir(parents=True, exist_ok=True)
        squash = f"{compression} -no-xattrs"
        command = ["apptainer", "build", "--force", "--notest", "--mksquashfs-args", squash, *binds]
        if os.geteuid() != 0:
            command.append("--fakeroot")
        for name, value in arguments.items():
            command += ["--build-arg", quoted(f"{name}={value}")]
        stages = Stages(len(locked_versions(lock.decode())))
        kept = (*PASSED_ON, *PROXIES)
        environment = {name: value for name, value in environ.items() if name in kept or name.startswith("APPTAINER_")}
        # mksquashfs uses it as the image's own time, and as the time of every newer file.
        environment["SOURCE_DATE_EPOCH"] = str(source.epoch)
        temporary = build_checks.temporary_directory(environ)
        temporary.mkdir(parents=True, exist_ok=True)
        environment["APPTAINER_TMPDIR"] = str(temporary)
        if authority:
            environment["SSL_CERT_FILE"] = str(authority[0])  # for Apptainer itself, which contacts the base's registry
        try:
            run_apptainer([*command, str(new), DEFINITION], work / "stage", work / "build.log", environment, stages)
            new.chmod(0o777 & ~umask())
            stages.enter("hashes")
            status = new.stat()
            facts = Built(
                key=key,
                sha256=file_sha256(new),
                bytes=status.st_size,
                modified_ns=status.st_mtime_ns,
                content_sha256=content_sha256(new),
                seconds=round(time.monotonic() - started, 1),
                flavour=options.flavour,
                commit=source.commit,
                clean=source.clean,
            )
            if options.test:
                stages.enter("apptainer test")
                try:
                    test(new)
                except RunError as error:
                    failed = out.with_name(out.name + ".failed")
                    new.replace(failed)
                    raise RunError(
                        f"The image was built, but its own test fails; it is kept as {failed}.\n{error}"
                    ) from None
            new.replace(out)
        finally:
            new.unlink(missing_ok=True)
            shutil.rmtree(host, ignore_errors=True)
        sidecar(out).write_text(json.dumps(asdict(facts), indent=1) + "\n")
    say(f"{options.out}: {human_bytes(facts.bytes)}, built in {facts.seconds:.0f} s")
    say(f"file    sha256 {facts.sha256}")
    say(f"content sha256 {facts.content_sha256}")
    return facts


def umask() -> int:
    """This process's umask."""
    mask = os.umask(UMASK)
    os.umask(mask)
    return mask


def test(image: Path) -> None:
    """Run the image's own %test.

    Raises:
        RunError: it failed; its output is in the message.
    """
    done = subprocess.run(["apptainer", "test", image], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RunError(f"apptainer test {image} failed with exit code {done.returncode}:\n{done.stdout}{done.stderr}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="make sif", description=__doc__.partition("\n")[0])
    parser.add_argument("--flavour", choices=FLAVOURS, default="cuda")
    parser.add_argument("--base", help="tree, a directory, an image or a name in a registry; default: a Debian image")
    parser.add_argument("--out", type=Path, default=Path("nanogpt.sif"))
    parser.add_argument("--wheels", help="directory of additional wheels for pip")
    parser.add_argument("--work", type=Path, default=Path("build/sif"))
    parser.add_argument("--compression", help="zstd, gzip, lz4, or arguments for mksquashfs")
    parser.add_argument("--kernels", default="all", help="GPU architectures whose kernels are kept: all, or 80,90")
    parser.add_argument("--cache", help="files of compiled code, made by nanogpt warm, to ship in the image")
    parser.add_argument("--check", action="store_true", help="only check whether this machine can build")
    arguments = parser.parse_args(argv)
    if not re.fullmatch(r"all|\d+(,\d+)*|", arguments.kernels):
        parser.error(f"--kernels {arguments.kernels}: expected all, or architectures such as 80,90")
    options = Options(
        flavour=arguments.flavour,
        base=arguments.base or None,
        out=arguments.out,
        wheels=arguments.wheels or None,
        work=arguments.work,
        compression=arguments.compression or None,
        kernels=arguments.kernels or "all",
        cache=arguments.cache or None,
    )
    try:
        if arguments.check:
            checks = machine_checks(options, os.environ)
            print("\n".join(check.line() for check in checks))
            return 2 if any(check.status == "failed" for check in checks) else 0
        built = build(Path.cwd(), options, os.environ)
    except NanogptError as error:
        say(f"make sif: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("make sif: interrupted; only the log was left behind")
        return 130
    print(json.dumps({"image": str(options.out), **asdict(built)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
