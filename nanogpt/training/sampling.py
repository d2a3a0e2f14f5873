"""Text from a finished run: the next token drawn again and again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanogpt.data.batches import MicroBatch
from nanogpt.errors import InputError
from nanogpt.models.model_spec import Slot
from nanogpt.spec import RunSpec
from nanogpt.training.trained_model import load_trained_model

PIECE = 16  # contexts are read in multiples of this many tokens


def sample_text(
    run_directory: Path,
    prompt: str,
    *,
    tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    device: str = "cpu",
) -> str:
    """Continue `prompt` by `tokens` tokens with the newest checkpoint of a run; returns prompt and continuation.

    Each token is drawn from the `top_k` likeliest at `temperature` (0 takes the likeliest). Generation ends early at
    the end of a document. The model reads at most the run's maximum document length.

    Raises:
        InputError: no run there, no checkpoint in it, or settings out of range.
    """
    from nanogpt.data.tokenizer import gpt2_encoding

    if tokens < 1 or temperature < 0 or top_k < 1:
        raise InputError(f"tokens {tokens}, temperature {temperature}, top_k {top_k}: must be >= 1, >= 0, >= 1")
    trained = load_trained_model(run_directory, device=device)
    spec = trained.spec

    encoding = gpt2_encoding()
    context_length = min(spec.training.max_document_tokens, spec.evaluation.micro_batch_tokens)
    generator = torch.Generator().manual_seed(seed)
    history = [spec.data.bos, *encoding.encode_ordinary(prompt)]
    if max(history) >= spec.model.vocab_size:
        raise InputError(
            f"{trained.run.path}: the prompt has token {max(history)}, the model a vocabulary of"
            f" {spec.model.vocab_size}; it was not trained on GPT-2's tokens"
        )
    first = len(history)
    for _ in range(tokens):
        context = _context(history[-context_length:], spec, device)
        logits = trained.model.next_token_logits(context, trained.windows).cpu()
        token = _draw(logits, temperature, top_k, generator)
        if token == spec.data.bos:
            break
        history.append(token)
    return prompt + encoding.decode(history[first:])


def _context(history: list[int], spec: RunSpec, device: str) -> MicroBatch:
    """The tokens so far as one document, padded at the front with documents of one token."""
    padding = -len(history) % PIECE
    tokens = np.array([spec.data.bos] * padding + history, dtype=np.uint16)
    count = len(tokens)
    arrays = spec.model.batch_extras(Slot(tokens, np.zeros_like(tokens))).arrays
    extras = {name: torch.from_numpy(values).to(device) for name, values in arrays.items()}
    inputs = torch.from_numpy(tokens.astype(np.int32)).to(device)
    bounds = torch.tensor([*range(padding + 1), count, count], dtype=torch.int32, device=device)
    return MicroBatch(inputs, torch.zeros(count, dtype=torch.int64, device=device), bounds, count, extras)


def _draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    values, tokens = logits.topk(min(top_k, logits.numel()))
    choice = torch.multinomial((values / temperature).softmax(0), 1, generator=generator)
    return int(tokens[choice])
