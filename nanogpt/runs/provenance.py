"""The origin of a run's code, packages, container and job, for strangers to see.

Everything is looked up when a function is called, nothing at import. No torch is needed here.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from nanogpt import __version__
from nanogpt.image.labels import CLEAN_LABEL, REVISION_LABEL, inside_base, inside_labels, known_sha256
from nanogpt.runs.record import Code, Container, Slurm

CHANGED_FILES = 100  # named at most
PACKAGES = ("torch", "triton", "flash-attn", "flash-attn-3", "flash-attn-4", "numpy")
RULE = "=" * 100  # the leaderboard's rule between the parts of a log
INSIDE = Path("/.singularity.d")


def package_versions() -> dict[str, str | None]:
    """Versions of Python, the platform and the packages that decide speed and result; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


# --- code -------------------------------------------------------------------------------------------------------


def package_directory() -> Path:
    """The directory of the package's modules."""
    return Path(__file__).parents[1]


def code_state(container: Container | None = None) -> Code:
    """The installed code, from git in a checkout, else from the `container`'s labels, and always by its hash.

    The labels describe the code that the image was built with, not code that NANOGPT_SRC names.
    """
    code = Code(package_version=__version__, source_sha256=source_sha256())
    root = package_directory().parent
    if (root / ".git").exists():
        try:
            code.commit = _git(root, "rev-parse", "HEAD").strip()
            status = _git(root, "status", "--porcelain").splitlines()
            code.clean, code.changed_files = not status, [line[3:] for line in status[:CHANGED_FILES]]
        except (OSError, subprocess.SubprocessError):  # such as no git in an image
            code.commit = _commit_without_git(root / ".git")
    elif container is not None and root.is_relative_to(sys.prefix):
        commit = container.labels.get(REVISION_LABEL)
        code.commit = commit if commit != "unknown" else None
        code.clean = {"true": True, "false": False}.get(container.labels.get(CLEAN_LABEL, ""))
    return code


def _commit_without_git(directory: Path) -> str | None:
    """The commit checked out according to .git; None: unknown."""
    try:
        head = (directory / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (directory / name).is_file():
            return (directory / name).read_text(encoding="utf-8").strip()
        lines = (directory / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next((line.split()[0] for line in lines if line.endswith(f" {name}")), None)
    except (OSError, UnicodeDecodeError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout


def source_sha256(directory: Path | None = None) -> str:
    """sha256 over path and content of every .py file of the package (or of `directory`), in the order of the paths."""
    directory = directory or package_directory()
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(directory).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


@functools.cache
def training_sources() -> tuple[Path, ...]:
    """The package's modules that `nanogpt train` may import, in the order of their paths.

    Found by following import statements, including those inside functions, from the command.
    """
    package = package_directory()
    found: set[Path] = set()
    todo = [f"{package.name}.cli.train", f"{package.name}.__main__"]
    while todo:
        name = todo.pop()
        path = _module_path(package, name)
        if path is None or path in found:
            continue
        found.add(path)
        parents = name.split(".")[:-1]
        todo += [".".join(parents[: depth + 1]) for depth in range(len(parents))]
        todo += _imported(path, package.name)
    return tuple(sorted(found))


def _module_path(package: Path, name: str) -> Path | None:
    place = package.parent.joinpath(*name.split("."))
    candidates = (place / "__init__.py", place.with_suffix(".py"))
    return next((path for path in candidates if path.is_file()), None)


def _imported(path: Path, package: str) -> Iterator[str]:
    """Possible modules of the package named in the file's import statements."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(f"{package}."):
            yield node.value.partition(":")[0]  # a line of a registry
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == package)


def source_text(paths: Iterable[Path]) -> str:
    """The files, each below a line with its name, length and sha256."""
    root = package_directory().parent
    parts = []
    for path in paths:
        content = path.read_bytes()
        name, lines = path.relative_to(root).as_posix(), content.count(b"\n")
        parts.append(f"{RULE}\n{name}: {lines} lines, sha256 {hashlib.sha256(content).hexdigest()}\n{RULE}\n")
        parts.append(content.decode("utf-8"))
    return "".join(parts)


# --- where it runs ----------------------------------------------------------------------------------------------


def slurm_job(environ: Mapping[str, str]) -> Slurm | None:
    """The Slurm job that `environ` describes; None outside one."""
    if not environ.get("SLURM_JOB_ID"):
        return None
    get = environ.get
    restarts = get("SLURM_RESTART_COUNT", "0")
    return Slurm(
        job_id=environ["SLURM_JOB_ID"],
        array_job_id=get("SLURM_ARRAY_JOB_ID"),
        array_task_id=get("SLURM_ARRAY_TASK_ID"),
        job_name=get("SLURM_JOB_NAME"),
        cluster=get("SLURM_CLUSTER_NAME"),
        partition=get("SLURM_JOB_PARTITION"),
        node_list=get("SLURM_JOB_NODELIST"),
        restart_count=int(restarts) if re.fullmatch("[0-9]{1,9}", restarts) else 0,
    )


def container_of(environ: Mapping[str, str], inside: Path = INSIDE) -> Container | None:
    """The Apptainer image that `environ` names, with its labels; None outside one.

    Its hash is NANOGPT_SIF_SHA256, else what `make sif` left beside the file, if that is visible from inside.
    """
    image = environ.get("APPTAINER_CONTAINER") or environ.get("SINGULARITY_CONTAINER")
    if not image:
        return None
    return Container(
        image=image,
        sha256=environ.get("NANOGPT_SIF_SHA256") or known_sha256(Path(image)),
        labels=inside_labels(inside),
        base=inside_base(inside),
    )


def driver_version() -> str | None:
    """The NVIDIA driver's version; None if there is none."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").partition("\n")[0]
    except OSError:
        return None
    words = line.split()
    return next((word for word in words if word[0].isdigit() and "." in word), None)
