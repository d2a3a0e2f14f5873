"""Text from a run's checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_specs import batch_of
from tiny_runs import BOS, VOCABULARY, make_data, tiny_spec, train

from nanogpt.data.tokenizer import gpt2_encoding
from nanogpt.errors import InputError
from nanogpt.models.speedrun.model import Speedrun
from nanogpt.runs.directory import RunDirectory
from nanogpt.training import checkpoint
from nanogpt.training.sampling import sample_text

pytestmark = pytest.mark.usefixtures("one_thread")

# Token i of GPT-2's first 94 is the character 33 + i, so the tiny vocabulary writes ! to _.
PROMPT = "A1B"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a checkpoint of each of its last steps."""
    path = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_spec("checkpoint={every: 1, keep: 3, at_end: true}"), data, path)
    return path


def test_the_seed_decides_the_text(run: Path) -> None:
    texts = {seed: sample_text(run, PROMPT, tokens=30, temperature=1.5, seed=seed) for seed in (0, 1, 2)}
    assert len(set(texts.values())) == 3
    for seed, text in texts.items():
        assert sample_text(run, PROMPT, tokens=30, temperature=1.5, seed=seed) == text
        assert text.startswith(PROMPT)
        assert re.fullmatch(r"[!-_]*", text)
        assert len(text) <= len(PROMPT) + 30


def greedy(run: Path, prompt: list[int], count: int) -> list[int]:
    """The likeliest next token again and again, by a model whose documents fill the micro-batch exactly or not."""
    spec = RunDirectory.open(run).spec()
    state = checkpoint.load_newest_checkpoint(run / "checkpoints")
    assert state is not None
    from nanogpt.models.language_model import Windows
    from nanogpt.training.build import build_model

    model = build_model(spec, device="cpu")
    model.load_state_dict(state["model"])
    tokens = [BOS, *prompt]
    for _ in range(count):
        length = len(tokens)
        bounds = torch.tensor([0, length, length], dtype=torch.int32)
        batch = batch_of(spec.model, torch.tensor(tokens), torch.zeros(length, dtype=torch.int64), bounds, length)
        tokens.append(int(model.next_token_logits(batch, Windows(16, 64)).argmax()))
    return tokens[1:]


def test_temperature_zero_takes_the_likeliest(run: Path) -> None:
    encoding = gpt2_encoding()
    # 15 tokens in all: one more than fills the sampler's micro-batch of 16 with BOS in front, so both cases occur.
    expected = greedy(run, encoding.encode_ordinary(PROMPT), 14)
    expected = expected[: expected.index(BOS)] if BOS in expected else expected
    text = sample_text(run, PROMPT, tokens=14, temperature=0, seed=0)
    assert encoding.encode_ordinary(PROMPT) == [32, 16, 33]
    assert text == "".join(chr(33 + token) for token in expected)
    assert sample_text(run, PROMPT, tokens=14, temperature=0, seed=5) == text
    assert sample_text(run, PROMPT, tokens=14, temperature=1.0, top_k=1, seed=7) == text


def answers(monkeypatch: pytest.MonkeyPatch, *tokens: int) -> list[int]:
    """The model is sure of these next tokens, then of the last for ever; returns the contexts' lengths as they come."""
    seen: list[int] = []

    def logits(self: Speedrun, batch: Any, windows: Any) -> torch.Tensor:
        seen.append(int(batch.cu_seqlens[-1] - batch.cu_seqlens[-3]))
        return torch.nn.functional.one_hot(torch.tensor(tokens[min(len(seen), len(tokens)) - 1]), VOCABULARY) * 100.0

    monkeypatch.setattr(Speedrun, "next_token_logits", logits)
    return seen


def test_the_text_ends_with_the_document(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = answers(monkeypatch, 5, 6, BOS, 7)
    assert sample_text(run, PROMPT, tokens=50) == PROMPT + "&'"
    assert seen == [4, 5, 6]


def test_an_empty_prompt_begins_a_document(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = answers(monkeypatch, 5)
    assert sample_text(run, "", tokens=3) == "&&&"
    assert seen == [1, 2, 3]


def test_a_long_text_is_read_from_its_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model reads no longer documents than it was trained on: 48 tokens here."""
    seen = answers(monkeypatch, 5)
    sample_text(run, "A1B2" * 11, tokens=8)
    assert seen == [45, 46, 47, 48, 48, 48, 48, 48]


def test_a_document_length_beyond_the_rotary_tables(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(tiny_spec("checkpoint={at_end: true}", "training.max_document_tokens=4000"), data, path)
    assert sample_text(path, "A1B2" * 40, tokens=8).startswith("A1B2" * 40)


@pytest.mark.parametrize(("step", "windows"), [(10, (16, 36)), (11, (16, 40)), (12, (16, 64))])
def test_windows_are_those_of_the_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: int, windows: tuple[int, int]
) -> None:
    """Step 10 begins a stage, of which the checkpoint before it knows nothing. The end has those of its validation."""
    path = tmp_path / "run"
    (path / "checkpoints").mkdir(parents=True)
    (path / "spec.yaml").write_bytes((run / "spec.yaml").read_bytes())
    name = checkpoint.checkpoint_name(step)
    (path / "checkpoints" / name).write_bytes((run / "checkpoints" / name).read_bytes())
    seen = []
    original = Speedrun.next_token_logits

    def spy(self: Speedrun, batch: Any, windows: Any) -> torch.Tensor:
        seen.append((windows.short, windows.long))
        return original(self, batch, windows)

    monkeypatch.setattr(Speedrun, "next_token_logits", spy)
    sample_text(path, PROMPT, tokens=1)
    assert seen == [windows]


def test_gpt2_writes_too(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(tiny_spec("checkpoint={at_end: true}", model="gpt2"), data, path)
    text = sample_text(path, PROMPT, tokens=40, temperature=1.0, top_k=1000)
    assert text.startswith(PROMPT)
    assert text == sample_text(path, PROMPT, tokens=40, temperature=1.0, top_k=1000)


def test_draws_follow_the_model(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At temperature 0.5 a token twice as likely is drawn four times as often; top_k leaves out the rest."""
    logits = torch.full((VOCABULARY,), -20.0)
    logits[3], logits[4], logits[5] = np.log(2.0), 0.0, -0.5
    monkeypatch.setattr(Speedrun, "next_token_logits", lambda *_: logits)
    text = sample_text(run, "", tokens=3000, temperature=0.5, top_k=2)
    counts = {letter: text.count(letter) for letter in "$%&"}
    assert counts["&"] == 0
    assert counts["$"] + counts["%"] == 3000
    assert counts["$"] / 3000 == pytest.approx(0.8, abs=0.03)


def test_a_prompt_of_other_tokens(run: Path) -> None:
    with pytest.raises(InputError, match="the prompt has token 24694, the model a vocabulary of 64"):
        sample_text(run, "ABC")


def test_no_checkpoint(data: Path, tmp_path: Path) -> None:
    train(tiny_spec(), data, tmp_path / "run")
    with pytest.raises(InputError, match="has no checkpoint"):
        sample_text(tmp_path / "run", PROMPT)
    with pytest.raises(InputError, match="no such run directory"):
        sample_text(tmp_path / "other", PROMPT)


@pytest.mark.parametrize("settings", [{"tokens": 0}, {"temperature": -0.1}, {"top_k": 0}])
def test_settings_out_of_range(run: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be >= 1, >= 0, >= 1"):
        sample_text(run, PROMPT, **settings)
