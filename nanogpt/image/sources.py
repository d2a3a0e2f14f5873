"""What an image is made of: the checkout's files, and what the build needs from this machine while it runs.

Standard library only: see `nanogpt.image.build`.
"""

from __future__ import annotations

import configparser
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
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nanogpt import __version__
from nanogpt.errors import InputError, RunError
from nanogpt.image import build_checks

SOURCES = ("containers", "nanogpt", "recipes", "pyproject.toml", "README.md", "LICENSE")
SHOWN_PACKAGES = ("torch", "triton", "flash-attn-4", "nvidia-cutlass-dsl", "nvidia-nccl-cu13", "nvidia-cudnn-cu13")
PIP_CONF = Path("/etc/pip.conf")
LAST_LINES = 15
UMASK = 0o022  # for everything that makes the image's files: they do not depend on the builder's own
PIP_SETTINGS = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_DEFAULT_TIMEOUT", "PIP_PROXY")
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
DEFINITION = "containers/nanogpt.def"


@dataclass
class Source:
    """What goes into the image, and from which commit."""

    commit: str = "unknown"
    clean: bool | None = None  # None: not a git checkout
    epoch: int = 0  # seconds since 1970, of the commit
    files: list[str] = field(default_factory=list)
    url: str = "unknown"  # of the repository, as a browser opens it


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
        url=public_url(_git(root, "config", "--default", "", "remote.origin.url").strip()),
    )


def public_url(remote: str) -> str:
    """The address of a git remote without user and password; "unknown" for a directory or for none.

    "git@host:me/repo.git" -> "https://host/me/repo".
    """
    match = re.fullmatch(
        r"(?:(?:https?|ssh|git)://(?:[^@/]*@)?|[^@/:]+@)([\w.-]+)(?::\d+(?=/))?[:/](.+?)(?:\.git)?/?", remote
    )
    return f"https://{match.group(1)}/{match.group(2).lstrip('/')}" if match else "unknown"


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "safe.directory=*", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        raise RunError(f"{root}: git cannot tell what is in the checkout: {str(detail).strip()}") from error


def stage(root: Path, source: Source, to: Path) -> str:
    """Copy the source's files to the directory `to`, made anew; returns a hash of their paths, modes and contents."""
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


def stage_compiled(given: str | None, to: Path, torch: str) -> str:
    """Copy the cache files named in `given`, separated by spaces, to the directory `to`; returns a hash of them.

    Raises `InputError` for one that is missing or damaged, that others may write, or that was made with another PyTorch
    than `torch`. Whether it comes from the image's own code is checked in the image.
    """
    to.mkdir(exist_ok=True)
    to.chmod(0o755)
    digest = hashlib.sha256()
    for path in map(Path, (given or "").split()):
        try:
            content, status = path.read_bytes(), path.stat()
        except OSError as error:
            raise InputError(f"CACHE={path}: {error.strerror}; `nanogpt warm` makes such files") from error
        first, _, rest = content.partition(b"\n")
        if path.suffix != ".compiled" or hashlib.sha256(rest).hexdigest() != first[-64:].decode(errors="replace"):
            raise InputError(f"CACHE={path}: not a file of compiled code, or damaged; `nanogpt warm` makes one")
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
            raise InputError(f"CACHE={path}: its code would run, but others own or may write it; make your own")
        made_with = str(json.loads(rest.partition(b"\n")[0])["key"]["torch"][0])
        if made_with.partition("+")[0] != torch.partition("+")[0]:
            raise InputError(f"CACHE={path}: made with PyTorch {made_with}, but the image has {torch}")
        (to / path.name).write_bytes(content)
        (to / path.name).chmod(0o644)
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def locked_versions(lock: str) -> dict[str, str]:
    """Package -> version, from a lock file's text."""
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s\\;]+)", lock, re.MULTILINE))


def build_arguments(
    root: Path,
    flavour: str,
    base: Path | str,
    source: Source,
    lock_path: str,
    lock: bytes,
    kernels: str = "all",
) -> dict[str, str]:
    """Values for the definition's arguments; `root` is the checkout, or its staged copy."""
    versions = locked_versions(lock.decode())
    local = isinstance(base, Path)
    created = datetime.datetime.fromtimestamp(source.epoch, datetime.timezone.utc)  # noqa: UP017
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {
        "BOOTSTRAP": "localimage" if local else "docker",
        "BASE": str(base),
        "FLAVOUR": flavour,
        "LOCK": lock_path,
        "KERNELS": kernels,
        "LOCK_SHA256": hashlib.sha256(lock).hexdigest(),
        "VERSION": __version__,
        "VERSIONS": " ".join(f"{name}={versions[name]}" for name in SHOWN_PACKAGES if name in versions),
        "COMMIT": source.commit,
        "CLEAN": "unknown" if source.clean is None else str(source.clean).lower(),
        "CREATED": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "EPOCH": str(source.epoch),
        "SOURCE": source.url,
        "LICENSES": project["license"],
        "AUTHORS": ", ".join(author["name"] for author in project["authors"]),
        "BASE_NAME": base.name if isinstance(base, Path) else base,
    }


