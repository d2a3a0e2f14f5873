"""The models' part of a RunSpec, and what every part is made of: bounded numbers, a base that refuses unknown keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

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

Problem = tuple[tuple[str | int, ...], str]  # path below `model`, message


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
    """Start values of the speedrun's learned scalars."""

    residual: Finite
    attention_in: Finite
    attention_out: Finite
    bigram: Finite
    smear: Finite
    backout: Finite
    skip: Finite


class RecordModelSpec(Strict):
    """What the record models share: sizes, layer sets, hashed bigrams, rotary, the softcapped head."""

    banks: ClassVar[tuple[str, ...]]  # labels of the parameters that NorMuon trains
    adam_labels: ClassVar[tuple[str, ...]]  # and of those that Adam trains

    kind: str
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
        raise NotImplementedError

    def problems(self) -> Iterator[Problem]:
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
        yield from self._layer_problems("attention_free_layers", needs_attention=False)
        for key in ("long_window_layers", "paired_layers", "value_embed_layers"):
            yield from self._layer_problems(key)
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

    def _layer_problems(self, key: str, *, needs_attention: bool = True) -> Iterator[Problem]:
        """The list of layers `key`: each once, in the model, and (unless told otherwise) one that has attention."""
        layers: list[int] = getattr(self, key)
        if len(set(layers)) != len(layers):
            yield (key,), f"names a layer twice: {layers}"
        for position, layer in enumerate(layers):
            if layer >= self.layers:
                yield (key, position), f"is layer {layer}, the model has layers 0..{self.layers - 1}"
            elif needs_attention and layer in self.attention_free_layers:
                yield (key, position), f"is layer {layer}, which has no attention (attention_free_layers)"


class SpeedrunModelSpec(RecordModelSpec):
    """The speedrun's model (`nanogpt/models/speedrun.py`)."""

    banks = ("attn", "mlp")
    adam_labels = (
        "scalars",
        "value_embed",
        "bigram_embed",
        "smear_gate",
        "skip_gate",
        "attn_gate_bank",
        "ve_gate_bank",
        "x0_lambdas",
        "lm_head",
        "embed",
    )

    kind: Literal["speedrun"]
    backout_layer: Index = Field(description="layer whose output is subtracted before the head")
    scalars: ScalarInit

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

    def problems(self) -> Iterator[Problem]:
        """Cross-checks; yields (path below `model`, message)."""
        yield from super().problems()
        if self.backout_layer >= self.layers:
            yield (
                ("backout_layer",),
                f"is layer {self.backout_layer}, the model has layers 0..{self.layers - 1}",
            )


class MuddSpec(Strict):
    """The small nets that make a token's connections and gates: `scale * (W2 gelu(W1 x) + b)`."""

    hidden: Count
    scale: Positive = Field(description="of the connections; the gates' scale starts here and is learned")


class MlpFp8Spec(Strict):
    """Scales of the MLP's products where they run in 8 bits (`runtime.mlp_precision`)."""

    activation_headroom: Positive = Field(description="the next micro-batch may be so many times as large as this one")
    weight_headroom: Positive = Field(description="the next step's weights may be so many times as large as these")
    bootstrap_steps: Index = Field(description="steps after which the down weights' scale is still measured afresh")
    gradients: Literal["bf16", "activations", "all"] = Field(
        default="bf16", description="which gradients are 8-bit products too: none, those of activations, of weights too"
    )
    input_scale: Literal["measured", "bound"] = Field(
        default="measured", description="of the MLP's input: by its largest, or by what a norm's output cannot exceed"
    )
    square: Literal["bf16", "e4m3"] = Field(
        default="bf16", description="how the backward pass is left the activation; e4m3 needs gradients: all"
    )


class Record89Starts(Strict):
    """Start values of what is learned as numbers, gates and connections. Those not named start at 0."""

    attention_in: Finite
    attention_out: Finite
    smear: Finite
    skip: Finite
    residual: Finite = Field(description="scale of the residual before each attention and MLP is added")
    post: Finite = Field(description="scale of what each attention and MLP adds")
    output_gate: Finite
    bigram_gate: Finite
    skip_gate: Finite
    dc_scores: Finite = Field(description="weight of each head's attention in the mixed attention")
    value_gate: Finite = Field(description="gate of the last layer's value embedding")
    backout: Finite = Field(description="weight of the saved activation in the head's input, subtracted")


