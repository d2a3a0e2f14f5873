"""The report of runs: one page that needs neither network nor server, for people who were not there.

What ran, on what, the result against the target, curves to zoom into, times by stage, how the runs differ,
the check of the rules, significance, and where code, data and software come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanogpt.errors import InputError, RunError
from nanogpt.pages.figures import PALETTES, run_figures
from nanogpt.pages.page import render
from nanogpt.recipe import publishable_spec
from nanogpt.runs.check import check_run
from nanogpt.runs.compare import comparison_data
from nanogpt.runs.directory import write_whole
from nanogpt.runs.display import ms_text
from nanogpt.runs.loaded import IDENTITY_KEYS, LoadedRun, differences, show
from nanogpt.runs.record import Record
from nanogpt.runs.significance import repeated_seeds, runs_significance, significance_data
from nanogpt.runs.table import run_summary

Facts = list[tuple[str, str]]
CLEAN = {True: "", False: ", with changes", None: ", whether clean is not known"}
MOST_VALUES = 8  # listed for a key
FEW_RUNS = 3  # named beside a value


def write_report(runs: Sequence[LoadedRun], out: Path, **options: Any) -> None:
    """Write the report of `runs` to the file `out`; options: those of `report_page`.

    Raises RunError if it cannot be written.
    """
    text = report_page(runs, **options)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, text)
    except OSError as error:
        raise RunError(
            f"{out}: the report cannot be written: {error.strerror}; name another file with --out"
        ) from error


def report_page(
    runs: Sequence[LoadedRun],
    *,
    left_out: Sequence[str] = (),
    title: str | None = None,
    plotly: str | None = None,
    back: str | None = None,
) -> str:
    """The page as HTML.

    Args:
        runs: one or more.
        left_out: the reasons why other runs are not in it.
        title: None: the runs' names.
        plotly: address of plotly.js, relative to the page; None puts it into the page, 5 MB.
        back: address of the page that links here.
    """
    several = len(runs) > 1
    figures = run_figures(runs)
    return render(
        "report.html",
        figures={"figures": figures, "palettes": PALETTES} if figures else None,
        plotly=plotly,
        title=title or (runs[0].label if not several else f"{len(runs)} runs: {_common_name(runs)}"),
        back=back,
        runs=[_run(run) for run in runs],
        charts=[{"id": figure["id"], "title": figure["title"]} for figure in figures],
        stages=_stages(runs),
        differences=_differences(runs) if several else [],
        tests=_tests(runs),
        left_out=list(left_out),
    )


def _common_name(runs: Sequence[LoadedRun]) -> str:
    return ", ".join(dict.fromkeys(run.spec.name for run in runs))


def _run(run: LoadedRun) -> dict[str, Any]:
    """What the template shows of a run, as text."""
    summary, record = run_summary(run.metrics), run.record
    seconds, steps, total = run.train_seconds, summary["steps"], summary["total_steps"]
    checks = check_run(run)
    return {
        "label": run.label,
        "recipe": run.spec.name,
        "state": run.state,
        "reason": run.why_unfinished,
        "seed": run.spec.training.seed,
        "loss": _number(run.final_loss, "{:.4f}"),
        "target": _against_target(run),
        "seconds": _number(seconds, "{:,.2f}"),
        "ms_per_step": _ms(None if seconds is None or not steps else 1000 * seconds / steps),
        "steps": f"{steps:,}" + ("" if total in (None, steps) else f" of {total:,}"),
        "tokens": _number(summary["tokens"], "{:,}"),
        "hardware": _hardware(run),
        "checks": checks,
        "counts": {state: sum(check.state == state for check in checks) for state in ("passed", "failed", "unknown")},
        "provenance": [] if record is None else _provenance(record),
        "start_up": [] if record is None else record.starts[-1].start_up,
        "changes": [] if record is None else [(c.key, show(c.base), show(c.run)) for c in record.spec_differences],
        "base_recipe": None if record is None else record.base_recipe,
        "spec": publishable_spec(run.spec),
    }


def _against_target(run: LoadedRun) -> tuple[str, str]:
    """(CSS class, words): the result against the target, if there is one that applies."""
    target, loss = run.spec.evaluation.target_loss, run.final_loss
    if target is None:
        return "faint", "none"
    if not run.on_fineweb:
        return "faint", "none: not known to be FineWeb"
    if loss is None:
        return "faint", "no result"
    if loss <= target:
        return "good", f"{target - loss:.4f} below {target:g}"
    return "bad", f"{loss - target:.4f} above {target:g}"


def _hardware(run: LoadedRun) -> str:
    devices = run.record.hardware.devices if run.record is not None else []
    if devices:
        return ", ".join(f"{devices.count(device)} x {device}" for device in dict.fromkeys(devices))
    return f"{run.metrics.start.get('world_size') or '?'} x {run.metrics.start.get('device') or '?'}"


def _stages(runs: Sequence[LoadedRun]) -> dict[str, list[Any]]:
    """Heads and rows: for one run a row per stage, for several a row of milliseconds per step for each run."""
    of_runs = [run_summary(run.metrics)["stages"] for run in runs]
    if len(runs) == 1:
        rows = [
            [
                stage["stage"] + 1,
                f"{stage['steps']:,}",
                _number(stage["tokens"], "{:,}"),
                _ms(stage["ms_per_step"]),
                _number(stage["tokens_per_second"], "{:,}"),
            ]
            for stage in of_runs[0]
        ]
        return {"heads": ["stage", "steps", "tokens", "ms a step", "tokens/s"], "rows": rows}
    numbers = sorted({stage["stage"] for stages in of_runs for stage in stages})
    ms = [{stage["stage"]: stage["ms_per_step"] for stage in stages} for stages in of_runs]
    rows = [
        [run.label, *(_ms(of_stage.get(number)) for number in numbers)] for run, of_stage in zip(runs, ms, strict=True)
    ]
    return {"heads": ["run", *(f"stage {number + 1}" for number in numbers)], "rows": rows}


def _ms(ms: float | None) -> str:
    return "-" if ms is None else ms_text(ms)


def _tests(runs: Sequence[LoadedRun]) -> list[dict[str, Any]]:
    """The test of the mean for each group of runs that differ only in seed, name and place, or why there is none."""
    groups: list[list[LoadedRun]] = []
    for run in runs:
        for group in groups:
            if not differences([group[0], run], ignore=IDENTITY_KEYS):
                group.append(run)
                break
        else:
            groups.append([run])
    return [_test(group) for group in groups]


def _test(runs: Sequence[LoadedRun]) -> dict[str, Any]:
    shown = ", ".join(run.label for run in runs[:FEW_RUNS]) + (", ..." if len(runs) > FEW_RUNS else "")
    named = f"{runs[0].spec.name}, {len(runs)} runs: {shown}" if len(runs) > 1 else shown
    found: dict[str, Any] = {"runs": named, "facts": ""}
    if not all(run.on_fineweb for run in runs):
        return found | {"class": "faint", "verdict": "no test: not known to be FineWeb, which the target is for"}
    try:
        result = runs_significance(runs)
    except InputError as error:
        return found | {"class": "faint", "verdict": f"no test: {error}"}
    data = significance_data(result, runs)
    facts = [f"n = {result.n}", f"mean {result.mean:.5f}", f"target {result.target:g}"]
    facts += [] if result.sd is None else [f"standard deviation {result.sd:.5f}"]
    facts += [] if data["t"] is None else [f"t = {data['t']:.3f}"]
    facts += [] if result.p is None else [f"p = {result.p:.3g}"]
    if seeds := repeated_seeds(runs):
        facts.append(f"several runs have seed {', '.join(map(str, seeds))}, and differ only by rounding")
    of_verdict = "good" if result.significant else "faint" if result.n == 1 else "bad"
    return found | {"class": of_verdict, "verdict": result.verdict(), "facts": ", ".join(facts)}


def _differences(runs: Sequence[LoadedRun]) -> list[dict[str, Any]]:
    """How runs differ: part, key, and each value with the runs that have it."""
    found = []
    for difference in comparison_data(runs)["differences"]:
        of_value: dict[str, list[str]] = {}
        for run, value in zip(runs, difference["values"], strict=True):
            of_value.setdefault(show(value), []).append(run.label)
        values = [
            (value, ", ".join(labels) if len(labels) <= FEW_RUNS else f"{len(labels)} runs")
            for value, labels in of_value.items()
        ]
        more = len(values) - MOST_VALUES
        values = [*values[:MOST_VALUES], *([(f"and {more} more values", "")] if more > 0 else [])]
        found.append({"part": difference["part"], "key": difference["key"], "values": values})
    return found


def _provenance(record: Record) -> Facts:
    """Where the run comes from: (what, value), without what is not known."""
    code, data, container, slurm = record.code, record.data, record.container, record.slurm
    facts: list[tuple[str, Any]] = [
        ("started", f"{record.created:%Y-%m-%d %H:%M:%S} UTC"),
        ("ended", record.ended and f"{record.ended:%Y-%m-%d %H:%M:%S} UTC"),
        ("starts", len(record.starts) if record.interruptions else None),
        ("commit", code.commit and code.commit + CLEAN[code.clean]),
        ("changed files", ", ".join(code.changed_files[:20])),
        ("source sha256", code.source_sha256),
        ("package", code.package_version),
        *((name, version) for name, version in record.versions.items()),
        ("image", container and f"{container.image}, sha256 {container.sha256 or 'not known'}"),
        ("hosts", ", ".join(record.hardware.hosts)),
        ("Slurm job", slurm and (f"{slurm.job_id} on {slurm.cluster}" if slurm.cluster else slurm.job_id)),
        ("peak memory", record.peak_memory_bytes and f"{record.peak_memory_bytes / 1e9:.1f} GB a GPU"),
        *_computation(record),
        ("validation shards", data and "; ".join(f"{file.name} {file.sha256 or 'not hashed'}" for file in data.val)),
        ("training shards", data and "; ".join(f"{file.name} {show(file.sha256)}" for file in data.train[:12])),
        ("validation stream sha256", data and data.val_stream_sha256),
        ("spec.yaml sha256", record.spec_sha256),
    ]
    return [(what, str(value)) for what, value in facts if value]


def _computation(record: Record) -> Facts:
    computation = record.computation
    if computation is None:
        return []
    named = ("attention", "kernels", "dtype", "head_precision", "mlp_precision", "projection_precision")
    return [(key.replace("_", " "), str(value)) for key in named if (value := getattr(computation, key)) is not None]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
