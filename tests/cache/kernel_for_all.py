"""Compiles Triton kernels in several processes at once; prints how many compilations there were in all.

python tests/cache/kernel_for_all.py DIR KERNELS PROCESSES
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.synchronize import Barrier

from double_kernel import compile_for

from nanogpt.cache.tuning import kernels_counted
from nanogpt.training.compilation import compile_counts

directory, kernels, processes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


def work(together: Barrier, counts: multiprocessing.SimpleQueue[int]) -> None:
    with kernels_counted():
        for power in range(kernels):
            together.wait()
            assert len(compile_for(64 << power).asm["cubin"]) > 1000
    counts.put(compile_counts().kernels_compiled)


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
