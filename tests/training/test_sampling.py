"""Text from a run's checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from small_specs import batch_of
from tiny_runs import BOS, VOCABULARY, make_data, tiny_spec, train
from untrained_runs import KINDS, gpt2_tokens_spec, untrained_run

from nanogpt.data.tokenizer import gpt2_encoding
from nanogpt.errors import InputError
from nanogpt.models.speedrun.model import Speedrun
from nanogpt.runs.directory import RunDirectory
from nanogpt.training import checkpoint
from nanogpt.training.sampling import Reader, sample_text, sample_texts
from nanogpt.training.trained_model import load_trained_model

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
    tokens = [BOS, BOS, BOS, *prompt]  # two empty documents before it
    for _ in range(count):
        length = len(tokens)
        bounds = torch.tensor([0, 1, 2, length, length], dtype=torch.int32)
        batch = batch_of(spec.model, torch.tensor(tokens), torch.zeros(length, dtype=torch.int64), bounds, length)
        tokens.append(int(model.next_token_logits(batch, Windows(16, 64)).argmax()))
    return tokens[3:]


def test_temperature_zero_takes_the_likeliest(run: Path) -> None:
    encoding = gpt2_encoding()
    expected = greedy(run, encoding.encode_ordinary(PROMPT), 14)
    expected = expected[: expected.index(BOS)] if BOS in expected else expected
    text = sample_text(run, PROMPT, tokens=14, temperature=0, seed=0)
    assert encoding.encode_ordinary(PROMPT) == [32, 16, 33]
    assert text == "".join(chr(33 + token) for token in expected)
    assert sample_text(run, PROMPT, tokens=14, temperature=0, seed=5) == text
    assert sample_text(run, PROMPT, tokens=14, temperature=1.0, top_k=1, seed=7) == text


def answers(monkeypatch: pytest.MonkeyPatch, *tokens: int) -> list[tuple[int, int]]:
    """The model is sure of these next tokens, then of the last forever.

    Returns how many tokens of the text each call reads, and how many it has read before.
    """
    seen: list[tuple[int, int]] = []

    def logits(self: Speedrun, batch: Any, windows: Any, past: Any) -> torch.Tensor:
        new, before = int(batch.cu_seqlens[-1] - batch.cu_seqlens[-2]), max(0, past.length - past.start)
        past.advance(len(batch.inputs))
        seen.append((new, before))
        return torch.nn.functional.one_hot(torch.tensor(tokens[min(len(seen), len(tokens)) - 1]), VOCABULARY) * 100.0

    monkeypatch.setattr(Speedrun, "next_token_logits", logits)
    return seen


def test_the_text_ends_with_the_document(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = answers(monkeypatch, 5, 6, BOS, 7)
    assert sample_text(run, PROMPT, tokens=50) == PROMPT + "&'"
    assert seen == [(4, 0), (1, 4), (1, 5)]


def test_an_empty_prompt_begins_a_document(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = answers(monkeypatch, 5)
    assert sample_text(run, "", tokens=3) == "&&&"
    assert seen == [(1, 0), (1, 1), (1, 2)]


def test_a_long_text_is_read_anew_from_its_latter_half(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model reads no longer documents than it was trained on: 48 tokens here."""
    seen = answers(monkeypatch, 5)
    sample_text(run, "A1B2" * 11, tokens=7)
    assert seen == [(45, 0), (1, 45), (1, 46), (1, 47), (24, 0), (1, 24), (1, 25)]
    seen.clear()
    sample_text(run, "A1B2" * 20, tokens=2)
    assert seen == [(48, 0), (24, 0)]


@pytest.fixture(scope="module")
def random_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each model one whose every parameter counts."""
    home = tmp_path_factory.mktemp("random")
    return {kind: untrained_run(home / kind, gpt2_tokens_spec(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_changes_nothing(random_runs: dict[str, Path], kind: str) -> None:
    """Logits of a text that grows by one token or several, past the longest document, in fp64."""
    trained = load_trained_model(random_runs[kind])
    trained.model.double()
    tokens = [50256, *np.random.default_rng(0).integers(0, 50256, 70).tolist()]
    cached, slow = Reader(trained), Reader(trained, cache=False)
    lengths = [3, 4, 5, 9, *range(10, 71)]
    largest = 0.0
    for length in lengths:
        one, other = cached.logits_after(tokens[:length]), slow.logits_after(tokens[:length])
        assert (one - other).abs().max() < 1e-5, length
        largest = max(largest, other.abs().max().item())
    assert cached.first == slow.first
    assert cast(int, cached.first) > 0 and largest > 3
    changed = [*tokens[:20], 7, *tokens[21:40]]
    assert (Reader(trained).logits_after(changed) - Reader(trained).logits_after(tokens[:40])).abs().max() > 1e-3


def test_several_prompts_are_written_by_themselves(run: Path) -> None:
    written: list[str] = []
    settings = {"tokens": 9, "temperature": 1.5, "device": "cpu"}
    samples = sample_texts(run, [PROMPT, "B2"], seed=4, stream=written.append, **settings)
    assert samples.texts == tuple(
        sample_text(run, prompt, seed=4 + index, **settings) for index, prompt in enumerate((PROMPT, "B2"))
    )
    assert "".join(written) == f"{samples.texts[0]}\n\n{samples.texts[1]}\n"
    assert len(written) > samples.tokens
    assert samples.seconds > 0 and samples.device == "cpu"


def test_characters_of_several_tokens_are_streamed_whole(
    random_runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rocket is four bytes in three tokens; the last one is half a character."""
    rocket = gpt2_encoding().encode_ordinary("\U0001f680")
    assert len(rocket) > 1
    tokens = [*rocket, rocket[0], 50256]
    counter = iter(tokens)
    monkeypatch.setattr(
        "nanogpt.training.sampling.Reader.logits_after",
        lambda *_: torch.nn.functional.one_hot(torch.tensor(next(counter)), 50257) * 100.0,
    )
    written: list[str] = []
    samples = sample_texts(random_runs["gpt2"], ["A"], temperature=0, device="cpu", stream=written.append)
    assert samples.texts == (gpt2_encoding().decode([32, *tokens[:-1]]),)
    assert "".join(written) == samples.texts[0] + "\n"
    assert "\U0001f680" in written


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

    def spy(self: Speedrun, batch: Any, windows: Any, past: Any) -> torch.Tensor:
        seen.append((windows.short, windows.long))
        return original(self, batch, windows, past)

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
