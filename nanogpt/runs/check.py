"""The public rules as checks of a run: each passed, failed or unknown, with the evidence.

The rules: the token streams are not changed; the validation loss is at most the target; no extra torch.compile or
inductor flags; the clock covers all training, from opening the first shard. Further checks make the figures
trustworthy: hardware as claimed, no interruption, a known state of the code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from nanogpt.data import official
from nanogpt.data.manifest import MANIFEST, REPOSITORY, Entry, read_manifest
from nanogpt.data.shards import HEADER_BYTES, TOKEN_BYTES, train_name
from nanogpt.files import read_json, read_regular
from nanogpt.runs.consistency import contradictions
from nanogpt.runs.loaded import IDENTITY_KEYS, LoadedRun, show
from nanogpt.runs.record import DataFile, Record
from nanogpt.runs.reference import load_shipped, under
from nanogpt.spec import RunSpec
from nanogpt.spec_differences import spec_differences
from nanogpt.terminal import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

State = Literal["passed", "failed", "unknown"]

# Set by the run itself, without effect on what is computed: how many graphs to keep, not how they are made.
OWN_SETTINGS = ("dynamo.recompile_limit",)
# Where compiled code goes and how much is printed; nothing that changes the code.
HARMLESS_VARIABLES = re.compile(
    r"TORCHINDUCTOR_(CACHE_DIR|FX_GRAPH_CACHE|AUTOGRAD_CACHE|COMPILE_THREADS|WORKER_START)"
    r"|TRITON_(CACHE_DIR|HOME|CACHE_AUTOTUNING|PRINT_AUTOTUNING|LIBCUDA_PATH)"
    r"|TORCH_COMPILE_CACHE_DIR"
)
NOT_RECIPE_KEYS = (*IDENTITY_KEYS, "hardware", "checkpoint")
TARGET_RULE = "target"
TARGET_LOSS, VALIDATION_TOKENS = 3.28, 10_485_760  # the leaderboard's
CLOCK_TOLERANCE_MS = 1.0  # by which rounding in the files may differ


@dataclass(frozen=True)
class Check:
    """The result of one rule."""

    rule: str
    state: State
    evidence: str


def check_run(run: LoadedRun) -> list[Check]:
    """Every rule, in a fixed order. A run without a record leaves most of them unknown."""
    rules: Sequence[tuple[str, Callable[[LoadedRun, Record], tuple[State, str]]]] = (
        ("validation tokens", _validation_tokens),
        ("validation shards", _validation_shards),
        ("training shards", _training_shards),
        ("compiler flags", _compiler_flags),
        ("timing", _timing),
        ("hardware", _hardware),
        ("no interruption", _interruptions),
        ("code", _code),
        ("files agree", _files_agree),
    )
    checks = [Check("finished", *_finished(run)), Check(TARGET_RULE, *_target(run)), Check("recipe", *_recipe(run))]
    for rule, function in rules:
        if run.record is None:
            checks.append(Check(rule, "unknown", "the run has no record.json"))
        else:
            checks.append(Check(rule, *function(run, run.record)))
    return checks


def failed(checks: Sequence[Check]) -> list[Check]:
    """Those that failed."""
    return [check for check in checks if check.state == "failed"]


# --- of the run's result ---


def _finished(run: LoadedRun) -> tuple[State, str]:
    if run.why_unfinished:
        return "failed", run.why_unfinished
    return "passed", f"all {run.metrics.total_steps:,} steps, final validation loss {run.final_loss:.4f}"


def _target(run: LoadedRun) -> tuple[State, str]:
    if run.final_loss is None:
        return "failed", "no validation loss after the last step"
    sign = "at most" if run.final_loss <= TARGET_LOSS else "above"
    text = f"validation loss {run.final_loss:.5f} is {sign} {TARGET_LOSS:g}"
    return ("passed" if run.final_loss <= TARGET_LOSS else "failed"), text + " (the mean of several runs: significance)"


def _recipe(run: LoadedRun) -> tuple[State, str]:
    """A changed recipe is allowed: that is how records are made. It is only shown."""
    changes, record = recipe_changes(run.spec), run.spec.model.kind
    if not changes:
        return "passed", f"the shipped {record}, except for hardware, seed, output and checkpoints"
    listed = "; ".join(f"{key}: {show(there)} -> {show(here)}" for key, there, here in changes[:5])
    more = f"; {len(changes) - 5} more" if len(changes) > 5 else ""
    return "passed", f"departs from the shipped {record} (allowed): {listed}{more}"


def recipe_changes(spec: RunSpec) -> list[tuple[str, Any, Any]]:
    """(key, value in the shipped recipe of the model, value in `spec`), without hardware, seed, output, checkpoints."""
    return [
        (key, values[0], values[1])
        for key, *values in spec_differences(load_shipped(spec.model.kind), spec)
        if not under(key, NOT_RECIPE_KEYS)
    ]


# --- of the data ---


def _validation_tokens(run: LoadedRun, record: Record) -> tuple[State, str]:
    wanted = VALIDATION_TOKENS
    if record.data is None:
        return "unknown", "the record does not say what was read"
    counts = {"the record": record.data.val_tokens, "the spec": run.spec.evaluation.tokens}
    for source, count in counts.items():
        if count != wanted:
            return "failed", f"{count:,} validation tokens according to {source}, the official number is {wanted:,}"
    stream = record.data.val_stream_sha256
    if stream is None:
        return "unknown", "the record does not say which tokens were read"
    return "passed", f"the first {wanted:,} tokens, sha256 {stream[:12]}"


def _validation_shards(run: LoadedRun, record: Record) -> tuple[State, str]:
    return _shards(run, record, "val")


def _training_shards(run: LoadedRun, record: Record) -> tuple[State, str]:
    state, evidence = _shards(run, record, "train")
    if state == "passed" and record.data is not None:
        names = [file.name for file in record.data.train]
        official_names = [train_name(index) for index in range(1, len(names) + 1)]
        if names != official_names:
            return "failed", f"read in another order than the data set's: {', '.join(names[:5])}"
        tokens = sum((file.bytes - HEADER_BYTES) // TOKEN_BYTES for file in record.data.train)
        if tokens < run.spec.training.total_tokens:
            return (
                "failed",
                f"{tokens:,} tokens in {len(names)} shards, but the run took {run.spec.training.total_tokens:,}",
            )
        in_validation = {file.sha256 for file in record.data.val}
        if shared := [file.name for file in record.data.train if file.sha256 in in_validation]:
            return "failed", f"{shared[0]} is a validation shard by its sha256"
    return state, evidence


def _shards(run: LoadedRun, record: Record, kind: str) -> tuple[State, str]:
    """Shards are official by the sha256 of what was read: the package's own, or else the hub's first."""
    files: list[DataFile] = [] if record.data is None else getattr(record.data, kind)
    if record.data is None or not files:
        return "unknown", "the record does not say which shards were read"
    directory = Path(record.data.directory)
    manifest = _manifest_now(directory)
    counts: dict[str, int] = {}
    for file in files:
        how, evidence = _one_shard(file, directory, manifest)
        if how in ("failed", "unknown"):
            return cast("State", how), evidence
        counts[how] = counts.get(how, 0) + 1
    for what in ("name", "sha256"):
        values = [getattr(file, what) for file in files]
        if again := [file.name for file in files if values.count(getattr(file, what)) > 1]:
            return "failed", f"the same {what} more than once: {', '.join(again[:3])}"
    named = ", ".join(f"{file.name} {str(file.sha256)[:12]}" for file in files[:2]) + (
        ", ..." if len(files) > 2 else ""
    )
    trust = " and ".join(f"{count} {how}" for how, count in counts.items())
    return "passed", f"{len(files)} of {REPOSITORY}, {trust}: {named}"


def _one_shard(file: DataFile, directory: Path, manifest: dict[str, Entry]) -> tuple[str, str]:
    """(failed or unknown, why), or (the source of its sha256, "")."""
    if file.sha256 is None:
        return "unknown", f"{file.name}: its sha256 is not in the record"
    if "text.json" in (file.sha256_from, file.expected_from):
        return "failed", f"own text, not {REPOSITORY}: {file.name}, according to text.json in {directory}"
    if file.also_read:
        return "failed", str(file.contradiction)
    if (pinned := official.SHA256.get(file.name)) is not None:
        if file.sha256 != pinned:
            return "failed", f"{file.name}: read with sha256 {file.sha256[:12]}, the data set's is {pinned[:12]}"
        if file.bytes != official.SHARD_BYTES:
            return (
                "failed",
                f"{file.name}: {file.bytes:,} bytes in the record, the data set's has {official.SHARD_BYTES:,}",
            )
    elif file.contradiction:
        return "failed", str(file.contradiction)
    if file.sha256_from == "manifest.json":
        return (
            "unknown",
            f"{file.name}: an older record that took the manifest's sha256: what was read was not hashed",
        )
    if pinned is not None:
        return "as this package pins them", ""
    now = manifest.get(file.name)
    if now is not None and now.sha256 != file.sha256:
        return "failed", f"{file.name}: read with sha256 {file.sha256[:12]}, the manifest now has {now.sha256[:12]}"
    if now is None and file.expected_from != "manifest.json":
        return "failed", (
            f"{file.name}: sha256 {file.sha256[:12]}, which no manifest of {REPOSITORY} confirms; verify with"
            f" prep-fineweb --dir {directory} and run again"
        )
    announced_by = file.announced_by or (now and now.endpoint)
    if announced_by != official.HUB:
        return "unknown", (
            f"{file.name}: sha256 {file.sha256[:12]}, announced by {announced_by or 'an unknown address'} alone: this"
            f" package does not pin it, and {official.HUB} was not asked"
        )
    return "as the hub announced them at the first download (not pinned)", ""


def _manifest_now(directory: Path) -> dict[str, Entry]:
    """prep-fineweb's manifest from where the run's shards were; empty if they are gone, or another data set's."""
    try:
        repository = read_json(directory / MANIFEST).get("repository")
    except (OSError, ValueError, AttributeError):
        return {}
    return read_manifest(directory) if repository == REPOSITORY else {}


