"""Check in seconds whether this machine can build the image, before a build that takes minutes.

Standard library only, like everything that `make sif` runs: a login node has Python and little else.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from nanogpt.console import human_bytes

Status = Literal["passed", "warning", "failed"]
APPTAINER_NEEDED = (1, 2)
SQUASHFS_TOOLS_NEEDED = (4, 5)  # options for the times of files
# Arguments for mksquashfs, chosen by measurement (docs/container.md has the table); some are built without zstd.
COMPRESSIONS = {
    "zstd": "-comp zstd -Xcompression-level 6 -b 256K",
    "gzip": "-comp gzip -Xcompression-level 6 -b 256K",
    "lz4": "-comp lz4 -b 128K",
}
GZIP_PRICE = (
    "The image becomes 3 % larger (CPU flavour: 6 %), and unpacking it, which is most of a start, takes 3.5 times the"
    " CPU time. Put a mksquashfs with zstd on PATH to avoid this."
)
# Free bytes needed: for the tree while it is built, at times twice; and for the image.
TEMPORARY_NEEDED = {"cuda": 14_000_000_000, "cpu": 4_000_000_000}
IMAGE_NEEDED = {"cuda": 3_000_000_000, "cpu": 1_000_000_000}
CAP_SYS_RESOURCE = 24
CERTIFICATE_VARIABLES = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE")


class Check(NamedTuple):
    """The result of one check."""

    name: str
    status: Status
    found: str
    advice: str = ""  # what to do if the check has not passed

    def __str__(self) -> str:
        """On one line, for a job's log."""
        return f"{self.status:<8}{self.name}: {self.found}" + (f". {self.advice}" if self.advice else "")

    def line(self) -> str:
        """As the user sees it, the advice on a line of its own."""
        first = f"{self.status:<8} {self.name}: {self.found}"
        return f"{first}\n         {self.advice}" if self.advice and self.status != "passed" else first


def parse_version(text: str) -> tuple[int, ...] | None:
    """The first dotted number in `text`: "apptainer version 1.4.5-2.el9" -> (1, 4, 5)."""
    match = re.search(r"\d+(\.\d+)+", text)
    return tuple(map(int, match.group().split("."))) if match else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout + done.stderr).strip()


def check_apptainer() -> Check:
    """Apptainer is there and knows build arguments."""
    needed = ".".join(map(str, APPTAINER_NEEDED))
    path = shutil.which("apptainer")
    if path is None:
        also = " There is a singularity, but these builds need Apptainer." if shutil.which("singularity") else ""
        return Check(
            "Apptainer",
            "failed",
            "no apptainer on PATH",
            f"Try `module load apptainer`, or install {needed} or newer: apptainer.org/docs/admin.{also}",
        )
    text = _output(path, "--version") or ""
    version = parse_version(text)
    if version is None:
        return Check("Apptainer", "failed", f"{path} --version says {text[:80]!r}", "Is it broken? Install it again.")
    shown = ".".join(map(str, version))
    if version < APPTAINER_NEEDED:
        return Check(
            "Apptainer",
            "failed",
            shown,
            f"{needed} or newer is needed (build arguments); try `module avail apptainer`.",
        )
    return Check("Apptainer", "passed", shown)


def find_mksquashfs() -> str | None:
    """The path of mksquashfs: on PATH, or where Apptainer also looks."""
    return shutil.which("mksquashfs") or shutil.which("mksquashfs", path="/usr/sbin:/sbin:/usr/libexec/apptainer/bin")


