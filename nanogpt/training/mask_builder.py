"""The canonical mask (`nanogpt.data.canonical_mask`), built by a separate process during training."""

from __future__ import annotations

import mmap
import os
import subprocess

import numpy as np

from nanogpt.console import say
from nanogpt.data.canonical_mask import Mask, build
from nanogpt.launch.tied import tied_command


class MaskBuilder:
    """A process that starts building GPT-2's mask, (rows, rows / 8) bytes; it ends with this one at the latest."""

    def __init__(self, rows: int):
        descriptor = os.memfd_create("canonical-mask")
        try:
            os.ftruncate(descriptor, rows * rows // 8)
            self._mask = np.frombuffer(mmap.mmap(descriptor, 0), dtype=np.uint8).reshape(rows, -1)
            command = tied_command("nanogpt.data.canonical_mask", str(descriptor), str(rows))
            self._process = subprocess.Popen(
                command, pass_fds=[descriptor], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        finally:
            os.close(descriptor)

    @property
    def is_done(self) -> bool:
        """Whether the mask is there without waiting."""
        return self._process.poll() == 0

    def wait(self) -> Mask:
        """The mask, once it is done; if the process failed, it is built here. Raises `RunError` as `build`."""
        if code := self._process.wait():
            say(f"The process building the canonical mask ended with exit code {code}: building it again")
            self._mask[:] = 0
            build(self._mask)
        return self._mask

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
