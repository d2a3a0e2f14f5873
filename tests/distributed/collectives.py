"""Every collective of a Communicator against what it must give, in the dtypes that it meets.

torchrun runs this file on GPUs; the argument is the backend, gloo or nccl.
"""

import os
import sys

import numpy as np
import torch
import torch.distributed as dist
from pulls import lists_of

from nanogpt.optim.communication import Communicator, Pending
from nanogpt.optim.optimizer_spec import TableRates
from nanogpt.optim.pull_lists import PullLists
from nanogpt.optim.pulled_table import PulledTable
from nanogpt.optim.row_table import TouchedRows, average_touched_shard


def of_rank(r: int, dtype: torch.dtype) -> torch.Tensor:
    """(8, 3) small integers, which no dtype rounds, other ones on every rank."""
    return (torch.arange(24).view(8, 3) % 7 + 2 * r).to(dtype)


class Noting(Communicator):
    """Notes what `exchange_rows` sends."""

    def __init__(self, rank: int, size: int):
        super().__init__(rank, size)
        self.sent: list[torch.dtype] = []

    def exchange_rows(self, sent: torch.Tensor, send_counts: list[int], receive_counts: list[int]) -> Pending:
        self.sent.append(sent.dtype)
        return super().exchange_rows(sent, send_counts, receive_counts)


class Counting(Communicator):
    """Counts what `average` sends."""

    def __init__(self, rank: int, size: int):
        super().__init__(rank, size)
        self.averaged: list[torch.dtype] = []

    def average(self, tensor: torch.Tensor) -> Pending:
        self.averaged.append(tensor.dtype)
        return super().average(tensor)


def check_average_together(one_by_one: Communicator) -> None:
    """The same numbers as one by one, in any order of waiting, by one collective for each dtype and large tensor.

    Of small integers, since the order of the sum is another one.
    """
    rank, size = one_by_one.rank, one_by_one.size
    f32, bf16 = torch.float32, torch.bfloat16
    shapes = [
        ((), f32),
        ((3, 5), bf16),
        ((2, 2), f32),
        ((1, 7), bf16),
        ((1100, 1000), bf16),
        ((0, 4), f32),
        ((9,), f32),
    ]

    def of(rank: int) -> list[torch.Tensor]:
        generator = torch.Generator("cpu").manual_seed(rank)
        device = torch.get_default_device()
        return [
            torch.randint(-8, 8, shape, generator=generator, device="cpu").to(device, dtype)
            if place != 2
            else torch.full(shape, float(rank), dtype=dtype).mT
            for place, (shape, dtype) in enumerate(shapes)
        ]

    counting = Counting(rank, size)
    pending = counting.average_together(of(rank))
    assert counting.averaged == [bf16, f32, bf16], counting.averaged
    found = [each.wait() for each in reversed(pending)][::-1]
    for own, average, again in zip(of(rank), found, pending, strict=True):
        assert torch.equal(average, one_by_one.average(own.contiguous()).wait()), "average_together"
        assert average.dtype == own.dtype and average.shape == own.shape
        assert average.is_contiguous() and average.data_ptr() % 16 == 0
        assert again.wait() is average
    assert counting.average_together([]) == []


