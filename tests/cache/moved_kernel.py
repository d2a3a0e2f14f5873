"""Compiles a Triton kernel, and again with its cache unpacked elsewhere; prints how many were compiled each time.

python tests/cache/moved_kernel.py DIR
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from double_kernel import compile_for
from tiny_runs import tiny_spec

from nanogpt.cache.compile_cache import compiled_code_of
from nanogpt.cache.pack import Pack, write_pack
from nanogpt.cache.tuning import kernels_counted
from nanogpt.launch.world import join_world
from nanogpt.training.compilation import compile_counts

place = Path(sys.argv[1])


def kernels_compiled(root: Path) -> int:
    """Ask for the kernel with this directory of compiled code."""
    before = compile_counts().kernels_compiled
    with join_world(tiny_spec()) as world, compiled_code_of(root, world), kernels_counted():
        kernel = compile_for(64)
    assert len(kernel.asm["cubin"]) > 1000 and "ptx" not in kernel.asm
    return compile_counts().kernels_compiled - before


found = [kernels_compiled(place / "one")]
write_pack(place / "kept", place / "one", key={}, key_sha256="", recipe="")
shutil.rmtree(place / "one")
Pack(place / "kept").unpack(place / "other")
found.append(kernels_compiled(place / "other"))
print(*found)
