"""A micro-step: the loss of one micro-batch, with its gradients added to the parameters'.

- Tables of rows are read outside the compiled loss, and their gradients added by row (`nanogpt.optim.row_table`).
- On a GPU it is captured as a CUDA graph, once per stage, and replayed: the host needs 27 ms to launch the 650 kernels
  of a small micro-batch one by one, longer than the GPU takes to run them. What stays constant within a stage, such as
  attention's windows and scales, is part of the capture; what is on the GPU, the batch and the loss's inputs from the
  schedule, is copied in before each replay. Pulled tables stay outside: their rows move in each cycle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nanogpt.cache.graphs import prepare
from nanogpt.captured import capture, reason
from nanogpt.data.micro_batches import MicroBatch
from nanogpt.models.language_model import LanguageModel
from nanogpt.optim.pulled_table import TableLookUp
from nanogpt.optim.row_table import LookUp, add_gradients


class MicroStep:
    """See the module.

    Args:
        model: whose parameters' `.grad` take the gradients.
        training_loss: the model's, compiled or not.
        grad_scale: multiplies the loss: 1 / micro-steps of a step.
        plain_kernels: plain PyTorch also where a Triton kernel could run.
        capture: whether to capture. Gradients then stay in place, and are cleared there.
    """

    def __init__(
        self,
        model: LanguageModel,
        training_loss: Callable[..., Tensor],
        *,
        grad_scale: float,
        plain_kernels: bool = False,
        capture: bool = False,
    ):
        self.model = model
        self.training_loss = training_loss
        self.grad_scale = grad_scale
        self.plain_kernels = plain_kernels
        self.capture = capture
        self.failure: str | None = None  # why nothing was captured although requested
        self._captures: dict[int, _Capture] = {}
        self._called: set[int] = set()
        self._pool: Any = None

    def __call__(self, batch: MicroBatch, inputs: Any, *, stage: int) -> Tensor:
        """The loss, a scalar in fp32 without gradient, valid until the next call.

        inputs: from the model's `loss_inputs`. stage: within it, whatever is not a tensor on the GPU stays the same.
        """
        first = stage not in self._called  # a first call may compile, tune or load, which cannot be captured
        self._called.add(stage)
        if first or not self.capture:
            return self.compute(batch, inputs)
        if stage not in self._captures:
            try:
                self._captures[stage] = self._make_capture(batch, inputs)
            except RuntimeError as error:
                self.capture, self.failure = False, reason(error)
                return self.compute(batch, inputs)
        return self._captures[stage].replay(batch, inputs)

    def compute(self, batch: MicroBatch, inputs: Any) -> Tensor:
        """The same without a capture."""
        look_ups = self.model.look_ups(batch)
        read = [look_up.parameter for look_up in look_ups if isinstance(look_up, LookUp)]
        for parameter in self.model.parameters() if self.capture else read:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        embedded = tuple(look_up.read() for look_up in look_ups)
        loss = self._backward(batch, inputs, embedded)
        add_gradients(look_ups, embedded, plain=self.plain_kernels)
        return loss

    def prepare(self, batch: MicroBatch, inputs: Any) -> None:
        """Find or compile the loss's graph for such a batch, where it is compiled, without computing it."""
        embedded = tuple(look_up.read() for look_up in self.model.look_ups(batch))
        prepare(self.training_loss, batch, inputs, embedded=embedded or None)

    def _backward(self, batch: MicroBatch, inputs: Any, embedded: tuple[Tensor, ...]) -> Tensor:
        loss = self.training_loss(batch, inputs, embedded=embedded or None)
        (loss * self.grad_scale).backward()
        return loss.detach()

    def _make_capture(self, batch: MicroBatch, inputs: Any) -> _Capture:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        batch = replace(
            batch,
            inputs=batch.inputs.clone(),
            targets=batch.targets.clone(),
            cu_seqlens=batch.cu_seqlens.clone(),
            extras={name: extra.clone() for name, extra in batch.extras.items()},
        )
        inputs = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
        look_ups = self.model.look_ups(batch)
        tables = {i: look_up for i, look_up in enumerate(look_ups) if isinstance(look_up, TableLookUp)}
        pulled = {i: look_up.read() for i, look_up in tables.items()}

        def compute() -> Tensor:
            embedded = tuple(pulled[i] if i in pulled else look_up.read() for i, look_up in enumerate(look_ups))
            loss = self._backward(batch, inputs, embedded)
            own = [i for i in range(len(look_ups)) if i not in pulled]
            add_gradients([look_ups[i] for i in own], [embedded[i] for i in own], plain=self.plain_kernels)
            return loss

        graph, loss = capture(compute, self._pool)
        return _Capture(graph, batch, inputs, loss, [(tables[i], rows) for i, rows in pulled.items()])

    def lines(self) -> list[str]:
        """For the log."""
        if self.failure is not None:
            return [f"CUDA graphs: none, capturing failed: {self.failure}"]
        return [f"CUDA graphs: {len(self._captures)} micro-steps captured"] if self.capture else []


class _Capture:
    """A CUDA graph, the tensors it reads, and the loss it writes.

    pulled: look-ups in pulled tables for the captured batch, with the leaves that the graph reads for them.
    """

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        batch: MicroBatch,
        inputs: Any,
        loss: Tensor,
        pulled: Sequence[tuple[TableLookUp, Tensor]],
    ):
        self.graph = graph
        self.read = _tensors(batch, inputs)
        self.loss = loss
        self.pulled = pulled

    @torch.no_grad()
    def replay(self, batch: MicroBatch, inputs: Any) -> Tensor:
        """The loss for other inputs."""
        for own, given in zip(self.read, _tensors(batch, inputs), strict=True):
            own.copy_(given)
        for look_up, rows in self.pulled:
            look_up.table.read(look_up.rows, look_up.signs, out=rows)
        self.graph.replay()
        add_gradients([look_up for look_up, _ in self.pulled], [rows for _, rows in self.pulled])
        return self.loss


def _tensors(batch: MicroBatch, inputs: Any) -> list[Tensor]:
    """Those that change between calls: tensors on the batch's device, except numbers that a stage keeps."""
    given = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.device == batch.inputs.device]
    return [batch.inputs, batch.targets, batch.cu_seqlens, *batch.extras.values(), *given]
