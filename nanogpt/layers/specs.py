"""The parts of a model's spec that belong to layers. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nanogpt.spec_fields import NOT_COMPILED, Finite, Index, NonNegative, Positive, Size, Strict


class RotarySpec(Strict):
    """Half-truncated rotary embedding and YaRN's rule for longer windows."""

    base: Annotated[Positive, NOT_COMPILED] = Field(description="frequencies are (1/base)^(j/(n-1)), j = 0..n-1")
    frequencies: Size = Field(description="n; 2 n channels of a head are rotated, the rest are unchanged")
    yarn_low: Annotated[Positive, NOT_COMPILED] = Field(
        description="rotations in the old window below which a frequency is interpolated fully"
    )
    yarn_high: Annotated[Positive, NOT_COMPILED] = Field(description="rotations above which a frequency is left alone")
    yarn_temperature: Annotated[NonNegative, NOT_COMPILED] = Field(
        description="attn_scale grows by 1 + yarn_temperature * ln(new/old)"
    )


class SoftcapSpec(Strict):
    """z = cap * sigmoid((logit + shift) / scale)."""

    cap: Positive
    shift: Finite
    scale: Positive


class MuddSpec(Strict):
    """The small nets that compute a token's connections and gates: `scale * (W2 gelu(W1 x) + b)`."""

    hidden: Size
    scale: Positive = Field(description="of the connections; the gates' scale starts here and is learned")


class MlpFp8Spec(Strict):
    """Scales of the MLP's products when they run in 8 bits (`runtime.mlp_precision`)."""

    activation_headroom: Positive = Field(description="factor by which the next micro-batch may exceed this one")
    weight_headroom: Annotated[Positive, NOT_COMPILED] = Field(
        description="factor by which the next step's weights may exceed these"
    )
    bootstrap_steps: Annotated[Index, NOT_COMPILED] = Field(
        description="first steps, in which the down weights' scale is measured anew"
    )
    gradients: Literal["bf16", "all"] = Field(
        default="bf16", description="all: also the backward pass's products in 8 bits"
    )
    input_scale: Literal["measured", "bound"] = Field(
        default="measured", description="of the MLP's input: its largest, or a bound on a norm's output"
    )
    square: Literal["bf16", "e4m3"] = Field(
        default="bf16", description="how the activation is kept for the backward pass; e4m3 needs gradients: all"
    )
