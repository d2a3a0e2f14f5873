"""`make sif`: check the machine, stage the sources, build the image, and say what came out.

    python3 -m nanogpt.cluster.image_build [--flavour cpu] [--base tree] [--out nanogpt.sif] ...

Notable features:
- Standard library only: it runs on a login node before anything is installed.
- What goes into the image is copied aside first, and named by a hash: where an image of the same hash is there, there is
  nothing to do. Files that are not committed go in too, and the image's labels then say that it is not clean.
- Times inside are the commit's, so that two builds of one commit have the same files.
- What the build needs of this machine (proxy, certificate authority, wheels) is bound to /mnt for its duration.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nanogpt import __version__
from nanogpt.cluster import image_checks
from nanogpt.console import human_bytes, say
from nanogpt.errors import InputError, NanogptError, RunError

DEFINITION = "containers/nanogpt.def"
SOURCES = ("containers", "nanogpt", "recipes", "pyproject.toml", "README.md", "LICENSE")
FLAVOURS = ("cuda", "cpu")
# The Debian release of each flavour: its Python is the one that the lock file is for.
SUITES = {"cuda": "trixie", "cpu": "bookworm"}
REGISTRY_BASES = {"cuda": "debian:trixie-20250811-slim", "cpu": "debian:bookworm-20250811-slim"}
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"  # where PyTorch publishes its CPU builds
SHOWN_PACKAGES = ("torch", "triton", "flash-attn-4", "nvidia-cutlass-dsl", "nvidia-nccl-cu13", "nvidia-cudnn-cu13")
PASSED_ON = ("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "XDG_RUNTIME_DIR", "TERM")
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
PIP_SETTINGS = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_DEFAULT_TIMEOUT", "PIP_PROXY")
# Chosen by measurement: docs/container.md has the table.
COMPRESSION = "-comp zstd -Xcompression-level 6 -b 256K"
LAST_LINES = 15

# What a log of a failed build may hold, and what it means.
MEANINGS = (
    (
        "No space left on device",
        "A disk is full: point APPTAINER_TMPDIR at a larger one (export APPTAINER_TMPDIR=/scratch/$USER).",
    ),
    ("Disk quota exceeded", "A quota is used up: point APPTAINER_TMPDIR and APPTAINER_CACHEDIR at scratch."),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "A proxy with a certificate authority of its own stands between: export SSL_CERT_FILE=/path/to/its/bundle.crt.",
    ),
    (
        "DO NOT MATCH THE HASHES",
        "A downloaded file is not the one that the lock names. A broken download: build again. Wheels of your own: make lock.",
    ),
    (
        "No matching distribution found for torch",
        "The index has no such build of PyTorch; give a directory with its wheel: make sif WHEELS=/path/to/wheels.",
    ),
    (
        "requirements have to have their versions pinned",
        "The lock is not complete; write it anew with `make lock`.",
    ),
    (
        "toomanyrequests",
        "The registry refuses for now; try again later, log in with `apptainer registry login`, or BASE=tree.",
    ),
    (
        "while making image from oci registry|failed to get checksum for docker|unable to retrieve auth token|error pinging",
        "The registry of the base cannot be reached; BASE=tree makes a Debian tree without one.",
    ),
    (
        "Temporary failure in name resolution|Could not resolve|Network is unreachable|Connection timed out",
        "No network: build where the internet is reachable (a login node), or set http_proxy and https_proxy.",
    ),
    (
        "newuidmap|user namespace|could not use fakeroot|unshare",
        "The machine does not let a user become root in a namespace; see `python3 -m nanogpt.cluster.image_build --check`.",
    ),
    (
        "Killed|Cannot allocate memory|signal: killed",
        "The machine ran out of memory; build on a node with 8 GB or more.",
    ),
)


@dataclass
class Source:
    """What goes into the image, and from which commit."""

    commit: str = "unknown"
    clean: bool | None = None  # None: not a git checkout
    epoch: int = 0  # seconds since 1970, of the commit
    files: list[str] = field(default_factory=list)


@dataclass
class Built:
    """What lies beside an image, in NAME.sif.json."""

    key: str  # hash over all that goes in
    sha256: str  # of the file
    bytes: int
    modified_ns: int
    content_sha256: str  # of the file system alone: equal in two builds of one commit
    seconds: float
    flavour: str
    commit: str
    clean: bool | None


# --- what goes in -----------------------------------------------------------------------------------------------


def find_source(root: Path) -> Source:
    """The files of the checkout or unpacked archive at `root` that the image is made of.

    Raises:
        InputError: `root` has no definition.
    """
    if not (root / DEFINITION).is_file():
        raise InputError(f"{root}: has no {DEFINITION}; run `make sif` in a checkout of the project")
    if not (root / ".git").exists():
        found = [
            path
            for name in SOURCES
            for path in ([root / name] if (root / name).is_file() else (root / name).rglob("*"))
        ]
        files = [
            path.relative_to(root).as_posix() for path in found if path.is_file() and "__pycache__" not in path.parts
        ]
        return Source(files=sorted(files))
    files = [
        name for name in _git(root, "ls-files", "-z", "-co", "--exclude-standard", "--", *SOURCES).split("\0") if name
    ]
    return Source(
        commit=_git(root, "rev-parse", "HEAD").strip(),
        clean=not _git(root, "status", "--porcelain", "--", *SOURCES).strip(),
        epoch=int(_git(root, "log", "-1", "--format=%ct").strip()),
        files=sorted({name for name in files if (root / name).is_file()}),
    )


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "safe.directory=*", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        raise RunError(f"{root}: git cannot tell what is in the checkout: {str(detail).strip()}") from error


def stage(root: Path, source: Source, to: Path) -> str:
    """Copy the source's files to the directory `to`, made anew; a hash over their paths, modes and contents."""
    if to.exists():
        shutil.rmtree(to)
    digest = hashlib.sha256()
    for name in source.files:
        content = (root / name).read_bytes()
        executable = os.access(root / name, os.X_OK)
        target = to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(0o755 if executable else 0o644)
        digest.update(f"{name}\0{executable}\0{len(content)}\0".encode() + content)
    for directory in (to, *(path for path in to.rglob("*") if path.is_dir())):
        directory.chmod(0o755)
    return digest.hexdigest()