def refusal(mksquashfs: str, compression: str) -> str | None:
    """Why mksquashfs cannot pack with these arguments, tried on an empty directory; None if it can."""
    with tempfile.TemporaryDirectory(prefix="nanogpt-squashfs-") as scratch:
        empty = Path(scratch, "empty")
        empty.mkdir()
        try:
            words = shlex.split(compression)
            command = [mksquashfs, str(empty), str(Path(scratch, "packed")), *words, "-no-xattrs", "-no-progress"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            return str(error)
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return None if done.returncode == 0 else (said[0] if said else f"exit code {done.returncode}")[:200]


def choose_compression(asked: str | None) -> str:
    """Arguments for mksquashfs: those that `asked` gives, by a compressor's name or in full; else zstd, else gzip."""
    if asked:
        return COMPRESSIONS.get(asked, asked)
    mksquashfs = find_mksquashfs()
    usable = [each for each in ("zstd", "gzip") if mksquashfs and refusal(mksquashfs, COMPRESSIONS[each]) is None]
    return COMPRESSIONS[usable[0] if usable else "zstd"]


def check_squashfs_tools(asked: str | None = None) -> Check:
    """mksquashfs is there, new enough for fixed times, and packs with the arguments that the build will give it."""
    path = find_mksquashfs()
    if path is None:
        return Check("mksquashfs", "failed", "not on PATH", "Install squashfs-tools 4.5 or newer, or load its module.")
    version = parse_version((_output(path, "-version") or "").partition("\n")[0])
    shown = ".".join(map(str, version or ("unknown version",)))
    if version is None or version < SQUASHFS_TOOLS_NEEDED:
        return Check("mksquashfs", "failed", shown, "squashfs-tools 4.5 or newer is needed; build on another machine.")
    compression = choose_compression(asked)
    refused = refusal(path, compression)
    if refused:
        advice = "Name another: make sif COMPRESSION=gzip, or mksquashfs's own arguments, beginning with -comp."
        return Check("mksquashfs", "failed", f"{shown}, does not pack with {compression!r}: {refused}", advice)
    if not asked and compression == COMPRESSIONS["gzip"]:
        return Check("mksquashfs", "warning", f"{shown}, built without zstd: gzip is used", GZIP_PRICE)
    return Check("mksquashfs", "passed", f"{shown}, {compression}")


def check_privileges(proc: Path = Path("/proc"), etc: Path = Path("/etc"), user: str | None = None) -> Check:
    """An unprivileged build can become root in a namespace of its own."""
    name = "unprivileged build"
    if user is None:
        user = "root" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    if user == "root":
        mask = re.search(r"^CapEff:\s*([0-9a-f]+)", _read(proc / "self/status"), re.MULTILINE)
        if mask and not int(mask.group(1), 16) >> CAP_SYS_RESOURCE & 1:
            return Check(
                name,
                "failed",
                "root without CAP_SYS_RESOURCE",
                "Build as an ordinary user: runuser -u USER -- make sif.",
            )
        return Check(name, "passed", "root")
    limit = _read(proc / "sys/user/max_user_namespaces").strip()
    allowed = _read(proc / "sys/kernel/unprivileged_userns_clone").strip()
    if limit == "0" or allowed == "0":
        return Check(
            name,
            "failed",
            "user namespaces are switched off on this machine",
            "Ask the administrator for user.max_user_namespaces, or build on a machine that has them.",
        )
    if has_subordinate_ids(etc, user):
        return Check(name, "passed", f"user namespaces, with subordinate ids for {user}")
    if shutil.which("fakeroot"):
        return Check(
            name,
            "warning",
            f"no subordinate ids for {user}; Apptainer uses the fakeroot command",
            f"If the build fails, `make pull` fetches a ready-made image; or ask the administrator for `usermod "
            f"--add-subuids 100000-165535 --add-subgids 100000-165535 {user}`.",
        )
    return Check(
        name,
        "failed",
        f"no ids for {user} in {etc / 'subuid'} and {etc / 'subgid'}, or no newuidmap; and no fakeroot command",
        "`make pull` fetches a ready-made image, or ask the administrator for one of them. The fakeroot command may"
        " come with Apptainer's module.",
    )


def has_subordinate_ids(etc: Path = Path("/etc"), user: str | None = None) -> bool:
    """Whether a user may have more than one id in a namespace."""
    user = user or pwd.getpwuid(os.geteuid()).pw_name
    mapped = all(
        re.search(rf"^({re.escape(user)}|{os.geteuid()}):\d+:\d+", _read(etc / file), re.MULTILINE)
        for file in ("subuid", "subgid")
    )
    return mapped and shutil.which("newuidmap") is not None


def check_space(name: str, directory: Path, needed: int, way_out: str) -> Check:
    """`directory`, or the nearest parent that exists, has `needed` bytes free and can be written to."""
    place = directory
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        return Check(name, "failed", f"{directory}: cannot be written to", way_out)
    free = shutil.disk_usage(place).free
    found = f"{directory}: {human_bytes(free)} free, needed {human_bytes(needed)}"
    return Check(name, "passed" if free >= needed else "failed", found, way_out)


def temporary_directory(environ: Mapping[str, str]) -> Path:
    """Where Apptainer builds."""
    return Path(environ.get("APPTAINER_TMPDIR") or environ.get("TMPDIR") or "/tmp")


def cache_directory(environ: Mapping[str, str]) -> Path:
    """Where Apptainer keeps what it downloads."""
    return Path(environ.get("APPTAINER_CACHEDIR") or Path(environ.get("HOME") or "~").expanduser() / ".apptainer/cache")


def certificate_authority(environ: Mapping[str, str], pip_config: str | None = None) -> tuple[Path, str] | None:
    """The certificate bundle that this machine's settings name, and which setting; not the system's own bundle.

    Only a set variable, or pip's `cert`, says that the network needs one.
    """
    settings = [(name, environ[name]) for name in CERTIFICATE_VARIABLES if environ.get(name)]
    if pip_config:
        settings.append(("pip's configuration, cert", pip_config))
    return next(((Path(value), name) for name, value in settings if value), None)


def check_certificates(found: tuple[Path, str] | None) -> Check:
    """The certificate authority that the settings name can be read."""
    name = "certificates"
    if found is None:
        return Check(name, "passed", "no proxy's certificate authority is set")
    path, setting = found
    if "BEGIN CERTIFICATE" not in _read(path):
        return Check(name, "failed", f"{setting} names {path}, which holds no certificate", "Correct it or unset it.")
    return Check(name, "passed", f"{path} ({setting}), while building only")


def check_base(base: str) -> Check:
    """A local base exists; the tools for making one are there."""
    name = "base"
    if base == "tree":
        if shutil.which("mmdebstrap") is None:
            return Check(
                name,
                "failed",
                "BASE=tree, but there is no mmdebstrap",
                "apt install mmdebstrap, or BASE=DIRECTORY|IMAGE",
            )
        if os.geteuid() != 0 and not has_subordinate_ids():
            return Check(
                name,
                "failed",
                "BASE=tree, but mmdebstrap needs subordinate ids, which this user does not have",
                "Use a registry's base (without BASE), or a tree or image made elsewhere: BASE=DIRECTORY|IMAGE",
            )
        return Check(name, "passed", "a Debian tree made here")
    if base.startswith(("/", ".")):
        if not Path(base).exists():
            return Check(name, "failed", f"{base}: no such directory or image", "BASE=tree makes a Debian tree here.")
        return Check(name, "passed", base)
    return Check(name, "passed", f"{base} from its registry; if that cannot be reached: BASE=tree")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
