"""What a benchmark's figures depend on, for its JSON."""

from __future__ import annotations

from typing import Any

import torch

from nanogpt.launch.world import World
from nanogpt.spec import RunSpec


def device_conditions(device: torch.device) -> dict[str, Any]:
    """The device's name and PyTorch's version."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__}


def conditions(spec: RunSpec, world: World) -> dict[str, Any]:
    """The recipe, the world size, and `device_conditions`."""
    return {"recipe": spec.name, "world_size": world.size, **device_conditions(world.device)}
