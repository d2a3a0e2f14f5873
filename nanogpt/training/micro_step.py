"""A micro-step: the loss of one micro-batch, and its gradients added to the parameters'.

Notable features:
- Tables of embeddings are read outside of the compiled loss, and their gradients added row by row
  (`nanogpt.kernels.row_gradients`).
- On a GPU it is recorded as a CUDA graph, once a stage, and replayed: the host needs 27 ms to launch the 650 kernels
  of a small micro-batch one by one, the GPU less to run them. Windows and scales of attention, which stay the same
  within a stage, are part of the recording; tokens and loss weights are copied into it before each replay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nanogpt.data.batches import MicroBatch
from nanogpt.kernels.row_gradients import RowOrder, add_rows, row_order
from nanogpt.models.language_model import LanguageModel
from nanogpt.training.schedule import StepSettings


def to_device(values: float | tuple[float, ...], device: torch.device) -> Tensor:
    """() or (n,) fp32, without a wait."""
    tensor = torch.tensor(values, dtype=torch.float32)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def loss_arguments(settings: StepSettings, device: torch.device) -> tuple[Any, ...]:
    """What a model's training loss takes besides a batch: windows, and one weight or several (on the device)."""
    arguments = (settings.windows.at_run_time(), to_device(settings.token_weights, device))
    prefix_weight = settings.prefix_weight
    return arguments if prefix_weight is None else (*arguments, to_device(prefix_weight, device))


class MicroStep:
    """See the module.

    Args:
        model: whose parameters' `.grad` take the gradients.
        training_loss: the model's, compiled or not.
        grad_scale: multiplies the loss: 1 / micro-steps of a step.
        plain_kernels: plain PyTorch also where a Triton kernel could run.
        record: whether to record. Gradients then stay where they are, and are cleared in place.
    """

    def __init__(
        self,
        model: LanguageModel,
        training_loss: Callable[..., Tensor],
        *,
        grad_scale: float,
        plain_kernels: bool = False,
        record: bool = False,
    ):
        self.model = model
        self.training_loss = training_loss
        self.grad_scale = grad_scale
        self.plain_kernels = plain_kernels
        self.record = record
        self.failure: str | None = None  # why nothing is recorded although it was asked for
        self._recordings: dict[int, _Recording] = {}
        self._called: set[int] = set()
        self._pool: Any = None

    def __call__(self, batch: MicroBatch, arguments: tuple[Any, ...], *, stage: int) -> Tensor:
        """The loss, a scalar in fp32 without gradient, good until the next call.

        arguments: see `loss_arguments`. stage: whatever is not a tensor on the GPU is the same for all its calls.
        """
        first = stage not in self._called  # what is compiled, tuned or loaded at a first call cannot be recorded
        self._called.add(stage)
        if first or not self.record:
            return self.compute(batch, arguments)
        if stage not in self._recordings:
            try:
                self._recordings[stage] = self._make_recording(batch, arguments)
            except RuntimeError as error:
                self.record, self.failure = False, str(error).splitlines()[0]
                return self.compute(batch, arguments)
        return self._recordings[stage].replay(batch, arguments)

    def compute(self, batch: MicroBatch, arguments: tuple[Any, ...]) -> Tensor:
        """The same without a recording."""
        look_ups = self.model.look_ups(batch.inputs)
        for parameter in self.model.parameters() if self.record else [look_up.parameter for look_up in look_ups]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        embedded = tuple(look_up.read() for look_up in look_ups)
        loss = self.training_loss(batch, *arguments, embedded=embedded or None)
        (loss * self.grad_scale).backward()
        orders: dict[int, RowOrder] = {}  # tables of which the same rows are read share their order
        for look_up, rows in zip(look_ups, embedded, strict=True):
            order = orders.get(id(look_up.rows)) or row_order(look_up.rows)
            orders[id(look_up.rows)] = order
            assert look_up.parameter.grad is not None and rows.grad is not None
            add_rows(look_up.part(look_up.parameter.grad), order, rows.grad, plain=self.plain_kernels)
        return loss.detach()

    def _make_recording(self, batch: MicroBatch, arguments: tuple[Any, ...]) -> _Recording:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        batch = replace(
            batch, inputs=batch.inputs.clone(), targets=batch.targets.clone(), cu_seqlens=batch.cu_seqlens.clone()
        )
        arguments = tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that brings the next batch, go on as usual meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss = self.compute(batch, arguments)
        return _Recording(graph, batch, arguments, loss)

    def lines(self) -> list[str]:
        """For the log."""
        if self.failure is not None:
            return [f"CUDA graphs: none, recording failed: {self.failure}"]
        return [f"CUDA graphs: {len(self._recordings)} micro-steps recorded"] if self.record else []


class _Recording:
    """A CUDA graph, the tensors that it reads, and the loss that it leaves."""

    def __init__(self, graph: torch.cuda.CUDAGraph, batch: MicroBatch, arguments: tuple[Any, ...], loss: Tensor):
        self.graph = graph
        self.inputs = _tensors(batch, arguments)
        self.loss = loss

    def replay(self, batch: MicroBatch, arguments: tuple[Any, ...]) -> Tensor:
        """The loss of other inputs."""
        for own, given in zip(self.inputs, _tensors(batch, arguments), strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.loss


def _tensors(batch: MicroBatch, arguments: tuple[Any, ...]) -> list[Tensor]:
    return [batch.inputs, batch.targets, batch.cu_seqlens, *(x for x in arguments if isinstance(x, Tensor))]
