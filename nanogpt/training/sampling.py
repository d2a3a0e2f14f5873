"""Text from a run's model: sample the next token again and again.

Each token is read once: the model caches keys, values and whatever else later tokens look back at
(`nanogpt.layers.past`). When a text outgrows training's longest document, the model continues from its second half.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanogpt.data.micro_batches import MicroBatch
from nanogpt.errors import InputError
from nanogpt.layers.past import Past
from nanogpt.models.model_spec import Slot
from nanogpt.runs.directory import RunDirectory
from nanogpt.training.separate_documents import separate_documents
from nanogpt.training.trained_model import TrainedModel, evaluating_implementations, find_device, load_trained_model


@dataclass(frozen=True)
class Samples:
    """What was written."""

    texts: tuple[str, ...]  # prompt and continuation
    tokens: int  # drawn, over all texts
    seconds: float  # to draw them, without loading the model
    device: str


def sample_texts(
    run_directory: Path,
    prompts: Sequence[str],
    *,
    tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    device: str | None = None,
    cache: bool = True,
    stream: Callable[[str], None] | None = None,
) -> Samples:
    """Continue each prompt by `tokens` tokens with the newest checkpoint of a run.

    Each token is sampled from the `top_k` likeliest at `temperature` (0 takes the likeliest). A text ends early at the
    end of its document. The model reads at most the run's maximum document length.

    Args:
        run_directory: the run's.
        prompts: the n-th one's seed is `seed` + n, from 0.
        tokens: at most, for each prompt.
        temperature: of sampling.
        top_k: tokens to sample from.
        seed: the same seed gives the same texts.
        device: cpu or cuda; None: a GPU if there is one.
        cache: False reads the whole context again for each token.
        stream: called with each piece of text as it is written: an empty line between texts, the prompt, then one or
            more tokens, and a newline.

    Raises:
        InputError: no run, no checkpoint, a prompt with unknown tokens, or settings out of range.
    """
    from nanogpt.data.tokenizer import gpt2_encoding

    if tokens < 1 or temperature < 0 or top_k < 1:
        raise InputError(f"tokens {tokens}, temperature {temperature}, top_k {top_k}: must be >= 1, >= 0, >= 1")
    place = find_device(device)
    encoding, write = gpt2_encoding(), stream or (lambda text: None)
    spec = RunDirectory.open(run_directory).spec()
    trained = load_trained_model(run_directory, device=place, implementations=evaluating_implementations(spec, place))
    starts = [[spec.data.bos, *encoding.encode_ordinary(prompt)] for prompt in prompts]
    for start in starts:
        if max(start) >= spec.model.vocab_size:
            raise InputError(
                f"{trained.run.path}: the prompt has token {max(start)}, the model a vocabulary of"
                f" {spec.model.vocab_size}; it was not trained on GPT-2's tokens"
            )
    texts, drawn, began = [], 0, time.perf_counter()
    for index, (prompt, history) in enumerate(zip(prompts, starts, strict=True)):
        generator = torch.Generator().manual_seed(seed + index)
        reader, decoder = Reader(trained, cache=cache), codecs.getincrementaldecoder("utf-8")("replace")
        text = prompt
        write(f"\n{prompt}" if index else prompt)
        for _ in range(tokens):
            token = _draw(reader.logits_after(history).cpu(), temperature, top_k, generator)
            drawn += 1
            if token == spec.data.bos:
                break
            history.append(token)
            piece = decoder.decode(encoding.decode_single_token_bytes(token))
            text += piece
            write(piece)
        rest = decoder.decode(b"", final=True)
        write(f"{rest}\n")
        texts.append(text + rest)
    return Samples(tuple(texts), drawn, time.perf_counter() - began, place.type)


def sample_text(run_directory: Path, prompt: str, **settings: object) -> str:
    """The text of one prompt; see `sample_texts`."""
    return sample_texts(run_directory, [prompt], **settings).texts[0]  # type: ignore[arg-type]


class Reader:
    """Reads a text as it grows, each token once with `cache`."""

    def __init__(self, trained: TrainedModel, *, cache: bool = True):
        self.trained = trained
        self.cache = cache
        self.first: int | None = None  # token of the text from which it is read
        self.past: Past | None = None
        self.read = 0  # tokens of the text in `past`

    def logits_after(self, history: list[int]) -> Tensor:
        """(vocab_size,) fp32: the logits after the text so far, which extends that of the previous call."""
        trained, count = self.trained, len(history)
        if self.first is None:
            self.first = max(0, count - trained.longest)
        elif count - self.first > trained.longest:
            self.first, self.past = count - trained.longest // 2, None
        model, spec, device = trained.model, trained.spec, next(trained.model.parameters()).device
        if self.past is not None:
            new = history[self.read :]
            batch = following(history[self.first :], len(new), trained, device)
        else:
            document = [history[self.first :]]
            batch, (start,) = separate_documents(document, spec.model, spec.data.bos, device, multiple=1)
            self.past = Past(start) if self.cache else None
        self.read = count
        return model.next_token_logits(batch, trained.windows, self.past)


def following(document: list[int], new: int, trained: TrainedModel, device: torch.device) -> MicroBatch:
    """The last `new` tokens of a document as a micro-batch, with the model's extra inputs."""
    tokens = np.array(document, dtype=np.uint16)
    arrays = trained.spec.model.batch_extras(Slot(tokens, np.zeros_like(tokens))).arrays
    inputs = torch.from_numpy(tokens[-new:].astype(np.int64)).to(device)
    bounds = torch.tensor([0, new], dtype=torch.int32, device=device)
    last = {name: torch.from_numpy(values[..., -new:].copy()).to(device) for name, values in arrays.items()}
    return MicroBatch(inputs.int(), torch.zeros_like(inputs), bounds, new, last)


def _draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    values, tokens = logits.topk(min(top_k, logits.numel()))
    choice = torch.multinomial((values / temperature).softmax(0), 1, generator=generator)
    return int(tokens[choice])
