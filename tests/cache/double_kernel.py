"""A Triton kernel that is compiled for a GPU without one; imported by scripts that run where Triton is."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel


@triton.jit
def _double_kernel(x, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(x + at, 2 * tl.load(x + at))


def compile_for(n: int) -> CompiledKernel:
    """The kernel for `n` numbers, a power of two."""
    source = ASTSource(fn=_double_kernel, signature={"x": "*fp32", "n": "constexpr"}, constexprs={"n": n})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))