class Record89ModelSpec(RecordModelSpec):
    """The model of public record 89 (`nanogpt/models/record89.py`)."""

    banks = ("qk", "vo", "mlp")
    adam_labels = (
        "scalars",
        "smear_gate",
        "ve_gate_bank",
        "lm_head",
        "bigram_embed",
        "post_lambdas",
        "resid_lambdas",
        "value_embed",
        "embed",
        "mudd_w1",
        "mudd_w2",
        "mudd_b2",
        "mudd_gate_w1",
        "mudd_gate_w2",
        "mudd_gate_b2",
        "mudd_gate_scale",
    )

    kind: Literal["record89"]
    qk_bank_padding: Index = Field(description="unused matrices of the bank of q and k, so that it shards evenly")
    vo_bank_padding: Index = Field(description="unused matrices of the bank of v and o")
    saved_layer: Index = Field(description="layer whose output feeds the attention of every later layer")
    value_embed_init_std: NonNegative
    bigram_signs: Count = Field(description="sign vectors that tell bigrams of one row apart")
    xsa_layers: list[Index] = Field(description="layers whose attention output loses the token's own value")
    output_gate_layers: list[Index] = Field(description="layers whose attention output has a gate for each head")
    dc_window: Count = Field(description="tokens, itself included, over which the last layer mixes attention heads")
    mudd: MuddSpec
    starts: Record89Starts
    mlp_fp8: MlpFp8Spec

    @property
    def gate_columns(self) -> tuple[int, int]:
        """Numbers a token that the two gate nets make: for the layers up to `skip.from_layer`, and for the rest."""
        last = self.layers - 1
        counts = [0, 1 + 2 * self.heads]  # the skip gate, and the head mixing's two weights
        for layer in self.attention_layers:
            late = layer > self.skip.from_layer
            counts[late] += self.heads * ((layer in self.xsa_layers) + (layer in self.output_gate_layers))
            counts[late] += 2 * (layer != last)
        return counts[0], counts[1]

    @property
    def shardable_rows(self) -> dict[str, int]:
        """What each parameter counts along the dimension that is divided among ranks; banks count matrices."""
        with_attention, tables = len(self.attention_layers), len(self.value_embed_layers)
        return {
            "qk": self.heads * with_attention + self.qk_bank_padding,
            "vo": 2 * with_attention + self.vo_bank_padding,
            "mlp": 2 * (self.layers + self.mlp_bank_padding),
            "scalars": 2 * self.layers + 2,
            "smear_gate": 1,
            "ve_gate_bank": tables,
            "lm_head": self.width,
            "bigram_embed": self.bigram_rows,
            "post_lambdas": self.layers,
            "resid_lambdas": self.layers,
            "value_embed": tables * self.padded_vocab_size,
            "embed": self.padded_vocab_size,
            **dict.fromkeys(("mudd_w1", "mudd_w2", "mudd_b2"), 2),
            **dict.fromkeys(("mudd_gate_w1", "mudd_gate_w2", "mudd_gate_b2"), 2),
            "mudd_gate_scale": 1,
        }

    def problems(self) -> Iterator[Problem]:
        """Cross-checks; yields (path below `model`, message)."""
        yield from super().problems()
        yield from self._layer_problems("xsa_layers")
        yield from self._layer_problems("output_gate_layers")
        if self.heads % 2:
            yield ("heads",), f"is {self.heads}, must be even: q and k are banked in pairs of heads"
        if self.gate_inputs % 2:
            yield ("gate_inputs",), f"is {self.gate_inputs}, must be even: half of them are the value embedding's"
        if self.attention_free_layers != [self.skip.to_layer]:
            yield (
                ("attention_free_layers",),
                f"is {self.attention_free_layers}, must be the layer that the skip enters, [{self.skip.to_layer}]",
            )
        last = self.layers - 1
        for key, wanted in (("paired_layers", False), ("value_embed_layers", True), ("output_gate_layers", True)):
            if (last in getattr(self, key)) != wanted:
                verb = "must name" if wanted else "must not name"
                yield (key,), f"{verb} the last layer, {last}"
        if self.mlp_fp8.square == "e4m3" and self.mlp_fp8.gradients != "all":
            yield ("mlp_fp8", "square"), f"is e4m3, which needs gradients: all; found {self.mlp_fp8.gradients}"
        if not self.skip.to_layer <= self.saved_layer < last:
            yield (
                ("saved_layer",),
                f"is {self.saved_layer}, must lie between skip.to_layer {self.skip.to_layer} and the layer before the"
                f" last, {last - 1}",
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

    def problems(self) -> Iterator[Problem]:
        """Cross-checks; yields (path below `model`, message)."""
        if self.width % self.heads:
            yield ("heads",), f"is {self.heads}, must divide width {self.width}"
        if self.vocab_size > self.padded_vocab_size:
            yield ("padded_vocab_size",), f"is {self.padded_vocab_size}, below vocab_size {self.vocab_size}"
