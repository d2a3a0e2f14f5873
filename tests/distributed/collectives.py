"""Run by torchrun: every collective of a Communicator against what it must give, in the dtypes that it meets."""

import torch
import torch.distributed as dist

from nanogpt.optim.communication import Communicator

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
communicator = Communicator(rank, size)


def of_rank(r: int, dtype: torch.dtype) -> torch.Tensor:
    """(8, 3) small integers, which no dtype rounds, other ones on every rank."""
    return (torch.arange(24).view(8, 3) % 7 + 2 * r).to(dtype)


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

# Several under way at once, finished in another order.
first, second = of_rank(rank, torch.float32), of_rank(rank + 1, torch.float32)
one, two = communicator.average(first), communicator.average_shard(second)
assert torch.equal(two.wait(), communicator.shard(of_rank(0, torch.float32)) + size + 1)
assert torch.equal(one.wait(), of_rank(0, torch.float32) + size - 1)
assert float(communicator.average(torch.tensor(float(rank))).wait()) == (size - 1) / 2
communicator.barrier()
dist.destroy_process_group()
