"""Compiles a Triton kernel, and again with its cache unpacked elsewhere; prints whether each came from the cache.

python tests/cache/moved_kernel.py DIR
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanogpt.cache.pack import Pack, write_pack

place = Path(sys.argv[1])


@triton.jit
def _double_kernel(x, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(x + at, 2 * tl.load(x + at))


def from_cache(root: Path) -> bool:
    """Whether a kernel compiled with this directory of compiled code was there already."""
    hits: list[bool] = []
    os.environ["TRITON_CACHE_DIR"] = str(root / "triton")
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    signature = {"x": "*fp32", "n": "constexpr"}
    source = ASTSource(fn=_double_kernel, signature=signature, constexprs={"n": 64})
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert len(kernel.asm["cubin"]) > 1000
    return hits[-1]


found = [from_cache(place / "one")]
write_pack(place / "kept", place / "one", key={}, key_sha256="", recipe="")
shutil.rmtree(place / "one")
Pack(place / "kept").unpack(place / "other")
found.append(from_cache(place / "other"))
print(*found)
