"""Which of several equivalent implementations a run uses on this device, and why; chosen once, and logged."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nanogpt.kernels.attention import import_failure, select_attention_backend
from nanogpt.kernels.dispatch import device_capability
from nanogpt.kernels.fp8_head import select_head_precision
from nanogpt.kernels.fp8_mlp import NEEDS as FP8_MLP_NEEDS
from nanogpt.models.language_model import Implementations, Precision
from nanogpt.spec import RunSpec
from nanogpt.training.tables import table_bytes

# A captured graph keeps its activations' memory while the next stage's first call runs uncaptured: 15 GB beside 28.
GRAPHS_MEMORY = 60_000_000_000


def choose_implementations(
    spec: RunSpec, device: torch.device, *, import_failure: Callable[[str], str | None] = import_failure
) -> tuple[Implementations, list[str]]:
    """The implementations for `spec.runtime` on `device`, and a line of the log for each choice.

    import_failure: as `select_attention_backend` takes it. Raises `InputError` if the spec asks for one that this
    device or installation lacks.
    """
    capability = device_capability(device) if device.type == "cuda" else None
    runtime, model = spec.runtime, spec.model
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[runtime.dtype]
    head_dim = model.width // model.heads
    attention = select_attention_backend(
        runtime.attention, capability, head_dim=head_dim, dtype=dtype, import_failure=import_failure
    )
    lines = [f"attention: {attention.reason}"]
    head: Precision = "bf16"
    mlp: Precision = "bf16"
    fp8_capability = capability if runtime.dtype == "bf16" else None
    if model.fp8_head:
        head, reason = select_head_precision(runtime.head_precision, fp8_capability)
        lines.append(f"head precision: {head}: {reason}")
    lines.append(f"kernels: {runtime.kernels}")
    if model.fp8_mlp:
        key = "mlp_precision"
        mlp, reason = select_head_precision(runtime.mlp_precision, fp8_capability, key=key, kernels=FP8_MLP_NEEDS)
        lines.append(f"MLP precision: {mlp}: {reason}")
    projection: Precision = "bf16"
    if model.fp8_projection:
        key = "projection_precision"
        projection, reason = select_head_precision(runtime.projection_precision, fp8_capability, key=key)
        lines.append(f"projection precision: {projection}: {reason}")
    chosen = Implementations(
        attention=attention.backend,
        head_precision=head,
        mlp_precision=mlp,
        projection_precision=projection,
        plain_kernels=runtime.kernels == "plain",
    )
    return chosen, lines


def captures_graphs(spec: RunSpec, device: torch.device) -> bool:
    """Whether micro-steps (`nanogpt.training.micro_step`) and updates of weights are captured as CUDA graphs."""
    runtime = spec.runtime
    if device.type != "cuda" or not spec.model.capturable or not compiles(spec, device):
        return False
    memory = torch.cuda.get_device_properties(device).total_memory
    roomy = memory - table_bytes(spec) >= GRAPHS_MEMORY
    return roomy and runtime.kernels == "auto" and runtime.cuda_graphs == "auto"


def compiles(spec: RunSpec, device: torch.device) -> bool:
    """Whether the run goes through torch.compile."""
    return spec.runtime.compiles(gpu=device.type == "cuda")