def locked_versions(lock: str) -> dict[str, str]:
    """Package -> version of a lock file's text."""
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s\\;]+)", lock, re.MULTILINE))


def build_arguments(flavour: str, base: Path | str, source: Source, lock_path: str, lock: bytes) -> dict[str, str]:
    """Values for the definition's arguments."""
    versions = locked_versions(lock.decode())
    local = isinstance(base, Path)
    created = datetime.datetime.fromtimestamp(source.epoch, datetime.timezone.utc)  # noqa: UP017
    return {
        "BOOTSTRAP": "localimage" if local else "docker",
        "BASE": str(base),
        "FLAVOUR": flavour,
        "LOCK": lock_path,
        "LOCK_SHA256": hashlib.sha256(lock).hexdigest(),
        "VERSION": __version__,
        "VERSIONS": " ".join(f"{name}={versions[name]}" for name in SHOWN_PACKAGES if name in versions),
        "COMMIT": source.commit,
        "CLEAN": "unknown" if source.clean is None else str(source.clean).lower(),
        "CREATED": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "EPOCH": str(source.epoch),
    }


# --- the host's part --------------------------------------------------------------------------------------------


def pip_setting(name: str) -> str | None:
    """A setting of pip's configuration files or PIP_* variables; None: not set, or there is no pip."""
    if os.environ.get("PIP_" + name.upper().replace("-", "_")):
        return os.environ["PIP_" + name.upper().replace("-", "_")]
    command = [sys.executable, "-m", "pip", "config", "get", f"global.{name}"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout.strip() or None if done.returncode == 0 else None
    return None


def wheel_directory(given: str | None, flavour: str, find_links: str | None) -> Path | None:
    """A directory of wheels for pip: the one given, else for the CPU flavour one that pip's settings name.

    Raises:
        InputError: the one given is no directory.
    """
    if given:
        if not Path(given).is_dir():
            raise InputError(f"WHEELS={given}: no such directory; expected one with .whl files")
        return Path(given).resolve()
    names = (find_links or "").split() if flavour == "cpu" else []
    return next((Path(name).resolve() for name in names if Path(name).is_dir()), None)


def host_part(
    to: Path, environ: Mapping[str, str], certificates: Path | None, wheels: Path | None, flavour: str
) -> list[str]:
    """Fill the directory `to`, which the build sees as /mnt; Apptainer's options for it."""
    if to.exists():
        shutil.rmtree(to)
    (to / "wheels").mkdir(parents=True)
    settings = {name: environ[name] for name in (*PROXIES, *PIP_SETTINGS) if environ.get(name)}
    if certificates is not None:
        shutil.copyfile(certificates, to / "certificates.crt")
        settings |= dict.fromkeys(image_checks.CERTIFICATE_VARIABLES, "/mnt/certificates.crt")
    options = ["--bind", f"{to}:/mnt:ro"]
    if wheels is not None:
        for wheel in sorted(wheels.glob("*.whl")):
            _link_or_copy(wheel, to / "wheels" / wheel.name)
        settings["PIP_FIND_LINKS"] = "/mnt/wheels"
    if flavour == "cpu" and not any((to / "wheels").glob("torch-*+cpu-*.whl")):
        settings["PIP_EXTRA_INDEX_URL"] = f"{settings.get('PIP_EXTRA_INDEX_URL', '')} {CPU_WHEELS}".strip()
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in settings.items()]
    (to / "build-env.sh").write_text("".join(lines))
    return options


