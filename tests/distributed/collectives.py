"""Every collective of a Communicator against what it must give, in the dtypes that it meets.

torchrun runs this file on GPUs; the argument is the backend, gloo or nccl.
"""

import os
import sys

import numpy as np
import torch
import torch.distributed as dist

from nanogpt.optim.communication import Communicator
from nanogpt.optim.row_table import TouchedRows, average_touched_shard


def of_rank(r: int, dtype: torch.dtype) -> torch.Tensor:
    """(8, 3) small integers, which no dtype rounds, other ones on every rank."""
    return (torch.arange(24).view(8, 3) % 7 + 2 * r).to(dtype)


def check(backend: str) -> None:
    """Raises AssertionError in the rank that finds something else."""
    torch.set_num_threads(1)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_default_device(device)
    dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    rank, size = dist.get_rank(), dist.get_world_size()
    communicator = Communicator(rank, size)

    for dtype in (torch.float32, torch.bfloat16):
        mean = torch.stack([of_rank(r, torch.float32) for r in range(size)]).mean(0).to(dtype)
        full = of_rank(rank, dtype)
        pending = communicator.average(full)
        assert torch.equal(pending.wait(), mean), "average"
        assert torch.equal(full, mean), "average is in place"
        shard = communicator.average_shard(of_rank(rank, dtype)).wait()
        assert shard.dtype == dtype
        assert torch.equal(shard, communicator.shard(mean)), "average_shard"
        transposed = of_rank(rank, dtype).mT.contiguous().mT  # not contiguous
        assert torch.equal(communicator.average_shard(transposed).wait(), communicator.shard(mean)), "strides"

    for dtype in (torch.float32, torch.bfloat16, torch.int16):
        expected = of_rank(0, dtype)
        scattered = torch.zeros_like(expected)
        communicator.shard(scattered).copy_(communicator.shard(expected))
        assert torch.equal(communicator.gather(scattered).wait(), expected), "gather"
        assert torch.equal(communicator.unshard(communicator.shard(expected).clone()), expected), "unshard"
        tensor = of_rank(rank, dtype)
        communicator.broadcast(tensor)
        assert torch.equal(tensor, of_rank(0, dtype)), "broadcast"

    # Sparse against dense: the same mean of the rows that were touched.
    all_rows, width = 16 * size, 5
    for dtype, allowed in ((torch.float32, 1e-6), (torch.bfloat16, 0.02)):
        rng = np.random.default_rng(0)
        slots = [np.unique(rng.integers(0, all_rows, 3 + slot)) for slot in range(2 * size)]
        slots[1] = np.zeros(0, dtype=np.int64) if size == 2 else slots[1]
        touched = TouchedRows(all_rows, "rows", rank, size, "sparse", device)
        touched.add(slots)
        touched.prepare()
        gradient = torch.zeros(all_rows, width, dtype=dtype)
        for slot in range(rank, len(slots), size):
            for row in slots[slot]:
                generator = torch.Generator("cpu").manual_seed(int(1000 * slot + row))
                gradient[row] += torch.randn(width, generator=generator, device="cpu").to(device, dtype)
        exchange = touched.take()
        assert exchange is not None
        dense = communicator.average_shard(gradient.clone()).wait()
        sparse = average_touched_shard(communicator, gradient, exchange).wait()
        assert sparse.dtype == dtype
        assert (sparse - dense).norm() <= allowed * dense.norm(), "sparse"

    # Several under way at once, finished in another order.
    first, second = of_rank(rank, torch.float32), of_rank(rank + 1, torch.float32)
    one, two = communicator.average(first), communicator.average_shard(second)
    assert torch.equal(two.wait(), communicator.shard(of_rank(0, torch.float32)) + size + 1)
    assert torch.equal(one.wait(), of_rank(0, torch.float32) + size - 1)
    assert float(communicator.average(torch.tensor(float(rank))).wait()) == (size - 1) / 2
    communicator.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    check(sys.argv[1])
