"""Documents that are read for themselves, and not as a stretch of a training stream.

Before its first token the record models look at the end of the document before: its embedding (smear), its token
(bigrams), its keys (where they are shifted). Here that are two empty documents, each a lone BOS. The first takes what
stands before it; the second is the same wherever it stands, and so is all that a document reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nanogpt.data.micro_batches import MicroBatch
from nanogpt.models.model_spec import BaseModelSpec, Slot

EMPTY = 2  # empty documents before each
MULTIPLE = 16  # what the GPU's products and kernels like a micro-batch to be filled up to


def separate_documents(
    documents: Sequence[Sequence[int]],
    spec: BaseModelSpec,
    bos: int,
    device: torch.device | str,
    *,
    multiple: int = MULTIPLE,
) -> tuple[MicroBatch, list[int]]:
    """A micro-batch of documents of at least one token, each behind EMPTY empty ones, and where each begins.

    The targets are each document's own next tokens; that of its last token is BOS. Filled up with
    empty documents to a multiple of `multiple` tokens.
    """
    stream: list[int] = []
    bounds, starts = [0], []
    for document in documents:
        for _ in range(EMPTY):
            stream.append(bos)
            bounds.append(len(stream))
        starts.append(len(stream))
        stream += document
        bounds.append(len(stream))
    count = len(stream)
    padding = -count % multiple
    tokens = np.array([*stream, *[bos] * padding], dtype=np.uint16)
    bounds += range(count + 1, count + padding + 1)
    arrays = spec.batch_extras(Slot(tokens, np.zeros_like(tokens))).arrays
    extras = {name: torch.from_numpy(values).to(device) for name, values in arrays.items()}
    inputs = torch.from_numpy(tokens.astype(np.int64))
    batch = MicroBatch(
        inputs.int().to(device),
        torch.cat((inputs[1:], inputs.new_tensor([bos]))).to(device),
        torch.tensor(bounds, dtype=torch.int32, device=device),
        max(map(len, documents)),
        extras,
    )
    return batch, starts
