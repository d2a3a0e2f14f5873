"""What every Python in the image does first: use other code, move caches out of home, read ahead for PyTorch.

The build puts this into site-packages, with a .pth line that imports it. The host's variables cannot be read
in the definition's %environment: Apptainer clears them before and restores them afterwards.
"""

import os
import stat
import sys

PIECES = "/opt/nanogpt/read-ahead.txt"  # by import_pieces.py
READ_AHEAD = os.path.join(os.path.dirname(__file__), "nanogpt_read_ahead.py")  # noqa: PTH118, PTH120


def start() -> None:
    """Act on NANOGPT_SRC, NANOGPT_FLASH_ATTN and NANOGPT_EXTRA; point libraries' caches away from home."""
    path = []
    source = os.environ.get("NANOGPT_SRC")
    if source:
        if not os.path.isfile(os.path.join(source, "nanogpt", "__init__.py")):  # noqa: PTH113, PTH118
            fail(
                f"NANOGPT_SRC={source}: has no nanogpt/__init__.py, as seen in the container; expected a checkout."
                " A directory outside home and the current one needs --bind."
            )
        path.append(source)
    flash_attention = os.environ.get("NANOGPT_FLASH_ATTN")
    if flash_attention:
        if not os.path.isdir(flash_attention):  # noqa: PTH112
            fail(
                f"NANOGPT_FLASH_ATTN={flash_attention}: no such directory, as seen in the container; expected what"
                " build-flash-attn --out made. It may need --bind."
            )
        path.append(flash_attention)
    sys.path[:0] = path
    extra = os.environ.get("NANOGPT_EXTRA")
    if extra:
        if not is_mine(extra, make=False):
            fail(
                f"NANOGPT_EXTRA={extra}: is not a directory, as seen in the container, or others may"
                " write to it; expected what pip install --target made. It may need --bind, or chmod go-w."
            )
        sys.path.append(extra)  # the image's own packages come first
    cache = os.environ.get("NANOGPT_CACHE")
    if cache and cache != "off":
        os.environ.setdefault("HF_HOME", os.path.join(cache, "huggingface"))  # noqa: PTH118
    if "MPLCONFIGDIR" not in os.environ:
        place = os.path.join(os.environ.get("TMPDIR") or "/tmp", f"nanogpt-matplotlib-{os.getuid()}")  # noqa: PTH118
        if is_mine(place):  # otherwise matplotlib finds one itself
            os.environ["MPLCONFIGDIR"] = place
    sys.meta_path.insert(0, Torch)


def is_mine(place: str, make: bool = True) -> bool:
    """Make a directory that only this user owns, or check that it is: in /tmp another user may have made it first.

    If it need not be made, root's directory will do, and so will a link to one.
    """
    owners = {os.getuid()}
    try:
        if make:
            try:  # noqa: SIM105, as contextlib is not imported yet
                os.mkdir(place, 0o700)  # noqa: PTH102
            except FileExistsError:
                pass
        else:
            owners |= {0, *unknown_root()}
        status = os.lstat(place) if make else os.stat(place)  # noqa: PTH116
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid in owners and not status.st_mode & 0o022


def unknown_root() -> set[int]:
    """The id of root's files in a user namespace without root, such as a container's; otherwise none."""
    try:
        with open("/proc/self/uid_map") as ids, open("/proc/sys/kernel/overflowuid") as overflow:  # noqa: PTH123
            return set() if any(line.split()[1] == "0" for line in ids) else {int(overflow.read())}
    except OSError:
        return set()


class Torch:
    """Comes first among the module finders, to notice an import of PyTorch; finds nothing itself."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        """Begin to read ahead if the module is PyTorch."""
        if name == "torch":
            read_ahead()


def read_ahead() -> None:
    """Start a process that reads what an import of PyTorch will, unless one is running or the files are unpacked.

    The lock on the list holds for all processes of a container, and the kernel drops it with the process. Files in a
    squashfs have one time, the commit's; unpacked ones also that of their unpacking, even if an overlay hides what
    is below. The shell exits at once, so that no child stays behind.
    """
    import fcntl

    try:
        with open(PIECES) as pieces:  # noqa: PTH123
            status = os.fstat(pieces.fileno())
            if status.st_ctime_ns != status.st_mtime_ns:
                return
            fcntl.flock(pieces, fcntl.LOCK_EX | fcntl.LOCK_NB)
            reader = [sys.executable or "python3", "-I", "-S", READ_AHEAD, "3", str(os.getpid())]
            quiet = [(os.POSIX_SPAWN_OPEN, stream, "/dev/null", os.O_RDWR, 0) for stream in (0, 1, 2)]
            kept = (os.POSIX_SPAWN_DUP2, pieces.fileno(), 3)
            shell = os.posix_spawn("/bin/sh", ["sh", "-c", '"$@" &', "sh", *reader], {}, file_actions=[kept, *quiet])
            os.waitpid(shell, 0)
    except OSError:
        pass  # only slower


def fail(message: str) -> None:
    """Exit with the code for wrong input: an exception would only be shown, and the wrong code would run."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()
    os._exit(2)


start()