def _link_or_copy(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError:
        shutil.copyfile(path, to)


def debian_mirror() -> str | None:
    """The mirror in this machine's own apt sources, where it has any."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
        return next((line for line in lines if line.rstrip("/").endswith("/debian")), None)
    return None


def make_tree(suite: str, work: Path, epoch: int) -> Path:
    """A minimal Debian tree, made once and kept.

    Raises:
        RunError: mmdebstrap failed.
    """
    tree = work / f"base-{suite}"
    if tree.is_dir():
        return tree
    archive, log = work / f"base-{suite}.tar", work / f"base-{suite}.log"
    command = ["mmdebstrap", "--variant=minbase", suite, str(archive), *filter(None, [debian_mirror()])]
    if os.geteuid() != 0:
        command.insert(1, "--mode=unshare")
    with log.open("w") as stream:
        environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch)} if epoch else None
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False, env=environment)
    if done.returncode != 0:
        raise RunError(f"mmdebstrap could not make a tree of Debian {suite}; the end of {log}:\n{_last_lines(log)}")
    half = work / f"base-{suite}.new"
    if half.exists():
        shutil.rmtree(half)
    half.mkdir()
    # As the user's own files, whoever owns them inside, and without device nodes, which a user cannot make.
    subprocess.run(["tar", "--no-same-owner", "--exclude=./dev/*", "-xf", archive, "-C", half], check=True)
    archive.unlink()
    half.rename(tree)
    return tree


# --- building ---------------------------------------------------------------------------------------------------


class Stages:
    """Says where the build is: a line a stage, and every ten seconds how far it has come."""

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
        RunError: it failed; with what that means, where the log tells.
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
    """What a failed build's log means, and its last lines."""
    text = log.read_text(errors="replace")
    meaning = next((said for pattern, said in MEANINGS if re.search(pattern, text)), "")
    return f"{meaning}\nThe end of {log}:\n{_last_lines(log)}"


def _last_lines(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"    {line[:300]}" for line in lines[-LAST_LINES:])


def content_sha256(image: Path) -> str:
    """sha256 of the image's file system alone, without the SIF's own header with its times and ids."""
    listing = subprocess.run(["apptainer", "sif", "list", image], capture_output=True, text=True, check=True).stdout
    for row in listing.splitlines():
        match = re.search(r"\|(\d+)-(\d+)\s*\|FS \(Squashfs", row)
        if match:
            return _sha256(image, int(match.group(1)), int(match.group(2)))
    raise RunError(f"{image}: `apptainer sif list` shows no squashfs in it; is it damaged? Build it again")


def _sha256(path: Path, start: int = 0, end: int | None = None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(start)
        left = (path.stat().st_size if end is None else end) - start
        while left > 0 and (block := stream.read(min(left, 1 << 22))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def sidecar(image: Path) -> Path:
    """Where the facts on an image lie."""
    return image.with_name(image.name + ".json")


def read_built(image: Path) -> Built | None:
    """The facts on the image at this path; None: there is none, or it is not the file that they were written for."""
    try:
        facts = Built(**json.loads(sidecar(image).read_text()))
        status = image.stat()
    except (OSError, ValueError, TypeError):
        return None
    return facts if (status.st_size, status.st_mtime_ns) == (facts.bytes, facts.modified_ns) else None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One build at a time in a checkout."""
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
    """What `make sif` can be told."""

    flavour: str = "cuda"
    base: str | None = None  # None: a Debian image of a registry; tree; a directory or image; a registry's name
    out: Path = Path("nanogpt.sif")
    wheels: str | None = None
    work: Path = Path("build/sif")
    compression: str = COMPRESSION
    test: bool = True


def machine_checks(options: Options, environ: Mapping[str, str]) -> list[image_checks.Check]:
    """All that is looked at before a build."""
    temporary, cache = image_checks.temporary_directory(environ), image_checks.cache_directory(environ)
    scratch = "Point it at scratch: export APPTAINER_TMPDIR=/scratch/$USER/tmp (make the directory first)."
    checks = [
        image_checks.check_apptainer(),
        image_checks.check_squashfs_tools(),
        image_checks.check_privileges(),
        image_checks.check_base(options.base or REGISTRY_BASES[options.flavour]),
        image_checks.check_space(
            "APPTAINER_TMPDIR", temporary, image_checks.TEMPORARY_NEEDED[options.flavour], scratch
        ),
        image_checks.check_space(
            "image",
            options.out.absolute().parent,
            image_checks.IMAGE_NEEDED[options.flavour],
            "Choose another place: make sif OUT=DIR/nanogpt.sif.",
        ),
        image_checks.check_certificates(image_checks.certificate_authority(environ, pip_setting("cert"))),
    ]
    if options.base is None or not (options.base == "tree" or options.base.startswith(("/", "."))):
        way_out = "Point it at scratch: export APPTAINER_CACHEDIR=/scratch/$USER/apptainer."
        checks.append(image_checks.check_space("APPTAINER_CACHEDIR", cache, 500_000_000, way_out))
    return checks


def build(root: Path, options: Options, environ: Mapping[str, str]) -> Built:
    """Make the image, unless it is there already.

    Raises:
        InputError: the machine cannot, or an option is wrong; every failed check is said.
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
        base_name = options.base or REGISTRY_BASES[options.flavour]
        key = hashlib.sha256(
            "\0".join([files, options.flavour, base_name, options.compression, str(source.clean)]).encode()
        ).hexdigest()
        built = read_built(out)
        if built is not None and built.key == key:
            say(
                f"{options.out} is there already; nothing that goes into it has changed since commit {built.commit[:12]}"
            )
            return built

        checks = machine_checks(options, environ)
        for check in checks:
            say(check.line())
        if any(check.status == "failed" for check in checks):
            raise InputError("The image cannot be built here as it stands; see above what to do.")

        base: Path | str = base_name
        if base_name == "tree":
            say("    0 s  Debian tree")
            base = make_tree(SUITES[options.flavour], options.work, source.epoch).absolute()
        elif base_name.startswith(("/", ".")):
            base = Path(base_name).absolute()
        authority = image_checks.certificate_authority(environ, pip_setting("cert"))
        wheels = wheel_directory(options.wheels, options.flavour, pip_setting("find-links"))
        host = (work / "host").absolute()
        binds = host_part(host, environ, authority[0] if authority else None, wheels, options.flavour)
        arguments = build_arguments(options.flavour, base, source, lock_path, lock)

        new = out.with_name(out.name + ".new")
        out.parent.mkdir(parents=True, exist_ok=True)
        squash = f"{options.compression} -no-xattrs"
        command = ["apptainer", "build", "--force", "--notest", "--mksquashfs-args", squash, *binds]
        if os.geteuid() != 0:
            command.append("--fakeroot")
        for name, value in arguments.items():
            command += ["--build-arg", f"{name}={value}"]
        stages = Stages(len(locked_versions(lock.decode())))
        kept = (*PASSED_ON, *PROXIES)
        environment = {name: value for name, value in environ.items() if name in kept or name.startswith("APPTAINER_")}
        # mksquashfs takes it for its own time, and for that of every file that is newer.
        environment["SOURCE_DATE_EPOCH"] = str(source.epoch)
        temporary = image_checks.temporary_directory(environ)
        temporary.mkdir(parents=True, exist_ok=True)
        environment["APPTAINER_TMPDIR"] = str(temporary)
        try:
            run_apptainer([*command, str(new), DEFINITION], work / "stage", work / "build.log", environment, stages)
            stages.enter("hashes")
            status = new.stat()
            facts = Built(
                key=key,
                sha256=_sha256(new),
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
                test(new)
            new.replace(out)
        finally:
            new.unlink(missing_ok=True)
            shutil.rmtree(host, ignore_errors=True)
        sidecar(out).write_text(json.dumps(asdict(facts), indent=1) + "\n")
    say(f"{options.out}: {human_bytes(facts.bytes)}, built in {facts.seconds:.0f} s")
    say(f"file    sha256 {facts.sha256}")
    say(f"content sha256 {facts.content_sha256}")
    return facts


def test(image: Path) -> None:
    """Run the image's own %test.

    Raises:
        RunError: it failed; its output is in the message.
    """
    done = subprocess.run(["apptainer", "test", image], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RunError(f"apptainer test {image} failed with exit code {done.returncode}:\n{done.stdout}{done.stderr}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; its exit code."""
    parser = argparse.ArgumentParser(prog="image_build", description=__doc__.partition("\n")[0])
    parser.add_argument("--flavour", choices=FLAVOURS, default="cuda")
    parser.add_argument("--base", help="tree, a directory, an image or a registry's name; a Debian image by default")
    parser.add_argument("--out", type=Path, default=Path("nanogpt.sif"))
    parser.add_argument("--wheels", help="directory with wheels that pip may use too")
    parser.add_argument("--work", type=Path, default=Path("build/sif"))
    parser.add_argument("--compression", default=COMPRESSION, help="arguments for mksquashfs")
    parser.add_argument("--check", action="store_true", help="look whether this machine can build, and no more")
    arguments = parser.parse_args(argv)
    options = Options(
        flavour=arguments.flavour,
        base=arguments.base or None,
        out=arguments.out,
        wheels=arguments.wheels or None,
        work=arguments.work,
        compression=arguments.compression,
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
        say("make sif: interrupted; nothing was left behind but the log")
        return 130
    print(json.dumps({"image": str(options.out), **asdict(built)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