# --- of the computation ---


def _compiler_flags(run: LoadedRun, record: Record) -> tuple[State, str]:
    compilation = record.compilation
    if compilation is None:
        return "unknown", "the record does not say how the run was compiled"
    flags = [
        f"{name} = {change.found} (default {change.default})"
        for name, change in compilation.settings.items()
        if name not in OWN_SETTINGS
    ]
    flags += [
        f"{name}={value}" for name, value in compilation.environment.items() if not HARMLESS_VARIABLES.fullmatch(name)
    ]
    if flags:
        return "failed", f"extra flags: {'; '.join(flags)}"
    return "passed", "torch._inductor, torch._dynamo and their environment variables are at their defaults" + (
        "" if compilation.compiled else "; not compiled"
    )


def _timing(run: LoadedRun, record: Record) -> tuple[State, str]:
    """What the files show about the clock; that it starts before the first shard is opened follows from the code."""
    problems = [*_disagreements(run, record)]
    compilation, training = record.compilation, run.spec.training
    if not training.warmup:
        problems.append("training.warmup is off: kernels were compiled and tuned inside the clock")
    late = None if compilation is None else compilation.late_graphs
    if late:
        problems.append(f"{late} graphs were compiled after the clock started")
    if problems:
        return "failed", "; ".join(problems)
    if record.record_seconds is None or late is None:
        return "unknown", "the record does not say how the clock ended"
    evidence = [f"{record.record_seconds:.3f} s in record, metrics and log", "warm-up on", "no late graph"]
    if run.metrics.checkpoints:
        steps = ", ".join(str(entry["step"]) for entry in run.metrics.checkpoints[:5])
        evidence.append(f"clock stopped for checkpoints at {steps}")
    else:
        evidence.append("no checkpoint")
    if record.code.clean:
        evidence.append(f"clock starts before the first shard is opened (code of {str(record.code.commit)[:12]})")
    elif record.code.source_sha256 == _own_source():
        evidence.append("clock starts before the first shard is opened (code of this package)")
    else:
        return "unknown", "; ".join([*evidence, "the code is neither this package's nor a commit's: read its clock"])
    return "passed", "; ".join(evidence)


