"""Compiles Triton kernels in several processes at once; prints how many compilations there were in all.

python tests/cache/kernel_for_all.py DIR KERNELS PROCESSES
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.synchronize import Barrier

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

directory, kernels, processes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


@triton.jit
def _double_kernel(x, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(x + at, 2 * tl.load(x + at))


def compile_all(together: Barrier) -> int:
    compiled = 0

    def count(*, cache_hit: bool, **_: object) -> None:
        nonlocal compiled
        compiled += not cache_hit

    triton.knobs.compilation.listener = count
    for power in range(kernels):
        together.wait()
        size = {"n": 64 << power}
        source = ASTSource(fn=_double_kernel, signature={"x": "*fp32", "n": "constexpr"}, constexprs=size)
        kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert len(kernel.asm["cubin"]) > 1000
    return compiled


def work(together: Barrier, counts: multiprocessing.SimpleQueue[int]) -> None:
    counts.put(compile_all(together))


if __name__ == "__main__":
    os.environ["TRITON_CACHE_DIR"] = directory
    context = multiprocessing.get_context("fork")
    together, counts = context.Barrier(processes), context.SimpleQueue()
    workers = [context.Process(target=work, args=(together, counts)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(sum(counts.get() for _ in workers))
