"""Triton kernels that several processes of a job ask for at once: one compiles, the others wait for what it leaves.

The graphs of a recipe's stages are compiled side by side, and two in five of record 92's kernels are in several of
them. Triton looks into its directory first, but its processes get to a kernel at nearly the same time.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from triton.runtime.cache import FileCacheManager

LONGEST_S = 30.0  # that a kernel's compilation is waited for; most take less than one
POLL_S = 0.02


class CompiledOnce(FileCacheManager):
    """Triton's cache in a directory, by TRITON_CACHE_MANAGER; a process claims the kernel that it does not find."""

    def get_group(self, filename: str) -> dict[str, str] | None:
        """The kernel's files, by name; None: this process has to compile it.

        A claim that is older than LONGEST_S, or whose process has gone, counts for nothing.
        """
        claimed = False
        while not (found := super().get_group(filename)):
            if claimed or not self._is_awaited():
                return None
            claimed = self._claims()  # then looks again: another process may just have left it
            if not claimed:
                time.sleep(POLL_S)
        if claimed:
            self._claim.unlink(missing_ok=True)
        return dict(found)

    def put_group(self, filename: str, group: dict[str, str]) -> str:
        """Leave the kernel's files, and give up the claim."""
        path: str = super().put_group(filename, group)
        self._claim.unlink(missing_ok=True)
        return path

    @property
    def _claim(self) -> Path:
        return Path(self.cache_dir, ".claim")  # the number of the process that compiles

    def _claims(self) -> bool:
        try:
            with self._claim.open("x") as claim:
                claim.write(str(os.getpid()))
        except FileExistsError:
            return False
        except OSError:  # a full disk: nobody waits for anybody
            return True
        return True

    def _is_awaited(self) -> bool:
        try:
            age, process = time.time() - self._claim.stat().st_mtime, self._claim.read_text()
        except FileNotFoundError:  # not claimed yet, or given up just now
            return True
        if age > LONGEST_S:
            return False
        try:
            os.kill(int(process or os.getpid()), 0)  # without a number: it is being written
        except OSError:
            return False
        return True