def check_pulled_table(rank: int, size: int, device: torch.device) -> None:
    """A pulled table against one that a single rank has whole: rows, updates, and checkpoints of one for the other.

    The second cycle is cut by a checkpoint.
    """
    all_rows, width = 16 * size, 5
    communicator = Noting(rank, size)
    whole = PulledTable(all_rows, width, dtype=torch.float32, communicator=Communicator(), device=device)
    parts = PulledTable(all_rows, width, dtype=torch.float32, communicator=communicator, device=device)

    def read_in(number: int) -> list[np.ndarray]:
        rng = np.random.default_rng(number)
        return [rng.integers(0, all_rows, (1, 7), dtype=np.int32) for _ in range(2 * size)]

    def lists_for(number: int) -> PullLists:
        numbers = read_in(number)
        return lists_of(numbers[:size], numbers[size:], rows=all_rows, rank=rank, size=size)

    announced = lists_for(2)
    for number in (1, 2, 3):
        numbers = read_in(number)
        slots = [torch.from_numpy(rows).to(device).long() for rows in numbers]
        own = slots[rank::size]
        gradients = [
            torch.randn(7, width, generator=torch.Generator("cpu").manual_seed(s), device="cpu")
            for s in range(2 * size)
        ]
        gradients = [gradient.to(device) for gradient in gradients]
        whole.begin_cycle(lists_of(numbers, rows=all_rows), 14 * size)
        lists = announced if number == 2 else lists_for(number)
        communicator.sent.clear()
        parts.begin_cycle(lists, 14)
        assert communicator.sent == [torch.float32] * (number != 2), "rows alone are exchanged"
        exchanged = parts._ask(torch.unique(torch.cat(own)))
        for name in ("rows", "copies", "asked", "touched"):
            assert torch.equal(getattr(parts._cycle, name), getattr(exchanged, name)), name
        assert lists.send_counts == exchanged.send_counts and lists.asked_counts == exchanged.asked_counts
        for rows in own:
            assert torch.allclose(parts.read(rows), whole.read(rows), rtol=1e-5, atol=1e-7), "pulled rows"
        for rows, gradient in zip(slots, gradients, strict=True):
            whole.add_gradient(rows, gradient / size)  # the mean over ranks
        parts.add_gradient(own[0], gradients[rank])
        if number == 2:
            state = parts.state_dict()
            assert rank > 0 or len(state["rows"]) > 0
            everywhere = [state]
            dist.broadcast_object_list(everywhere, src=0)
            parts = PulledTable(all_rows, width, dtype=torch.float32, communicator=communicator, device=device)
            parts.load_state_dict(everywhere[0])
            parts.begin_cycle(lists_of(numbers[size:], rows=all_rows, rank=rank, size=size), 7)
            alone = PulledTable(all_rows, width, dtype=torch.float32, communicator=Communicator(), device=device)
            alone.load_state_dict(everywhere[0])  # on one rank: what all have gathered so far
            alone.begin_cycle(lists_of(numbers[size:], rows=all_rows), 7 * size)
            for rows, gradient in zip(slots[size:], gradients[size:], strict=True):
                alone.add_gradient(rows, gradient / size)
            assert whole.gradient is not None and alone.gradient is not None
            assert torch.allclose(alone.gradient, whole.gradient, rtol=1e-5, atol=1e-6), (
                "a cycle for another world size"
            )
        parts.add_gradient(own[1], gradients[rank + size])
        with parts.reading([torch.arange(all_rows), torch.arange(3)]):
            assert torch.allclose(parts.read(torch.arange(all_rows)[None]), whole.values, rtol=1e-5, atol=1e-7), (
                "another pull"
            )
        with parts.reading([torch.arange(3)]):
            pass
        assert torch.allclose(parts.read(own[1]), whole.read(own[1]), rtol=1e-5, atol=1e-7), "the cycle's pull again"
        parts.will_read(announced)  # before the third, which reads other rows, in vain
        for table in (whole, parts):
            table.start_push()
            table.update(TableRates(0.05, 0.95 - 0.01 * number, 0.001, 1e-10))
        assert torch.allclose(parts.values, communicator.shard(whole.values), rtol=1e-5, atol=1e-7), "row Adam"
        assert torch.allclose(parts.second_moment, communicator.shard(whole.second_moment), rtol=1e-5), "moments"
        assert torch.equal(parts.last_update, communicator.shard(whole.last_update)), "updates"


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
        place = torch.empty_like(shard)
        assert communicator.average_shard(of_rank(rank, dtype), place).wait() is place
        assert torch.equal(place, communicator.shard(mean)), "average_shard, in its place"

    check_average_together(communicator)

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

    check_pulled_table(rank, size, device)

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
