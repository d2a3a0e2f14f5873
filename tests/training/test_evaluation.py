"""The validation loss of a checkpoint, computed again and by document; of two runs on the same tokens."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_specs import batch_of
from tiny_runs import BOS, FIRST_WITH_PREFIX, language, losses, make_data, tiny_spec, train

from nanogpt.console import print_report
from nanogpt.data.shards import read_tokens, val_name, write_tokens
from nanogpt.data.tokenizer import gpt2_encoding
from nanogpt.data.validation_batches import ValBatches
from nanogpt.errors import InputError, RunError
from nanogpt.kernels import cross_entropy
from nanogpt.models.gpt2 import model as gpt2
from nanogpt.models.speedrun.model import Speedrun
from nanogpt.runs.directory import RunDirectory
from nanogpt.spec import RunSpec
from nanogpt.training.build import build_model
from nanogpt.training.checkpoint import checkpoint_name, save_checkpoint
from nanogpt.training.evaluation import (
    EvaluatedRun,
    Evaluation,
    MeanLoss,
    as_json,
    as_lines,
    evaluate_runs,
    mean_over_documents,
    visible,
)
from nanogpt.training.trained_model import load_trained_model

pytestmark = pytest.mark.usefixtures("one_thread")

CHECKPOINTS = "checkpoint={every: 5, keep: 3, at_end: true}"
MODELS = ("speedrun", "record89", "gpt2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module")
def data89(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("tiny89") / "data", first_token=FIRST_WITH_PREFIX)


@pytest.fixture(scope="module")
def runs(data: Path, data89: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each model, with checkpoints on the way, and one of another seed."""
    parent = tmp_path_factory.mktemp("finished")
    for model in MODELS:
        train(tiny_spec(CHECKPOINTS, model=model), data89 if model == "record89" else data, parent / model)
    train(tiny_spec(CHECKPOINTS, "training.seed=1"), data, parent / "seed1")
    return {name: parent / name for name in (*MODELS, "seed1")}


@pytest.fixture
def data_of(data: Path, data89: Path) -> dict[str, Path]:
    return {"speedrun": data, "record89": data89, "gpt2": data}


def untrained(path: Path, spec: RunSpec) -> Path:
    """A run directory with a checkpoint of the model as it is drawn, and nothing else."""
    run = RunDirectory(RunDirectory.create(path.parent, spec).path.rename(path))
    model = build_model(spec, device="cpu")
    save_checkpoint(run.checkpoint_directory, 1, {"model": model.state_dict()}, keep=1)
    return path


def with_checkpoint_of(run: Path, step: int, path: Path) -> Path:
    """A copy of the run that stopped after `step`."""
    shutil.copytree(run, path)
    for file in (path / "checkpoints").iterdir():
        if file.name != checkpoint_name(step):
            file.unlink()
    return path


# --- the models' losses by token ---


