"""A run is written by one process at a time, on any host: the writer holds its claim.

- A claim is a numbered file in `RUN/.claims`; the highest number counts, and none is ever deleted. It appears complete
  by a hard link, which exactly one process wins on local disks, NFS and Lustre alike; no file system lock is needed. To
  take a claim over is to link the next number: if two find the same owner gone, one gets it.
- The claim of a holder that is gone from this host is taken over at once, and so is that of the earlier start of a
  requeued Slurm job. If a holder cannot be asked (another host or process namespace), the file's time is watched:
  holders renew it every `BEAT_S`, and one that has not for `WATCH_S` is gone.
- Should it come back after all (it was stopped, or cut off), it finds a higher number at its next beat, and ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import AwareDatetime, ValidationError

from nanogpt.console import say
from nanogpt.errors import InputError, Interrupted, RunError
from nanogpt.files import open_regular, read_regular
from nanogpt.runs.directory import write_whole
from nanogpt.runs.provenance import slurm_job
from nanogpt.runs.record import Part, Process, Slurm, process_lives, this_process, utc_now

CLAIMS_NAME = ".claims"
BEAT_S = 10.0
WATCH_S = 45.0
_POLL_S = 0.5
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class ClaimFile(Part):
    """The contents of a claim."""

    process: Process
    slurm: Slurm | None = None
    time: AwareDatetime
    released: bool = False


class RunClaim:
    """A context manager; a second one of the same process and run is part of the first.

    Args:
        run_path: the run's directory.
        asked: polled while another holder is watched; says why to give up.

    Raises, on entering:
        InputError: another process holds the run.
        RunError: the claim cannot be written.
        Interrupted: by `asked`.
    """

    def __init__(self, run_path: Path, asked: Callable[[], str | None] = lambda: None):
        self._run = run_path
        self._folder = run_path / CLAIMS_NAME
        self._asked = asked
        self._own = ClaimFile(process=this_process(), slurm=slurm_job(os.environ), time=utc_now())
        self._number: int | None = None
        self._over = threading.Event()

    def __enter__(self) -> RunClaim:
        try:
            self._folder.mkdir(exist_ok=True)
            self._number = self._take()
        except OSError as error:
            raise RunError(
                f"{self._folder}: the run cannot be claimed: {error.strerror}. Free space or repair the file system,"
                " then resume the run"
            ) from error
        if self._number is not None:
            threading.Thread(target=self._beat, name="claim", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._number is not None:
            self._own.released = True
            with contextlib.suppress(OSError):  # others will find out
                write_whole(self._path(self._number), self._own.model_dump_json())
            self._number = None

    def _take(self) -> int | None:
        """The number of the claim that is now this process's; None: it already has one."""
        while True:
            number = self._newest()
            holder = self._read(number) if number else None
            if holder and holder.process == self._own.process and not holder.released:
                return None
            if (not number or self._free(number, holder)) and self._link(number + 1):
                return number + 1
            time.sleep(_POLL_S / 5)  # another one was faster: see who

    def _free(self, number: int, holder: ClaimFile | None) -> bool:
        """Whether nobody holds the run any more; False: check again. Raises `InputError` if somebody does."""
        if holder is not None:
            if holder.released:
                return True
            lives = process_lives(holder.process)
            if lives is not None:
                return not lives or self._refuse(number, holder)
            here, there = self._own.slurm, holder.slurm
            same_job = here and there and (here.job_id, here.cluster) == (there.job_id, there.cluster)
            if here and there and same_job and here.restart_count > there.restart_count:
                return True
        say(f"{self._run}: {_who(holder)} holds or held it, and cannot be asked from here: watching for {WATCH_S:g} s")
        seen, until = self._state(number), time.monotonic() + WATCH_S
        while time.monotonic() < until:
            time.sleep(_POLL_S)
            if reason := self._asked():
                raise Interrupted(f"{reason}: the run was not resumed; resume it again")
            now = self._state(number)
            if self._newest() != number or (now != seen and (again := self._read(number)) and again.released):
                return False
            if now != seen:
                return self._refuse(number, holder)
        say(f"{self._run}: no sign of life: taking it over")
        return True

    def _refuse(self, number: int, holder: ClaimFile | None) -> bool:
        process = None if holder is None else holder.process
        end = "" if process is None else f" (kill {process.pid})"
        raise InputError(
            f"{self._run}: {_who(holder)} is still writing it, and two would corrupt its files ({self._path(number)})."
            f" End that one first{end}, or start a new run"
        )

    def _link(self, number: int) -> bool:
        """Create claim `number`; returns whether this process did. Raises OSError."""
        text = self._own.model_dump_json().encode()
        path, new = self._path(number), self._folder / f".new-{secrets.token_hex(8)}"
        try:
            with new.open("wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            try:
                path.hardlink_to(new)
            except FileExistsError:
                return new.stat().st_nlink == 2  # an NFS server may answer a repetition of what it already did
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return _create(path, text)
        finally:
            new.unlink(missing_ok=True)
        return True

    def _beat(self) -> None:
        assert self._number is not None
        path = self._path(self._number)
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(path)
            with contextlib.suppress(OSError):
                number = self._newest()
                if number > self._number and not self._over.is_set():
                    say(
                        f"{self._run}: {_who(self._read(number))} took the run over, as this process gave no sign"
                        " of life; this process ends now, and writes nothing more"
                    )
                    os._exit(RunError.exit_code)

    def _newest(self) -> int:
        numbers = [int(path.stem) for path in self._folder.glob("*.json") if path.stem.isdigit()]
        return max(numbers, default=0)

    def _read(self, number: int) -> ClaimFile | None:
        """None: it is unreadable, or not yet written."""
        try:
            return ClaimFile.model_validate_json(read_regular(self._path(number)))
        except (OSError, ValidationError):
            return None

    def _state(self, number: int) -> tuple[int, int] | None:
        """Opened anew each time, which makes NFS ask its server."""
        try:
            with open_regular(self._path(number)) as file:
                status = os.fstat(file.fileno())
                return status.st_mtime_ns, status.st_ino
        except OSError:
            return None

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.json"


def _create(path: Path, text: bytes) -> bool:
    """For file systems without hard links; a reader may find it empty, and then watches it."""
    try:
        with path.open("xb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def _who(holder: ClaimFile | None) -> str:
    if holder is None:
        return "an unknown process"
    job = f" (Slurm job {holder.slurm.job_id})" if holder.slurm else ""
    return f"process {holder.process.pid} on {holder.process.host}{job}"
