"""AdamW for the GPT-2 baseline: decay on matrices only, clipping by the global norm, gradients averaged over ranks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nanogpt.optim.adamw.spec import AdamWSpec
from nanogpt.optim.communication import Communicator
from nanogpt.optim.optimizer_spec import Rates
from nanogpt.optim.row_table import Rows
from nanogpt.parameters import Decoupled, Parameter


class AdamW:
    """torch.optim.AdamW (Loshchilov & Hutter, 2019) behind the trainer's interface."""

    def __init__(
        self, model: nn.Module, rows: Sequence[Parameter], spec: AdamWSpec, communicator: Communicator, **_: Any
    ):
        self.spec = spec
        self.communicator = communicator
        self.parameters = list(model.parameters())
        decay = spec.weight_decay
        decaying = {row.name for row in rows if isinstance(row.train, Decoupled) and row.train.decays}
        self.inner = torch.optim.AdamW(
            [
                {"params": [p for name, p in model.named_parameters() if name in decaying], "weight_decay": decay},
                {"params": [p for name, p in model.named_parameters() if name not in decaying], "weight_decay": 0.0},
            ],
            lr=spec.lr,
            betas=spec.betas,
            eps=spec.eps,
        )

    def expect_rows(self, rows: Mapping[str, Sequence[Rows]], rates: Rates) -> None:
        """Its gradients are always whole."""

    def step(self, rates: Rates) -> None:
        """Average the gradients over ranks, clip, update, clear."""
        pending = [self.communicator.average(p.grad) for p in self.parameters if p.grad is not None]
        for reduction in pending:
            reduction.wait()
        if self.spec.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.spec.clip_norm)
        for group in self.inner.param_groups:
            group["lr"] = self.spec.lr * rates.lr_factor
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)

    def warm_up(self, world_size: int) -> None:
        """Nothing of it is compiled."""

    def lines(self) -> list[str]:
        """Nothing of it is captured."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state; it is the same on every rank. Tensors are copies."""
        state = self.inner.state_dict()
        state["state"] = {
            index: {name: value.clone() for name, value in entry.items()} for index, entry in state["state"].items()
        }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict`; tensors are copied, which torch does only where dtype or device differ."""
        kinds = [{name: type(value) for name, value in group.items()} for group in self.inner.param_groups]
        self.inner.load_state_dict(copy.deepcopy(state))
        for group, kind in zip(self.inner.param_groups, kinds, strict=True):
            for name in kind.keys() | group.keys():
                if type(group.get(name)) is not kind.get(name):
                    raise TypeError(f"AdamW's {name} is {group.get(name)!r}")
        for parameter, entry in self.inner.state.items():
            shapes = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            if {name: getattr(value, "shape", None) for name, value in entry.items()} != shapes:
                raise TypeError(f"AdamW's state of a parameter of shape {tuple(parameter.shape)} is another's")
        self.inner.zero_grad(set_to_none=True)
