"""The end of a run, before the last validation: the entries of `training.end`, in order.

All of it is inside the clock, and the last checkpoint has the result. Without entries nothing is kept or done.

Tail averages are public record 92's (PR #360 of KellerJordan/modded-nanogpt). Each rank updates and writes an equal
part of a parameter, in memory order: together the ranks hold 4 bytes per number and average.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.optim.communication import Communicator
from nanogpt.spec import RunSpec
from nanogpt.spec_end import TailAverages
from nanogpt.training.mask_builder import MaskBuilder

ROWS_SENT = 1024  # of the mask, after a step: 6 MB, which take the host a millisecond or two


class EndOfRun:
    """Follows the last steps of a run, and ends it. A canonical mask occupies device memory from here on."""

    def __init__(self, spec: RunSpec, model: nn.Module, communicator: Communicator, device: torch.device):
        self.communicator = communicator
        parameters, total_steps = dict(model.named_parameters()), spec.training.total_steps
        self._averages = [
            RunningAverages(entry, parameters, total_steps, communicator)
            for entry in spec.training.end
            if isinstance(entry, TailAverages)
        ]
        self.mask: Tensor | None = None  # (V, V / 8) uint8, complete from `take_mask` on
        if spec.training.masked:
            rows = spec.model.padded_vocab_size
            self.mask = torch.zeros((rows, rows // 8), dtype=torch.uint8, device=device)
        self._builder: MaskBuilder | None = None
        self._sent = 0  # rows of the mask
        self._stream = torch.cuda.Stream(device) if self.mask is not None and device.type == "cuda" else None

    def clock_starts(self) -> None:
        """Start building what is built alongside training."""
        if self.mask is not None and self.communicator.rank == 0:
            self._builder = MaskBuilder(self.mask.shape[0])

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Note that the optimizer has made `step` (from 0)."""
        for entry in self._averages:
            entry.after_step(step)
        if self._builder is not None and self._builder.is_done:
            self._send_mask(self._builder, ROWS_SENT)

    @torch.no_grad()
    def finish(self) -> None:
        """Apply the entries to the weights after the last step."""
        for entry in self._averages:
            entry.finish()

    def take_mask(self) -> Tensor | None:
        """The last validation's mask, once it is built, on every rank; None: it has none."""
        if self.mask is not None:
            if self._builder is not None:
                self._send_mask(self._builder, len(self.mask))
                if self._stream is not None:
                    torch.cuda.current_stream(self.mask.device).wait_stream(self._stream)
            self.communicator.broadcast(self.mask)
        return self.mask

    def _send_mask(self, builder: MaskBuilder, rows: int) -> None:
        """Send the next `rows` of the mask to the device, which meanwhile goes on with what it has to do."""
        assert self.mask is not None
        own = slice(self._sent, min(self._sent + rows, len(self.mask)))
        if own.start == own.stop:  # all are there
            return
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            self.mask[own].copy_(torch.from_numpy(builder.wait()[own]))
        self._sent = own.stop

    def close(self) -> None:
        """End what is still being built."""
        if self._builder is not None:
            self._builder.close()

    def state_dict(self) -> list[dict[str, Tensor]]:
        """What was gathered so far, by entry; the same on every rank. Collective."""
        return [entry.state_dict() for entry in self._averages]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Load a `state_dict`; a run without entries has an empty one."""
        for entry, gathered in zip(self._averages, state or [{} for _ in self._averages], strict=True):
            entry.load_state_dict(gathered)


class RunningAverages:
    """Running averages of the last weights, blended in at the end, with the previous norms."""

    def __init__(
        self, entry: TailAverages, parameters: dict[str, nn.Parameter], total_steps: int, communicator: Communicator
    ):
        self.entry = entry
        self.parameters = parameters
        self.communicator = communicator
        self.rates = [average.ticks(total_steps) for average in entry.averages]
        self._averages: dict[str, Tensor] = {}  # by "number of the average/parameter": this rank's part

    def after_step(self, step: int) -> None:
        """Update the averages that tick now."""
        for key, name, rates, _ in self._each():
            if step in rates:
                own = self._own(name).float()
                if step == min(rates):
                    self._averages[key] = own.clone()
                else:
                    self._averages[key] = lerp(self._averages[key], own, rates[step])

    def finish(self) -> None:
        """Blend in the recipe's order, gather, then restore norms."""
        before = self._norms()
        for key, name, _, blend in self._each():
            own = self._own(name)
            own.copy_(lerp(own.float(), self._averages.pop(key), blend))
        for name in dict.fromkeys(name for _, name, _, _ in self._each()):
            if self._sharded(name):
                self.communicator.gather(self.parameters[name].data.view(-1)).wait()
        for name, old, new in zip(self.entry.keep_norms, before, self._norms(), strict=True):
            if new > 0:
                self.parameters[name].mul_(old / new)

    def _norms(self) -> list[float]:
        """Frobenius norms in fp32, of whole parameters."""
        norms = [torch.linalg.vector_norm(self.parameters[n].data, dtype=torch.float32) for n in self.entry.keep_norms]
        return torch.stack(norms).tolist() if norms else []

    def _each(self) -> Iterator[tuple[str, str, dict[int, float], float]]:
        """(key of the state, parameter, rates by step, blend) of each average of a parameter, in order."""
        for number, (average, rates) in enumerate(zip(self.entry.averages, self.rates, strict=True)):
            for name, blend in average.blend.items():
                yield f"{number}/{name}", name, rates, blend

    def _sharded(self, name: str) -> bool:
        return self.parameters[name].numel() % self.communicator.size == 0

    def _own(self, name: str) -> Tensor:
        """This rank's part, a flat view; all of a parameter that cannot be divided evenly."""
        flat = self.parameters[name].data.view(-1)
        return self.communicator.shard(flat) if self._sharded(name) else flat

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, in the parameters' shapes, on the CPU."""
        full = {}
        for key, name, _, _ in self._each():
            if key in self._averages:
                own = self._averages[key]
                whole = self.communicator.unshard(own) if self._sharded(name) else own
                full[key] = whole.view(self.parameters[name].shape).cpu()
        return full

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over averages."""
        self._averages = {}
        for key, name, _, _ in self._each():
            if key in state:
                flat = state[key].reshape(-1)
                own = self.communicator.shard(flat) if self._sharded(name) else flat
                self._averages[key] = own.to(self.parameters[name].device, copy=True)


def lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """`torch.lerp` of fp32 tensors by its formula, each operation rounded; new memory.

    torch's vectorized loop fuses operations that the rest of a tensor gets separately, so its results depend on how a
    tensor is cut.
    """
    difference = end - start
    return difference.mul_(weight).add_(start) if weight < 0.5 else difference.mul_(weight - 1).add_(end)