def _own_source() -> str:
    from nanogpt.runs.provenance import source_sha256

    return source_sha256()


def _disagreements(run: LoadedRun, record: Record) -> list[str]:
    """If metrics, log and record disagree on the time, or it is impossible, how."""
    found = []
    times = run.metrics.steps.column("train_time_ms")
    if (times[1:] < times[:-1]).any():
        found.append("the clock of metrics.jsonl runs backwards")
    if record.record_seconds is None:
        return found
    of_record = 1000 * record.record_seconds
    end = run.metrics.end or {}
    for name, ms in (
        ("metrics.jsonl", end.get("train_time_ms")),
        ("its last evaluation", ([{}, *run.metrics.evaluations[-1:]])[-1].get("train_time_ms")),
    ):
        if ms is not None and abs(float(ms) - of_record) > CLOCK_TOLERANCE_MS:
            found.append(f"{float(ms) / 1000:.3f} s in {name}, {record.record_seconds:.3f} s in record.json")
    logged = _last_in_log(run.path)
    if logged is not None and abs(logged[0] - of_record) > CLOCK_TOLERANCE_MS:
        found.append(f"{logged[0] / 1000:.3f} s in log.txt, {record.record_seconds:.3f} s in record.json")
    if logged is not None and run.final_loss is not None and abs(logged[1] - run.final_loss) > 6e-5:
        found.append(f"validation loss {logged[1]:.4f} in log.txt, {run.final_loss:.4f} in metrics.jsonl")
    started = record.starts[-1].clock_started
    if started is not None and record.ended is not None and record.interruptions == 0:
        wall = (record.ended - started).total_seconds()
        if wall + 0.01 < record.record_seconds:
            found.append(f"{record.record_seconds:.3f} s of training within {wall:.3f} s by the time of day")
    return found


