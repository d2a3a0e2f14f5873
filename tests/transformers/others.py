"""What others do with an export, run by a Python that has no nanogpt: others.py '["FUNCTION", "ARGUMENT", ...]'."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

TEXTS = (
    "Hello, world! It's 12 o'clock; they'll've gone.\n\n\tTabs  and   spaces \u00a0\u3000.",
    "Stra\u00dfe, na\u00efve, \u4f60\u597d, \u0645\u0631\u062d\u0628\u0627, \U0001f680 1234567 ---!!!",
    "def f(x):\n    return x ** 2  # \u2211\r\n" + " " * 9,
)


def logits(directory: str, dtype: str, out: str) -> Any:
    """Loads model and tokenizer; saves the logits of two rows of tokens, whole and padded at either end, to `out`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=dtype).eval()
    tokens = torch.randint(0, 50257, (2, 30))
    tokens[:, 0] = tokenizer.bos_token_id
    with torch.no_grad():
        whole = model(tokens, labels=tokens)
        padded = []
        for side in ("left", "right"):
            rows = torch.full((2, 32), 0)
            mask = torch.zeros_like(rows)
            for row, length in zip(range(2), (30, 21), strict=True):
                place = slice(32 - length, 32) if side == "left" else slice(length)
                rows[row, place], mask[row, place] = tokens[row, :length], 1
            read = model(rows, attention_mask=mask).logits
            padded.append([read[row, mask[row].bool()] for row in range(2)])
        written = model.generate(tokens[:1, :8], max_new_tokens=12, do_sample=False, pad_token_id=50256)
    torch.save({"tokens": tokens, "logits": whole.logits, "padded": padded, "written": written}, out)
    return {
        "class": type(model).__name__,
        "loss": whole.loss.item(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtypes": sorted({str(v.dtype) for v in model.state_dict().values() if v.is_floating_point()}),
        "texts": [[tokenizer(text)["input_ids"], tokenizer.decode(tokenizer(text)["input_ids"])] for text in TEXTS],
    }


def tensors(directory: str) -> Any:
    """Name -> shape and dtype by the safetensors package."""
    from safetensors import safe_open

    with safe_open(Path(directory) / "model.safetensors", "pt") as file:
        return {name: [list(file.get_tensor(name).shape), str(file.get_tensor(name).dtype)] for name in file.keys()}  # noqa: SIM118


def hellaswag(directory: str, items: str, bos: str) -> Any:
    """lm-eval's accuracies with standard errors, and its log-probabilities, by its own rules for HellaSwag."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag.utils import process_docs

    task = {
        "task": "hellaswag_of_file",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": items}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "process_docs": process_docs,
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    model = HFLM(pretrained=directory, dtype="float32", device="cpu", batch_size=16, add_bos_token=bos == "bos")
    results = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=2, log_samples=True)
    samples = sorted(results["samples"]["hellaswag_of_file"], key=lambda sample: sample["doc_id"])
    scores = results["results"]["hellaswag_of_file"]
    return {
        "log_probabilities": [[response[0] for response in sample["filtered_resps"]] for sample in samples],
        **{name: scores[f"{name},none"] for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")},
    }


if __name__ == "__main__":
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("nanogpt.errors")
        sys.exit("nanogpt can be imported here")
    function, *arguments = json.loads(sys.argv[1])
    print(json.dumps(globals()[function](*arguments)))
