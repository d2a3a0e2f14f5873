"""The models' part of a RunSpec, and what every part is made of: bounded numbers, a base that refuses unknown keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# Not strict, since YAML has lists only; what is inside stays strict.
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]
Polynomial = Annotated[tuple[Finite, Finite, Finite], Field(strict=False)]


class Strict(BaseModel):
    """Base of every part of a spec: unknown keys are refused, "12" and true are no numbers, nothing can be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class RotarySpec(Strict):
    """Half-truncated rotary embedding and YaRN's rule for longer windows."""

    base: Positive = Field(description="frequencies are (1/base)^(j/(n-1)), j = 0..n-1")
    frequencies: Count = Field(description="n; 2 n channels of a head are rotated, the rest are left alone")
    yarn_low: Positive = Field(description="rotations in the old window below which a frequency is interpolated fully")
    yarn_high: Positive = Field(description="rotations above which a frequency is left alone")
    yarn_temperature: NonNegative = Field(description="attn_scale grows by 1 + yarn_temperature * ln(new/old)")


class SoftcapSpec(Strict):
    """z = cap * sigmoid((logit + shift) / scale)."""

    cap: Positive
    shift: Finite
    scale: Positive


class SkipSpec(Strict):
    """A gated connection from the output of one layer to the input of a later one."""

    from_layer: Index
    to_layer: Index


class ScalarInit(Strict):
    """Start values of the learned scalars."""

    residual: Finite
    attention_in: Finite
    attention_out: Finite
    bigram: Finite
    smear: Finite
    backout: Finite
    skip: Finite


class SpeedrunModelSpec(Strict):
    """The speedrun's model (`nanogpt/models/speedrun.py`)."""

    kind: Literal["speedrun"]
    vocab_size: Count
    padded_vocab_size: Count = Field(description="rows of the embeddings and columns of the head; all enter the loss")
    layers: Count
    width: Count
    heads: Count
    head_dim: Count
    mlp_expansion: Count
    mlp_bank_padding: Index = Field(description="unused entries of the MLP bank, so that its matrices shard evenly")
    attention_free_layers: list[Index]
    long_window_layers: list[Index]
    paired_layers: list[Index] = Field(description="layers whose heads are joined in pairs to twice the length")
    value_embed_layers: list[Index] = Field(description="layers with a value embedding, in the order of its tables")
    skip: SkipSpec
    backout_layer: Index = Field(description="layer whose output is subtracted before the head")
    bigram_rows: Annotated[int, Field(ge=2, le=2**31 - 1)]
    bigram_multipliers: Annotated[tuple[Count, Count], Field(strict=False)] = Field(
        description="hash multipliers of the token and of the one before"
    )
    gate_inputs: Count = Field(description="leading channels that the gates read")
    attention_scale: Positive = Field(description="softmax scale at the start; YaRN steps change it")
    rotary: RotarySpec
    softcap: SoftcapSpec
    init_bound: Positive = Field(description="matrices start uniform in +-sqrt(3) * init_bound / sqrt(width)")
    head_init_std: Positive
    scalars: ScalarInit

    @property
    def attention_layers(self) -> list[int]:
        """Layers that have attention, in order: row r of the attention bank belongs to the r-th of them."""
        return [i for i in range(self.layers) if i not in self.attention_free_layers]

    @property
    def rotated_channels(self) -> int:
        """Leading channels of a head that rotary turns."""
        return 2 * self.rotary.frequencies

    @property
    def shardable_rows(self) -> dict[str, int]:
        """What each parameter counts along the dimension that is divided among ranks; banks count matrices."""
        with_attention, tables = len(self.attention_layers), len(self.value_embed_layers)
        return {
            "attn": 4 * with_attention,
            "mlp": 2 * (self.layers + self.mlp_bank_padding),
            "scalars": 4 * self.layers + 3,
            "value_embed": tables * self.padded_vocab_size,
            "bigram_embed": self.bigram_rows,
            "smear_gate": 1,
            "skip_gate": 1,
            "attn_gate_bank": with_attention,
            "ve_gate_bank": tables,
            "x0_lambdas": self.layers,
            "lm_head": self.width,
            "embed": self.padded_vocab_size,
        }

    def problems(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Cross-checks; yields (path below `model`, message)."""
        if self.width != self.heads * self.head_dim:
            yield (
                ("width",),
                f"is {self.width}, must be heads * head_dim = {self.heads} * {self.head_dim}"
                f" = {self.heads * self.head_dim}",
            )
        if self.vocab_size > self.padded_vocab_size:
            yield ("padded_vocab_size",), f"is {self.padded_vocab_size}, below vocab_size {self.vocab_size}"
        if self.rotated_channels > self.head_dim:
            yield (
                ("rotary", "frequencies"),
                f"{self.rotary.frequencies} frequencies turn {self.rotated_channels} channels,"
                f" a head has {self.head_dim}",
            )
        if self.rotary.yarn_low >= self.rotary.yarn_high:
            yield (
                ("rotary", "yarn_low"),
                f"is {self.rotary.yarn_low}, must be below yarn_high {self.rotary.yarn_high}",
            )
        if self.gate_inputs > self.width:
            yield ("gate_inputs",), f"is {self.gate_inputs}, more than width {self.width}"
        if self.paired_layers and self.heads % 2:
            yield ("paired_layers",), f"needs an even number of heads, heads is {self.heads}"
        with_attention = self.attention_layers
        for key in ("attention_free_layers", "long_window_layers", "paired_layers", "value_embed_layers"):
            layers: list[int] = getattr(self, key)
            if len(set(layers)) != len(layers):
                yield (key,), f"names a layer twice: {layers}"
            for position, layer in enumerate(layers):
                if layer >= self.layers:
                    yield (key, position), f"is layer {layer}, the model has layers 0..{self.layers - 1}"
                elif key != "attention_free_layers" and layer not in with_attention:
                    yield (key, position), f"is layer {layer}, which has no attention (attention_free_layers)"
        for layer in set(self.paired_layers) & set(self.long_window_layers):
            yield (
                ("paired_layers", self.paired_layers.index(layer)),
                f"layer {layer} is a long-window layer too: the key shift has no meaning in a paired layer",
            )
        if not self.skip.from_layer < self.skip.to_layer < self.layers:
            yield (
                ("skip",),
                f"goes from layer {self.skip.from_layer} to {self.skip.to_layer}; needs from < to < {self.layers}",
            )
        if self.backout_layer >= self.layers:
            yield (
                ("backout_layer",),
                f"is layer {self.backout_layer}, the model has layers 0..{self.layers - 1}",
            )


class Gpt2ModelSpec(Strict):
    """The classic GPT-2 baseline (`nanogpt/models/gpt2.py`)."""

    kind: Literal["gpt2"]
    vocab_size: Count
    padded_vocab_size: Count
    layers: Count
    width: Count
    heads: Count
    mlp_expansion: Count
    context: Count = Field(description="positions that are learned; longer documents are read in pieces of this length")
    init_std: Positive

    def problems(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Cross-checks; yields (path below `model`, message)."""
        if self.width % self.heads:
            yield ("heads",), f"is {self.heads}, must divide width {self.width}"
        if self.vocab_size > self.padded_vocab_size:
            yield ("padded_vocab_size",), f"is {self.padded_vocab_size}, below vocab_size {self.vocab_size}"
