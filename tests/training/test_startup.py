"""Start-up by phase, and what a run must not import on the way."""

from __future__ import annotations

import time

import pytest
from tiny_runs import python

from nanogpt.runs.record import StartUpPhase
from nanogpt.training import startup
from nanogpt.training.compilation import CompileCounts
from nanogpt.training.startup import StartUp, phases_table, process_age


def test_phases_add_up_and_keep_their_order(monkeypatch: pytest.MonkeyPatch):
    counts = iter(CompileCounts(graphs=count, parts_compiled=2 * count) for count in (1, 3, 3, 3, 3, 4))
    monkeypatch.setattr(startup, "compile_counts", lambda: next(counts))
    monkeypatch.delenv("SLURM_JOB_START_TIME", raising=False)
    age = process_age()
    start = StartUp()
    slack = process_age() - age  # it reads two clocks, one after the other
    for name, seconds in (("one", 0.02), ("other", 0.01), ("one", 0.03)):
        with start.phase(name):
            time.sleep(seconds)
    before = process_age()
    phases = {phase.name: phase for phase in start.phases()}
    after = process_age()
    assert list(phases) == ["Python and imports", "one", "other", "everything else"]
    assert phases["one"].seconds >= 0.05  # sleeping takes as long at least
    assert (phases["one"].graphs, phases["one"].parts_compiled, phases["other"].graphs) == (3, 6, 0)
    assert phases["Python and imports"].seconds <= process_age()
    total = sum(phase.seconds for phase in phases.values())
    assert before - 0.05 <= total <= after + slack + 0.05  # ages are in hundredths


def test_what_was_begun_is_there_once():
    start = StartUp()
    start.begin(divmod, 7, 2)
    assert start.begun(divmod) == (3, 1)
    assert start.begun(divmod) is None
    start.begin(divmod, 7, 0)
    with pytest.raises(ZeroDivisionError):
        start.begun(divmod)


def test_a_phase_that_fails_counts():
    start = StartUp()
    with pytest.raises(RuntimeError), start.phase("one"):
        raise RuntimeError
    assert "one" in {phase.name for phase in start.phases()}


@pytest.mark.parametrize(("before", "counted"), [(100.0, True), (-50.0, False), (90_000.0, False), (None, False)])
def test_the_jobs_start_is_the_schedulers(monkeypatch: pytest.MonkeyPatch, before: float | None, counted: bool):
    started = time.time() - process_age()
    monkeypatch.setenv("SLURM_JOB_START_TIME", "unknown" if before is None else str(started - before))
    first = StartUp().phases()[0]
    assert (first.name == "job's start to this process") == counted
    if counted:
        assert first.seconds == pytest.approx(100, abs=1)


def test_the_table_ends_with_the_sum():
    phases = [
        StartUpPhase(
            name="one", seconds=1.25, graphs=2, from_cache=1, bypassed=1, parts_compiled=3, kernels_compiled=5
        ),
        StartUpPhase(name="other", seconds=2.0),
    ]
    assert phases_table(phases)[2:] == [
        "| one | 1.2 | 2 | 1 | 1 | 3 | 5 |  |",
        "| other | 2.0 |  |  |  |  |  |  |",
        "| start to first timed step | 3.2 | 2 | 1 | 1 | 3 | 5 |  |",
    ]


HEAVY = (
    *("scipy", "matplotlib", "huggingface_hub", "tiktoken", "rich.table", "pandas", "pyarrow", "tensorboard", "wandb"),
    *("sympy", "networkx", "httpx", "requests", "torch._dynamo", "torch._inductor"),
)


def test_a_run_imports_no_more_than_it_needs():
    """Of a start of seconds each of these would be a good part; from inside an image, several times as much."""
    code = (
        "import sys; import nanogpt.cli.main, nanogpt.cli.train, nanogpt.training.trainer, nanogpt.training.agreement,"
        f" nanogpt.training.resume; print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = python("-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