def _last_in_log(path: Path) -> tuple[float, float] | None:
    """(milliseconds, validation loss) of the log's last evaluation."""
    try:
        text = read_regular(path / "log.txt").decode("utf-8", errors="replace")
    except OSError:
        return None
    lines = re.findall(r"^step:\d+/\d+ val_loss:(\d+\.\d+) train_time:(\d+)ms", text, re.MULTILINE)
    return (float(lines[-1][1]), float(lines[-1][0])) if lines else None


def _hardware(run: LoadedRun, record: Record) -> tuple[State, str]:
    hardware, claimed = record.hardware, run.spec.hardware
    if not hardware.ranks:
        return "unknown", "the record does not say which devices the run used"
    found = (
        f"{len(hardware.ranks)} processes on {', '.join(hardware.hosts)}: {', '.join(sorted(set(hardware.devices)))}"
    )
    claim = f"{claimed.nodes} x {claimed.gpus_per_node} {claimed.gpu}"
    wrong = [
        rank.device
        for rank in hardware.ranks
        if not re.search(rf"(?<![A-Za-z0-9]){re.escape(claimed.gpu)}(?![0-9])", rank.device, re.IGNORECASE)
    ]
    uuids = [rank.device_uuid for rank in hardware.ranks if rank.device_uuid]
    sizes = {len(hardware.ranks), hardware.world_size, run.spec.world_size, run.metrics.start.get("world_size")}
    if wrong or len(sizes) != 1 or len(hardware.hosts) > claimed.nodes or len(set(uuids)) < len(uuids):
        twice = ", one device twice" if len(set(uuids)) < len(uuids) else ""
        return "failed", f"claimed {claim}, found {found}{twice}"
    return "passed", f"claimed {claim}, found {found}"


def _interruptions(run: LoadedRun, record: Record) -> tuple[State, str]:
    if record.interruptions or run.metrics.starts > 1:
        steps = ", ".join(str(start.resumed_at or 0) for start in record.starts[1:])
        return "failed", f"started {max(len(record.starts), run.metrics.starts)} times, resumed at step {steps or '?'}"
    return "passed", "one start"


def _code(run: LoadedRun, record: Record) -> tuple[State, str]:
    code = record.code
    if code.clean:
        return "passed", f"commit {str(code.commit)[:12]}, clean"
    if code.clean is False:
        files = ", ".join(code.changed_files[:5]) + (", ..." if len(code.changed_files) > 5 else "")
        return "failed", f"commit {str(code.commit)[:12]} with changes: {files}"
    source = f"source {code.source_sha256[:12]}"
    if code.source_sha256 == _own_source():
        source += ", that of this package"
    if code.commit:
        return "unknown", f"commit {code.commit[:12]}, unknown whether clean; {source}"
    return "unknown", f"unknown commit; {source}"


def _files_agree(run: LoadedRun, record: Record) -> tuple[State, str]:
    """Whether one run's files agree; nobody can tell from them that they were not invented together."""
    if run.why_unfinished:
        return "unknown", "the run has not finished"
    found = contradictions(run, record)
    if found:
        return "failed", "; ".join(found[:4]) + (f"; {len(found) - 4} more" if len(found) > 4 else "")
    steps, evaluations = len(run.metrics.steps), len(run.metrics.evaluations)
    return "passed", f"record, metrics, log and spec agree on {steps:,} steps and {evaluations} evaluations"


# --- for people ---


def check_data(run: LoadedRun, checks: Sequence[Check]) -> dict[str, Any]:
    """The checks as JSON data."""
    return {"run": run.label, "failed": len(failed(checks)), "checks": [asdict(check) for check in checks]}


def check_table(checks: Sequence[Check]) -> RenderableType:
    """The checks as a table."""
    from rich.text import Text

    from nanogpt.console import new_table

    table = new_table("rule", "", "evidence", wrap=["evidence"], left=2)
    styles = {"passed": "green", "failed": "bold red", "unknown": "yellow"}
    for check in checks:
        table.add_row(check.rule, Text(check.state, style=styles[check.state]), Text(printable(check.evidence)))
    return table