def quoted(text: str) -> str:
    """As one value where Apptainer splits an option at commas."""
    return '"' + text.replace('"', '""') + '"'


# --- the host's part --------------------------------------------------------------------------------------------


def pip_files(environ: Mapping[str, str]) -> list[Path]:
    """Where pip looks for its configuration, the system's first; a later file wins.

    pip itself may be missing, and `pip config get` reads only one of the files.
    """
    named = environ.get("PIP_CONFIG_FILE", "")
    if named == os.devnull:
        return []
    home = Path(environ.get("HOME") or "/")
    system = reversed((environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":"))
    own = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    files = [*(Path(directory, "pip/pip.conf") for directory in system), PIP_CONF]
    files += [home / ".pip/pip.conf", own / "pip/pip.conf", Path(sys.prefix, "pip.conf")]
    return [*files, Path(named)] if named else files


def pip_setting(name: str, environ: Mapping[str, str]) -> str | None:
    """A setting of `pip install`, such as find-links: from its variable, else from pip's configuration files."""
    variable = environ.get("PIP_" + name.upper().replace("-", "_"))
    if variable:
        return variable
    found: dict[str, str] = {}
    for file in pip_files(environ):
        parser = configparser.RawConfigParser()
        with contextlib.suppress(OSError, ValueError, configparser.Error):
            parser.read(file, encoding="utf-8")
            found |= {section: parser[section][name] for section in parser.sections() if name in parser[section]}
    return found.get("install") or found.get("global")


def pip_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables for the build's pip: which indexes there are and how to reach them, without those of local files."""
    found = {}
    for variable in PIP_SETTINGS:
        value = pip_setting(variable.removeprefix("PIP_").lower().replace("_", "-"), environ) or ""
        words = [word for word in value.split() if not word.startswith(("file:", "/"))]
        if words:
            found[variable] = " ".join(words)
    return found


def wheel_directory(given: str | None, flavour: str, find_links: str | None) -> Path | None:
    """A directory of wheels for pip: the one given, else for the CPU flavour one that pip's settings name.

    Raises:
        InputError: the one given is not a directory.
    """
    if given:
        if not Path(given).is_dir():
            raise InputError(f"WHEELS={given}: no such directory; expected one with .whl files")
        return Path(given).resolve()
    names = (find_links or "").split() if flavour == "cpu" else []
    return next((Path(name).resolve() for name in names if Path(name).is_dir()), None)


def host_part(to: Path, environ: Mapping[str, str], certificates: Path | None, wheels: Path | None) -> list[str]:
    """Fill the directory `to`, which the build sees as /mnt; returns Apptainer's options for it."""
    if to.exists():
        shutil.rmtree(to)
    (to / "wheels").mkdir(parents=True)
    settings = {name: environ[name] for name in PROXIES if environ.get(name)} | pip_settings(environ)
    if certificates is not None:
        shutil.copyfile(certificates, to / "certificates.crt")
        settings |= dict.fromkeys(build_checks.CERTIFICATE_VARIABLES, "/mnt/certificates.crt")
    options = ["--mount", f"type=bind,{quoted(f'src={to}')},dst=/mnt,ro"]  # --bind takes neither colon nor comma
    if wheels is not None:
        for wheel in sorted(wheels.glob("*.whl")):
            _link_or_copy(wheel, to / "wheels" / wheel.name)
        settings["PIP_FIND_LINKS"] = "/mnt/wheels"
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in settings.items()]
    (to / "build-env.sh").write_text("".join(lines))
    return options


def _link_or_copy(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError:
        shutil.copyfile(path, to)


def debian_mirror() -> str | None:
    """The mirror in this machine's own apt sources, if it has any."""
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
        done = subprocess.run(
            command, stdout=stream, stderr=subprocess.STDOUT, check=False, env=environment, umask=UMASK
        )
    if done.returncode != 0:
        raise RunError(
            f"mmdebstrap could not make a tree of Debian {suite}. The end of {log}:\n{last_lines(log)}\n"
            "Without BASE=tree the base comes from a registry; BASE=DIRECTORY|IMAGE takes an existing one."
        )
    half = work / f"base-{suite}.new"
    if half.exists():
        shutil.rmtree(half)
    half.mkdir()
    half.chmod(0o755)
    # As the user's own files, whoever owns them inside, and without device nodes, which a user cannot make.
    unpack: list[str | Path] = ["tar", "--no-same-owner", "--exclude=./dev/*", "-xf", archive, "-C", half]
    subprocess.run(unpack, check=True, umask=UMASK)
    archive.unlink()
    half.rename(tree)
    return tree


def last_lines(log: Path) -> str:
    """The end of a log, indented."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"    {line[:300]}" for line in lines[-LAST_LINES:])
