"""The public records' models as Hugging Face transformers loads them: the last part of an exported file.

Not imported here, since it needs transformers: `nanogpt.export.modeling` writes its classes after the model's own
code, and there MODEL, SPEC and ROTARY are the classes of the model, of its spec and of its rotary embedding.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from nanogpt.kernels.cross_entropy import softcap
from nanogpt.kernels.relu_squared_mlp import relu_squared_mlp_plain

MODEL: Any = nn.Module
SPEC: Any = SimpleNamespace
ROTARY: Any = nn.Module


class NanogptConfig(PretrainedConfig):
    """What the weights do not say: the recipe's `model`, and the rotary tables and windows at the end of training.

    spec: the recipe's `model`. rotary: by name, frequencies and softmax scale. windows: short and long, in tokens.
    tensors: name -> shape and dtype; `buffers` are those without a gradient. numberings: name -> pairs of what belongs
    to which layer. tables: names of tables of rows: the tensors `table_NAME`, and `table_NAME_rows`, their numbers.
    """

    model_type = "nanogpt_record"

    def __init__(
        self,
        spec: dict[str, Any] | None = None,
        rotary: dict[str, Any] | None = None,
        windows: dict[str, int] | None = None,
        tensors: dict[str, Any] | None = None,
        buffers: list[str] | None = None,
        numberings: dict[str, list[list[int]]] | None = None,
        tables: list[str] | None = None,
        **rest: Any,
    ):
        self.spec = spec or {}
        self.rotary = rotary or {}
        self.windows = windows or {}
        self.tensors = tensors or {}
        self.buffers = buffers or []
        self.numberings = numberings or {}
        self.tables = tables or []
        rest.setdefault("tie_word_embeddings", False)  # head and embedding separate before the run's end
        rest.setdefault("use_cache", False)
        super().__init__(**rest)


def named(value: Any) -> Any:
    """Nested dictionaries as objects with attributes."""
    return SimpleNamespace(**{key: named(item) for key, item in value.items()}) if isinstance(value, dict) else value


class Table:
    """A table of rows that the model looks up by number. The file has the rows that training touched; others are 0."""

    def __init__(self, model: nn.Module, name: str):
        self.tensors = lambda: (getattr(model, f"table_{name}"), getattr(model, f"table_{name}_rows"))

    def read(self, rows: Tensor, signs: Any) -> Tensor:
        """(T, D): the sum of each token's `rows` (R, T), times their signs."""
        values, known = self.tensors()
        place = torch.searchsorted(known, rows.long()).clamp(max=len(known) - 1)
        read = nn.functional.embedding(place, values) * (known[place] == rows)[..., None]
        return (read * nn.functional.embedding(signs.rows, signs.vectors)).sum(0)


class NanogptModel(MODEL):
    """The model, its parameters empty until they are loaded."""

    def __init__(self, config: NanogptConfig):
        nn.Module.__init__(self)
        self.spec = SPEC()
        vars(self.spec).update(vars(named(config.spec)))
        self.implementations = SimpleNamespace(attention="plain", plain_kernels=True)
        self.mlp_function = relu_squared_mlp_plain
        for name, pairs in config.numberings.items():
            setattr(self, name, {layer: place for layer, place in pairs})  # noqa: C416, JSON has lists
        self.tables = {name: Table(self, name) for name in config.tables}
        self.windows = named(config.windows)
        self.rotary_state = config.rotary
        self.bos = config.bos_token_id
        self.rotary_rows = 0
        self.rotary_place: Any = None
        for name, (shape, dtype) in config.tensors.items():
            numbers = torch.empty(shape, dtype=getattr(torch, dtype) if dtype in ("float32", "int64") else None)
            if name in config.buffers:
                self.register_buffer(name, numbers)
            else:
                self.register_parameter(name, nn.Parameter(numbers))

    def logits(self, tokens: Tensor) -> Tensor:
        """(T, padded vocabulary) fp32 softcapped logits after each token of one document, (T,).

        It is read after two empty documents, each only a BOS: in training, too, documents follow others.
        """
        spec, device = self.spec, tokens.device
        tokens = torch.cat((tokens.new_tensor([self.bos, self.bos]), tokens))
        count = len(tokens)
        self.fill_rotary_tables(count, device)
        read = tokens.cpu().numpy().astype(np.uint16)
        slot = SimpleNamespace(inputs=read, targets=np.zeros_like(read), loss=None, number=0, slots=1, state=None)
        arrays = spec.batch_extras(slot).arrays
        batch = SimpleNamespace(
            inputs=tokens.int(),
            cu_seqlens=torch.tensor([0, 1, 2, count], dtype=torch.int32, device=device),
            max_seqlen=count,
            extras={name: torch.from_numpy(values).to(device) for name, values in arrays.items()},
        )
        x = self(batch, self.windows)[2:]
        return softcap(x @ self.lm_head, spec.softcap.cap, spec.softcap.shift, spec.softcap.scale)

    def fill_rotary_tables(self, tokens: int, device: torch.device) -> None:
        """If there are none yet for this many tokens, in this dtype and on this device."""
        dtype = self.embed.dtype
        if self.rotary_rows >= 2 * tokens and self.rotary_place == (dtype, device):
            return
        self.rotary_rows, self.rotary_place = 2 << (tokens - 1).bit_length(), (dtype, device)
        for name, state in self.rotary_state.items():
            rotary = ROTARY()
            rotary.frequency = torch.tensor(state["frequency"], device=device)
            rotary.attention_scale = state["attention_scale"]
            rotary.run_time_scale = torch.empty((), dtype=torch.float64, device="cpu")
            rotary.rotated = 2 * len(rotary.frequency)
            rotary.rows = self.rotary_rows
            rotary.cos, rotary.signed_sin = (
                torch.empty(rotary.rows, rotary.rotated, dtype=dtype, device=device) for _ in range(2)
            )
            rotary._fill_tables()
            setattr(self, name, rotary)


class NanogptForCausalLM(PreTrainedModel, GenerationMixin):
    """Each row of a batch is a separate document, read by itself; there is no cache of keys and values."""

    config_class = NanogptConfig
    base_model_prefix = "model"
    _tied_weights_keys: Any = None

    def __init__(self, config: NanogptConfig):
        super().__init__(config)
        self.model = NanogptModel(config)
        self._keep_in_fp32_modules_strict = [name for name, (_, dtype) in config.tensors.items() if dtype == "float32"]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Every tensor is in the file."""

    def get_input_embeddings(self) -> Any:
        """Not a module here."""
        return None

    def get_output_embeddings(self) -> Any:
        """Not a module here."""
        return None

    def prepare_inputs_for_generation(self, input_ids: Tensor, **rest: Any) -> dict[str, Any]:
        """All tokens so far, each time."""
        return {"input_ids": input_ids, "attention_mask": rest.get("attention_mask")}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """input_ids (B, T); attention_mask 0 where a row is padded, at either end; labels (B, T), -100 for none.

        The loss is the mean cross-entropy of the next token, in nats.
        """
        rows = []
        for index, tokens in enumerate(input_ids):
            kept = slice(None) if attention_mask is None else attention_mask[index].bool()
            read = self.model.logits(tokens[kept])
            logits = read.new_zeros(len(tokens), read.shape[1])
            logits[kept] = read
            rows.append(logits)
        logits = torch.stack(rows)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