@pytest.mark.parametrize("model", MODELS)
def test_token_losses_are_those_of_the_evaluation(
    model: str, runs: dict[str, Path], data_of: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = load_trained_model(runs[model])
    place: dict[str, Any] = {"tokens": 128, "micro_batch_tokens": 64, "slots": 1, "bos": trained.spec.data.bos}
    place["extras"] = trained.spec.model.batch_extras
    for batch in ValBatches([data_of[model] / val_name()], **place):
        found = trained.model.token_losses(batch, trained.windows)
        assert (found.shape, found.dtype) == ((64,), torch.float32)
        assert found.std() > 0.01
        mean = trained.model.evaluation_loss(batch, trained.windows)
        assert float(found.mean()) == pytest.approx(float(mean), abs=1e-5)
        with monkeypatch.context() as patch:  # chunks, the last of them shorter
            patch.setattr(cross_entropy, "_TOKEN_LOSS_CHUNK", 7)
            patch.setattr(gpt2, "LOSS_CHUNK", 7)
            torch.testing.assert_close(trained.model.token_losses(batch, trained.windows), found, rtol=0, atol=1e-5)


# --- one run ---


@pytest.mark.parametrize("model", MODELS)
def test_the_recorded_loss_is_reproduced(model: str, runs: dict[str, Path], data_of: dict[str, Path]) -> None:
    evaluation = evaluate_runs([runs[model]], data_directory=data_of[model])
    (run,) = evaluation.runs
    step, recorded = max(losses(runs[model])[1].items())
    assert (run.label, run.step, run.total_steps, run.no_record) == (model, step, step, "")
    assert run.recorded == recorded
    assert run.mean.value == pytest.approx(recorded, abs=1e-5)
    assert evaluation.total == 256


def simple_documents(run: Path, model: str, data: Path) -> dict[int, tuple[int, float]]:
    """Tokens and summed loss by position: piece by piece, token by token, in fp64 behind the last layer."""
    trained = load_trained_model(run)
    bos = trained.spec.data.bos
    stream = read_tokens(data / val_name())[:257].astype(np.int64)
    found: dict[int, tuple[int, float]] = {}
    for first in range(0, 256, 64):
        inputs, targets = stream[first : first + 64], stream[first + 1 : first + 65]
        starts = [0, *(t for t in range(1, 64) if inputs[t] == bos)]
        bounds = torch.tensor([*starts, 64, 64], dtype=torch.int32)
        batch = batch_of(trained.spec.model, torch.tensor(inputs), torch.tensor(targets), bounds, 64)
        with torch.no_grad():
            if model == "gpt2":
                x = trained.model(batch, trained.windows)
                logits = x.double() @ trained.model.get_parameter("embed.weight").double().T
            else:
                x = trained.model(batch, trained.windows)
                logits = x.double() @ trained.model.get_parameter("lm_head").double()
                logits = 23 / (1 + torch.exp(-(logits + 5) / 7.5))
        for token, row in enumerate(logits.tolist()):
            loss = math.log(sum(math.exp(z) for z in row)) - row[targets[token]]
            document = first + max(start for start in starts if start <= token)
            count, total = found.get(document, (0, 0.0))
            found[document] = count + 1, total + loss
    return found


@pytest.mark.parametrize("model", MODELS)
def test_documents_are_those_of_a_simple_computation(
    model: str, runs: dict[str, Path], data_of: dict[str, Path]
) -> None:
    expected = simple_documents(runs[model], model, data_of[model])
    evaluation = evaluate_runs([runs[model]], data_directory=data_of[model])
    (run,) = evaluation.runs
    assert evaluation.positions.tolist() == list(expected)
    assert evaluation.tokens.tolist() == [tokens for tokens, _ in expected.values()]
    np.testing.assert_allclose(run.losses, [loss for _, loss in expected.values()], rtol=1e-5)
    # Some begin with a BOS, and some are the rest of one that an edge of the pieces cut.
    begins = evaluation.stream[evaluation.positions] == evaluation.bos
    assert begins.any() and not begins.all()
    assert all(position % 64 == 0 for position in evaluation.positions[~begins])
    assert evaluation.excess.sum() == pytest.approx(0, abs=1e-12)
    heaviest = int(evaluation.excess.argmax())
    tokens, loss = list(expected.values())[heaviest]
    assert evaluation.excess[heaviest] == pytest.approx((loss / tokens - run.mean.value) * tokens / 256, rel=1e-3)


def test_fewer_tokens_are_the_first_ones(runs: dict[str, Path], data: Path) -> None:
    whole, part = (evaluate_runs([runs["speedrun"]], data_directory=data, tokens=tokens) for tokens in (None, 128))
    documents = len(part.tokens)
    assert part.total == 128 and documents < len(whole.tokens)
    np.testing.assert_array_equal(part.runs[0].losses, whole.runs[0].losses[:documents])
    assert part.runs[0].recorded is None
    assert part.runs[0].no_record == "its own validations are of 256 tokens"


@pytest.mark.parametrize(
    ("step", "windows", "no_record"),
    [
        (5, (12, 24), ""),
        (10, (16, 36), "its validation of step 10 used the next stage's windows, not the checkpoint's"),
        (12, (16, 64), ""),
    ],
)
def test_a_checkpoint_on_the_way(
    runs: dict[str, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    windows: tuple[int, int],
    no_record: str,
) -> None:
    """The run validated with the windows of the step to come, which begins a stage after step 10."""
    seen = set()
    original = Speedrun.token_losses

    def spy(self: Speedrun, batch: Any, windows: Any) -> torch.Tensor:
        seen.add((windows.short, windows.long))
        return original(self, batch, windows)

    monkeypatch.setattr(Speedrun, "token_losses", spy)
    path = with_checkpoint_of(runs["speedrun"], step, tmp_path / "run")
    (run,) = evaluate_runs([path], data_directory=data).runs
    assert seen == {windows}
    assert (run.step, run.no_record) == (step, no_record)
    if not no_record:
        assert run.recorded == losses(path)[1][step]
        assert run.mean.value == pytest.approx(run.recorded, abs=1e-5)


def test_what_the_run_did_not_record(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    def no_record(path: Path, data: Path) -> str:
        (run,) = evaluate_runs([path], data_directory=data).runs
        assert run.recorded is None
        return run.no_record

    other = shutil.copytree(data, tmp_path / "other")
    write_tokens(other / val_name(), language(600, 77))
    assert no_record(runs["speedrun"], other) == "its record is for other validation tokens"

    path = shutil.copytree(runs["speedrun"], tmp_path / "run")
    lines = (path / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if not ('"evaluation"' in line and '"step": 12' in line)]
    assert len(kept) == len(lines) - 1
    (path / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    assert no_record(path, data) == "it has no validation loss of step 12"
    (path / "metrics.jsonl").unlink()
    assert no_record(path, data) == "it has no metrics.jsonl"


def test_a_record_that_cannot_be_read_is_no_hindrance(
    runs: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(runs["speedrun"], tmp_path / "run")
    (path / "record.json").write_text("{")
    (run,) = evaluate_runs([path], data_directory=data).runs
    assert run.recorded is not None
    assert "continuing without the record" in capsys.readouterr().err


def test_a_run_for_another_machine(data: Path, tmp_path: Path) -> None:
    """Its attention is of a GPU that is not here, its products of 8 bits: equal ones compute it."""
    setting = "hardware={gpu: h100, gpus_per_node: 1}"
    paths = [
        untrained(tmp_path / "far", tiny_spec(setting, "runtime={dtype: fp32, attention: fa4, head_precision: fp8}")),
        untrained(tmp_path / "near", tiny_spec()),
    ]
    far, near = evaluate_runs(paths, data_directory=data, device="cpu").runs
    np.testing.assert_array_equal(far.losses, near.losses)


# --- two runs ---


def test_two_runs_on_the_same_tokens(runs: dict[str, Path], data: Path) -> None:
    pair = [runs["speedrun"], runs["seed1"]]
    both = evaluate_runs(pair, data_directory=data)
    alone = [evaluate_runs([path], data_directory=data).runs[0] for path in pair]
    for run, other in zip(both.runs, alone, strict=True):
        assert (run.label, run.mean, run.recorded) == (other.label, other.mean, other.recorded)
        np.testing.assert_array_equal(run.losses, other.losses)
    first, second = both.runs
    assert both.difference.value == pytest.approx(second.mean.value - first.mean.value, abs=1e-12)
    assert abs(both.difference.value) > 1e-4
    assert both.contributions.sum() == pytest.approx(both.difference.value, abs=1e-12)
    # The runs find the same documents hard, so pairs tell more than two means side by side.
    assert both.difference.standard_error is not None and first.mean.standard_error is not None
    assert both.difference.standard_error < first.mean.standard_error


def test_runs_that_cut_documents_at_different_places(data: Path, tmp_path: Path) -> None:
    settings = "evaluation={{every: 5, tokens: 768, micro_batch_tokens: {}, target_loss: null}}"
    paths = [untrained(tmp_path / str(size), tiny_spec(settings.format(size))) for size in (64, 96)]
    both = evaluate_runs(paths, data_directory=data, tokens=384)
    alone = [evaluate_runs([path], data_directory=data, tokens=384) for path in paths]
    assert set(both.positions) == set(alone[0].positions) | set(alone[1].positions)
    assert set(alone[0].positions) != set(alone[1].positions)
    for run, other in zip(both.runs, alone, strict=True):
        assert run.mean.value == pytest.approx(other.runs[0].mean.value, abs=1e-9)


def test_names_that_are_alike(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    path = shutil.copytree(runs["seed1"], tmp_path / "speedrun")
    labels = [run.label for run in evaluate_runs([runs["speedrun"], path], data_directory=data).runs]
    assert labels == [str(runs["speedrun"]), str(path)]


# --- statistics and tables, by hand ---


def made_evaluation(*losses: list[float]) -> Evaluation:
    """Documents of 2, 1 and 1 tokens, of which the second's BOS is not there."""
    sizes = np.array([2, 1, 1])
    runs = [
        EvaluatedRun(
            label,
            Path("runs") / label,
            9,
            12,
            np.array(sums),
            mean_over_documents(np.array(sums), sizes),
            recorded,
            why,
        )
        for label, sums, recorded, why in zip("ab", losses, (3.25, None), ("", "it is new"), strict=False)
    ]
    stream = np.array([BOS, 7, 8, BOS, 9], dtype=np.uint16)
    return Evaluation(tuple(runs), stream, np.array([0, 2, 3]), sizes, BOS, 64)


def test_the_standard_error_by_hand() -> None:
    sizes = np.array([2, 1, 1])
    # 12 nats of 4 tokens; the documents are 0, -1 and +1 off what their lengths at 3 nats per token come to.
    found = mean_over_documents(np.array([6.0, 2.0, 4.0]), sizes)
    assert found.value == 3.0 and found.standard_error == pytest.approx(math.sqrt(3 / 2 * (0 + 1 + 1)) / 4)
    # Lengths do not matter where all tokens have one loss.
    assert mean_over_documents(2.5 * np.array([2.0, 1.0, 9.0]), np.array([2, 1, 9])).standard_error == 0
    assert mean_over_documents(np.array([5.0]), np.array([2])) == MeanLoss(2.5, None)


def test_the_standard_error_of_a_difference_by_hand() -> None:
    both = made_evaluation([6.0, 2.0, 4.0], [8.0, 3.0, 4.0])
    # 2, 1 and 0 nats apart, at 3/4 a token: 1/2, 1/4 and -3/4 off.
    error = math.sqrt(3 / 2 * (1 / 4 + 1 / 16 + 9 / 16)) / 4
    assert both.difference == MeanLoss(0.75, pytest.approx(error))
    assert both.contributions.tolist() == [0.5, 0.25, 0.0]


def test_the_table_of_one_run() -> None:
    assert as_lines(made_evaluation([6.0, 2.0, 4.0]), 2) == [
        "4 validation tokens, 3 documents. Losses in nats per token",
        "",
        "| run | step | loss | standard error | recorded by the run | loss - recorded |",
        "| --- | --- | --- | --- | --- | --- |",
        "| a | 9 of 12 | 3.000000 | 0.433013 | 3.250000 | -2.5e-01 |",
        "",
        "Documents that weigh most on the mean; excess = (loss - mean) * tokens / all tokens:",
        "",
        "| position | tokens | loss | excess | share of the mean | text |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 3 | 1 | 4.0000 | +0.250000 | 33.333% |  |",
        "| 0 | 2 | 3.0000 | +0.000000 | 50.000% | 7 |",
    ]


def test_the_table_of_two_runs() -> None:
    lines = as_lines(made_evaluation([6.0, 2.0, 4.0], [6.5, 0.0, 5.0]), 10)
    assert lines[5:9] == [
        "| b | 9 of 12 | 2.875000 | 1.118471 | - | - |",
        "",
        "b: no recorded loss to compare with: it is new",
        "",
    ]
    assert lines[9] == "b - a: -0.125000, standard error 0.707797 (document by document)"
    assert lines[-5:] == [
        "| position | tokens | loss of a | loss of b | contribution | text |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 2 | 1 | 2.0000 | 0.0000 | -0.500000 | ... 8 |",
        "| 3 | 1 | 4.0000 | 5.0000 | +0.250000 |  |",
        "| 0 | 2 | 3.0000 | 3.2500 | +0.125000 | 7 |",
    ]
    assert as_lines(made_evaluation([6.0, 2.0, 4.0], [6.5, 0.0, 5.0]), 0) == lines[:10]


def test_as_json() -> None:
    found = as_json(made_evaluation([6.0, 2.0, 4.0], [8.0, 3.0, 4.0]))
    assert found["tokens"] == 4
    assert [run["loss"] for run in found["runs"]] == [3.0, 3.75]
    assert [run["recorded_loss"] for run in found["runs"]] == [3.25, None]
    assert (found["runs"][0]["step"], found["runs"][0]["total_steps"]) == (9, 12)
    assert found["difference"]["loss"] == 0.75
    assert found["documents"] == [
        {"position": 0, "tokens": 2, "losses": [3.0, 4.0]},
        {"position": 2, "tokens": 1, "losses": [2.0, 3.0]},
        {"position": 3, "tokens": 1, "losses": [4.0, 4.0]},
    ]
    assert as_json(made_evaluation([6.0, 2.0, 4.0]))["difference"] is None
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("caf\u00e9 \U0001f600, a b", "caf\u00e9 \U0001f600, a b"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x1b[31mred\x00", r"\x1b[31mred\x00"),
        ("\u202eright to left\u2028", r"\u202eright to left\u2028"),
        ("a|b", r"a\|b"),
    ],
)
def test_control_characters_are_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_the_text_of_gpt2_tokens(tmp_path: Path) -> None:
    eot = 50256
    texts = ["\U0001f600" * 40, "Up, and to the office, where | all the\nmorning; " * 12]
    tokens = [token for text in texts for token in (eot, *gpt2_encoding().encode_ordinary(text))]
    (tmp_path / "data").mkdir()
    write_tokens(tmp_path / "data" / val_name(), [*tokens, eot])
    vocabulary = ("model.vocab_size=50257", "model.padded_vocab_size=50304", f"data.bos={eot}")
    path = untrained(tmp_path / "run", tiny_spec(*vocabulary, "model.layers=1", model="gpt2"))
    count = len(tokens) // 64 * 64
    evaluation = evaluate_runs([path], data_directory=tmp_path / "data", tokens=count)
    rows = {line.split(" | ")[0].strip("| "): line for line in as_lines(evaluation, 100)}
    # Two tokens each: the piece ends inside the 32nd.
    assert rows["0"].endswith(f" | {chr(0x1F600) * 31}\ufffd |")
    second = tokens.index(eot, 1)
    assert rows[f"{second:,}"].endswith(r" | Up, and to the office, where \| all the\nmorning; Up |")
    cut = (second // 64 + 1) * 64
    rest = gpt2_encoding().decode(tokens[cut : cut + 40])[:50]
    assert rows[f"{cut:,}"].endswith(f" | ... {visible(rest)} |")


# --- the command ---


def printed(evaluation: Evaluation, documents: int) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_report(as_lines(evaluation, documents))
    return out.getvalue()


def test_the_command(
    nanogpt: Any, runs: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOGPT_DATA", str(data))
    outcome = nanogpt("evaluate", runs["speedrun"], runs["seed1"], "--documents", 3, "--out", tmp_path / "all.json")
    assert outcome.code == 0, outcome.err
    evaluation = evaluate_runs([runs["speedrun"], runs["seed1"]], data_directory=data)
    assert printed(evaluation, 3) == outcome.out
    assert json.loads((tmp_path / "all.json").read_text()) == as_json(evaluation)
    assert re.search(r"^speedrun: micro-batches: 4 of 4, \d+ s$", outcome.err, re.MULTILINE)
    assert re.search(r"^seed1: micro-batches: 4 of 4, \d+ s$", outcome.err, re.MULTILINE)
    assert outcome.err.endswith(f"All documents: {tmp_path / 'all.json'}\n")

    outcome = nanogpt("evaluate", runs["gpt2"], "--data", data, "--tokens", 64, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert printed(evaluate_runs([runs["gpt2"]], data_directory=data, tokens=64), 10) == outcome.out
    outcome = nanogpt("evaluate", runs["gpt2"], "--data", data, "--tokens", 64, "--device", "cpu", "--json")
    assert json.loads(outcome.out) == as_json(evaluate_runs([runs["gpt2"]], data_directory=data, tokens=64))


def test_shards_are_where_the_run_read_them_or_where_train_would_look(
    nanogpt: Any, runs: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NANOGPT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert nanogpt("evaluate", runs["speedrun"]).code == 0

    moved = shutil.copytree(runs["speedrun"], tmp_path / "moved")
    record = json.loads((moved / "record.json").read_text())
    assert record["data"]["directory"] == str(data)
    record["data"]["directory"] = str(tmp_path / "gone")
    (moved / "record.json").write_text(json.dumps(record))
    outcome = nanogpt("evaluate", moved)
    assert outcome.code == 2 and re.search(r"fineweb10B: no fineweb_val_\*.bin there. .* --data", outcome.err)
    monkeypatch.setenv("NANOGPT_DATA", str(data))
    assert nanogpt("evaluate", moved).code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere: no such run directory"),
        (("{speedrun}", "{record89}"), "model.vocab_size is 320, that of .*speedrun is 64"),
        (("{speedrun}", "--data", "{empty}"), r"no fineweb_val_\*.bin there. .* --data"),
        (
            ("{speedrun}", "--data", "{data89}"),
            r"token [\d,]+ \(from 0\) is \d+, the vocabulary is 0\.\.63 \(model.vocab_size\)",
        ),
        (("{speedrun}", "--tokens", 100), "--tokens: 100 tokens do not fill micro-batches of 64 .* such as 64$"),
        (("{speedrun}", "--tokens", 200), "such as 192$"),
        (("{speedrun}", "--tokens", -64), "such as 64$"),
        (("{speedrun}", "--tokens", 640), "641 are needed .*--tokens N"),
        (("{speedrun}", "--device", "tpu"), "--device: found tpu, expected cpu or cuda"),
        (("{speedrun}", "--out", "{empty}"), "--out: .*: expected a file's name"),
        (("{speedrun}", "--out", "{empty}/no/file.json"), "--out: .*: expected a file's name"),
        (("{speedrun}", "--documents", -1), "--documents"),
    ],
)
def test_what_is_refused(
    nanogpt: Any, runs: dict[str, Path], data: Path, data89: Path, tmp_path: Path, arguments: Any, message: str
) -> None:
    places = {**runs, "data89": data89, "empty": tmp_path}
    words = [str(word).format(**places) for word in arguments]
    outcome = nanogpt("evaluate", *words, *([] if "--data" in words else ["--data", data]))
    assert (outcome.code, outcome.out) == (2, "")
    assert re.search(message, outcome.err.strip()), outcome.err


def test_more_that_is_refused(
    runs: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunDirectory.create(tmp_path, tiny_spec()).path.rename(tmp_path / "bare")
    for pair in ([tmp_path / "bare"], [runs["speedrun"], tmp_path / "bare"]):
        with pytest.raises(InputError, match=r"bare: has no checkpoint; .* checkpoint.at_end"):
            evaluate_runs(pair, data_directory=data)

    RunDirectory.create(tmp_path, tiny_spec("data.bos=5")).path.rename(tmp_path / "other")
    with pytest.raises(InputError, match=r"other: data.bos is 5, that of .*speedrun is 63"):
        evaluate_runs([runs["speedrun"], tmp_path / "other"], data_directory=data)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device: PyTorch sees no GPU here"):
        evaluate_runs([runs["speedrun"]], data_directory=data, device="cuda")


def test_losses_that_are_not_finite(data: Path, tmp_path: Path) -> None:
    path = untrained(tmp_path / "run", tiny_spec(model="gpt2"))
    model = load_trained_model(path).model
    model.get_parameter("ln_f.bias").data[0] = math.nan
    save_checkpoint(path / "checkpoints", 2, {"model": model.state_dict()}, keep=1)
    with pytest.raises(RunError, match="checkpoint of step 2 gives losses that are not finite"):
        evaluate_runs([path], data_directory=data)
