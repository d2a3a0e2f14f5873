"""The trainer: from a spec, shards and a run directory to a trained model.

A run goes through: build - warm-up and restore - (resume) - steps with validation in between - end. The clock runs only
while training steps run; it stops, synchronised, for validation and checkpoints. Opening the first training shard,
YaRN's table rebuilds and log lines are inside it, as in the public record.

SIGTERM or SIGUSR1 to any rank ends a run after a step on which all agree (`nanogpt.launch.watchdog`), with a checkpoint
whatever the spec says about those, by `Interrupted`. Before the first step of a start there is nothing new to save: the
run ends without one, and continues from its previous checkpoint, or from the beginning.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanogpt.cache.compile_cache import CompileCache, cache_directory
from nanogpt.cache.graphs import compile_whole
from nanogpt.captured import Captured
from nanogpt.console import say
from nanogpt.data.micro_batches import LoaderArguments
from nanogpt.data.prefixes import gpt2_tokens, prefix_table
from nanogpt.data.shards import check_shard_tokens, missing_target
from nanogpt.data.training_batches import TrainBatches
from nanogpt.data.validation_batches import ValBatches, read_stream
from nanogpt.errors import InputError, Interrupted, NanogptError, RunError
from nanogpt.garbage import collect_from_now
from nanogpt.launch.page_cache import keep_code_in_memory
from nanogpt.launch.watchdog import Watchdog
from nanogpt.launch.world import World, check_world, join_world, started_as
from nanogpt.models.language_model import Windows, to_device
from nanogpt.optim.optimizer import build_optimizer
from nanogpt.optim.row_table import TouchedRows
from nanogpt.runs.directory import RunDirectory
from nanogpt.runs.record import State
from nanogpt.runs.reference import ReferenceWatch
from nanogpt.runs.tracker import check_tracker
from nanogpt.spec import RunSpec
from nanogpt.training.ahead import compiler
from nanogpt.training.build import build_model, draw_model
from nanogpt.training.checkpoint import (
    extra_state,
    import_ahead_of_saving,
    load_newest_checkpoint,
    model_state_of_rank,
    save_checkpoint,
    taken_over,
)
from nanogpt.training.clock import Clock
from nanogpt.training.compilation import compiled_graphs, recompilation_reasons
from nanogpt.training.devices import unlike_devices
from nanogpt.training.end_of_run import EndOfRun
from nanogpt.training.implementations import captures_graphs, choose_implementations, compiles
from nanogpt.training.micro_step import MicroStep
from nanogpt.training.ownership import owner, owner_check
from nanogpt.training.parallel_compile import compile_in_parallel
from nanogpt.training.recorder import RunRecorder, describe_rank, end_state
from nanogpt.training.report import Reporter
from nanogpt.training.schedule import Schedule, StepSettings
from nanogpt.training.startup import StartUp, phases_table
from nanogpt.training.tables import TableCycles, check_tables_fit, rows_of

SMALLER_MICRO_BATCHES = (
    "Micro-batches of half the tokens need half as much: --set training.slots=16"
    " --set evaluation.micro_batch_tokens=131072; documents are then cut in other places"
)


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    final_val_loss: float
    steps: int
    train_seconds: float
    late_graphs: int = 0  # graphs compiled after the clock started: 0 in a run that warmed up


def find_shards(spec: RunSpec, directory: Path) -> tuple[list[Path], list[Path]]:
    """Training and validation shards, sorted. Raises `InputError` naming the directory and how to fill it."""
    return find_files(directory, spec.data.train_files), find_files(directory, spec.data.val_files)


def find_files(directory: Path, pattern: str) -> list[Path]:
    """The shards of one kind, sorted. Raises `InputError` as `find_shards` does."""
    files = sorted(directory.glob(pattern))
    if not files:
        raise InputError(
            f"{directory}: no {pattern} there. Make shards with prep-fineweb or prep-text, or name their"
            " directory with --data, NANOGPT_DATA or data.directory in the recipe"
        )
    for problem in filter(None, map(missing_target, files)):
        raise InputError(problem)
    check_numbering(files)
    return files


def check_numbering(files: Sequence[Path]) -> None:
    """Refuse shards whose numbers have gaps: the run would skip the missing ones. Raises `InputError`."""
    numbered = {int(match.group(1)): file for file in files if (match := re.search(r"(\d+)\D*$", file.name))}
    if len(numbered) != len(files):  # names without numbers, or with repeated ones
        return
    missing = [number for number in range(min(numbered), max(numbered)) if number not in numbered]
    if missing:
        before, after = numbered[max(n for n in numbered if n < missing[0])], numbered[max(numbered)]
        name = re.sub(r"(\d+)(\D*)$", lambda m: f"{missing[0]:0{len(m.group(1))}d}{m.group(2)}", before.name)
        more = f" and {len(missing) - 1} more are missing" if len(missing) > 1 else " is missing"
        raise InputError(
            f"{before.parent / name}:{more} between {before.name} and {after.name}. Fetch what is missing (prep-fineweb"
            " continues where it stopped), or move the shards after it away"
        )


def check_start(spec: RunSpec, data_directory: Path) -> list[Path]:
    """Before anything is written, refuse a run that cannot start here; returns the shards. Raises `InputError`."""
    check_world(spec)
    check_tracker(spec)
    train_files, val_files = find_shards(spec, data_directory)
    check_first_tokens(spec, train_files, val_files)
    return [*train_files, *val_files]


def check_first_tokens(spec: RunSpec, train_files: Sequence[Path], val_files: Sequence[Path]) -> None:
    """Refuse shards that the model cannot read: the first training shard, and the validation stream.

    Other shards are checked as they are read. Reads what the run reads first, which is then in memory.
    Raises `ShardError`.
    """
    read_stream(val_files, spec.evaluation.tokens + 1, spec.model.vocab_size)
    check_shard_tokens(train_files[0], spec.model.vocab_size, spec.data.bos)


def train_run(
    spec: RunSpec,
    *,
    run: RunDirectory | None,
    data_directory: Path,
    resume: bool = False,
    watch: Watchdog | None = None,
    make_trainer: Callable[..., Trainer] | None = None,
) -> Result:
    """Run the spec on this process (every process of a distributed run calls it).

    Args:
        spec: the run.
        run: the run's directory; rank 0 writes there. None writes nothing, and no checkpoint.
        data_directory: the shards.
        resume: continue from the run directory's newest checkpoint, or from the start if there is none.
        watch: over the other ranks and for signals, already entered; None makes one.
        make_trainer: called instead of `Trainer`, for experiments with their own.

    Raises:
        InputError: no shards, too few tokens, a world size or a device other than the spec's.
        RunError: a non-finite loss, output that cannot be written, another rank lost.
        Interrupted: by SIGTERM or SIGUSR1.
    """
    if watch is None:
        with Watchdog(*started_as()[:2], spec.watchdog) as own:
            return train_run(
                spec, run=run, data_directory=data_directory, resume=resume, watch=own, make_trainer=make_trainer
            )
    watch.run_path = None if run is None else run.path
    startup = StartUp()
    try:
        with ExitStack() as stack:
            recorder = stack.enter_context(RunRecorder(spec, run, resume=resume))
            with startup.phase("device and process group"):
                world = stack.enter_context(join_world(spec))
            kept_in = cache_directory(run.path.parent) if run is not None and compiles(spec, world.device) else None
            cache = stack.enter_context(compiler(spec, world, startup, kept_in))
            make = make_trainer or Trainer
            trainer = stack.enter_context(
                make(
                    spec,
                    world,
                    run=run,
                    data_directory=data_directory,
                    recorder=recorder,
                    watch=watch,
                    cache=cache,
                    startup=startup,
                )
            )
            return trainer.run(resume=resume)
    except torch.OutOfMemoryError as error:
        full = str(error).partition("\n")[0].partition(" If reserved")[0].rstrip(".")
        raise RunError(f"{full}. {SMALLER_MICRO_BATCHES}") from error
    except Exception as error:
        explained = watch.explain(error)
        if explained is error:
            raise
        raise explained from error


class Trainer:
    """One process of a run; see the module. A context manager: leaving it records how the run ended."""

    def __init__(
        self,
        spec: RunSpec,
        world: World,
        *,
        run: RunDirectory | None,
        data_directory: Path,
        recorder: RunRecorder | None = None,
        watch: Watchdog | None = None,
        cache: CompileCache | None = None,
        startup: StartUp | None = None,
    ):
        self.spec = spec
        self.world = world
        self.run_directory = run
        self.recorder = recorder or RunRecorder(spec, None)
        self.watch = watch or Watchdog()
        self.cache = cache or CompileCache()
        self.startup = startup or StartUp()
        self.schedule = Schedule(spec)
        self.clock = Clock(world)
        self.next_step = 0
        self._windows_of = 0  # the step whose windows the model uses
        self.compiling_lines: list[str] = []  # what the processes did that compiled, a table

        train_files, val_files = find_shards(spec, data_directory)
        self.train_shards = len(train_files)
        self.recorder.reads(train_files, val_files)
        with self.startup.phase("data"):
            self.val_batches = self.validation_batches(val_files, spec.evaluation.tokens)
            self.touched = self._touched_rows()
            self.train_batches = TrainBatches(
                train_files,
                epochs=spec.data.epochs,
                run_tokens=spec.training.total_tokens,
                tables=spec.model.pulled_tables(),
                hashed=run is not None and world.local_rank == 0,
                kept_extras={touched.extra for touched in self.touched.values()},
                asked=lambda: self.watch.asked,
                **self._loader_arguments(),
            )
        with self.startup.phase("attention library"):
            self.implementations, self.implementation_lines = choose_implementations(spec, world.device)
        implementations = self.implementations
        with self.startup.phase("model"):
            check_tables_fit(spec, world)
            self.model = build_model(
                spec,
                device=world.device,
                implementations=implementations,
                communicator=world.communicator,
                drawn=self.startup.begun(draw_model),
            )
            self.table_cycles = TableCycles(spec, self.schedule, self.model, self.train_batches)
        with self.startup.phase("first broadcast"):
            for value in self.model.state_dict().values():
                if isinstance(value, Tensor):
                    world.communicator.broadcast(value)
            world.synchronize()
        self.compiled = compiles(spec, world.device)
        capture = captures_graphs(spec, world.device)
        self.optimizer = build_optimizer(
            spec.optimizer,
            self.model,
            self.model.rows,
            world.communicator,
            compiled=self.compiled,
            plain_kernels=implementations.plain_kernels,
            touched=self.touched,
            capture=capture,
            tables=self.model.tables,
        )
        refused = world.gather(self.recorder.validates(world.gather(self.val_batches.sha256)))[0]
        if refused is not None:
            raise InputError(refused)
        ranks = world.gather(describe_rank(world))
        if world.is_main and (warning := unlike_devices(ranks)):
            say(warning)
            self.implementation_lines.append(warning)
        self.recorder.built(ranks, implementations, self.implementation_lines, compiled=self.compiled)
        self._vocabulary: list[bytes] | None = None
        if any(stage.prefix_weight for stage in spec.training.all_stages):
            self._vocabulary = gpt2_tokens()[: spec.model.vocab_size]
        self.micro_step = MicroStep(
            self.model,
            self._compile(self.model.training_loss),
            grad_scale=1 / spec.accumulation_steps,
            plain_kernels=implementations.plain_kernels,
            capture=capture,
        )
        self.settled_weights_changed = Captured(self.model.weights_changed, active=capture)
        self.evaluation_loss = self._compile(self.model.evaluation_loss)
        self.end_of_run = EndOfRun(spec, self.model, world.communicator, world.device)
        self.reporter = Reporter(
            spec, self.schedule, world, run, ReferenceWatch(spec, data_directory) if world.is_main else None
        )
        self.watch.on_lost = self._last_words

    def _compile(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return compile_whole(function) if self.compiled else function

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.train_batches.close()
        self.end_of_run.close()
        self.watch.on_lost = None
        explained = None if error is None else self.watch.explain(error)
        reason = None if explained is None else f"{type(explained).__name__} after step {self.next_step}: {explained}"
        try:
            self._write_end(end_state(kind), reason)
        except RunError as second:
            if error is None:
                raise
            say(str(second))  # the first error is the one to report
        self.watch.enter("ending")
        if explained is not error:
            assert explained is not None
            raise explained from error

    def _write_end(self, state: State, reason: str | None) -> None:
        self.reporter.end(state, reason, self.clock.elapsed_ms)
        self.recorder.end(state, reason, self.clock.elapsed_ms)

    def _last_words(self, reason: str) -> None:
        """The main thread is stuck and the process is about to end: write as much as possible."""
        self._write_end("failed", f"after step {self.next_step}: {reason}")

    def run(self, *, resume: bool = False) -> Result:
        """Warm up, train, validate."""
        if self.spec.training.warmup:
            self._say(self.cache.lines)
            with self.watch.phase("warming up"):
                self.warm_up()
                with self.startup.phase("compile cache, writing"):
                    self.cache.save(small_additions=False)
        resumed = resume and self._load_checkpoint()
        import_ahead_of_saving()
        keep_code_in_memory(os.environ, wait=True)
        collect_from_now()
        phases = self.startup.phases()
        table = phases_table(phases) if self.spec.training.warmup else []
        self._say(table)
        tables = (*table, "", *self.compiling_lines) if self.compiling_lines else table
        for line in (*self.implementation_lines, *self._graph_lines(), *self.cache.lines, *tables):
            self.reporter.note(line)
        self.reporter.start(self.next_step, resumed=resumed)
        graphs, recompiled = compiled_graphs(), recompilation_reasons()
        self.recorder.start_up(phases, self.cache.lines)
        self.recorder.clock_starts(*self._progress(), resumed=resumed, graphs=graphs)
        self.watch.training(self.next_step, compiling=self.compiled and not self.spec.training.warmup)
        self.clock.start()
        self.end_of_run.clock_starts()
        self._set_prefixes()
        evaluated = self.spec.evaluation.steps(self.schedule.total_steps)
        for step in range(self.next_step, self.schedule.total_steps):
            settings = self.schedule.at(step)
            self.enter(settings)
            if step in evaluated:
                with self.clock.paused():
                    self._validate(step, settings.windows)
            loss = self.train_step(settings)
            self.end_of_run.after_step(step)
            self.next_step = step + 1
            if self.next_step == self.schedule.total_steps:
                self.end_of_run.finish()
            self.reporter.step(settings, loss, self.clock.elapsed_ms)
            saved = False
            if self._checkpoint_due():
                with self.clock.paused():
                    saved = self._save_checkpoint()
            if (reason := self.watch.boundary(self.next_step)) and self.next_step < self.schedule.total_steps:
                self._interrupt(reason, saved=saved)
        mask = self._end()
        self._read_for_validation()
        self.clock.stop()
        final_loss = self._validate(self.schedule.total_steps, self.schedule.final_windows, mask)
        late_graphs = compiled_graphs() - graphs
        if self.compiled:
            self.reporter.note(f"compiled graphs: {graphs} before the clock started, {late_graphs} after")
            for line in recompilation_reasons():
                if line not in recompiled:
                    self.reporter.note(f"recompiled after the clock started: {line}")
        self.reporter.waits()
        self._record_trained(late_graphs)
        return Result(final_loss, self.schedule.total_steps, self.clock.elapsed_ms / 1000, late_graphs)

    def _end(self) -> Tensor | None:
        """Do what the recipe asks for the run's end; returns the last validation's mask."""
        lines = self.spec.training.end_lines
        self.recorder.end_of_run(lines)
        for line in lines:
            self.reporter.note(f"end of the run: {line}")
        return self.end_of_run.take_mask()

    def _progress(self) -> tuple[int, int, float]:
        """Steps and tokens done, milliseconds of the clock."""
        return self.next_step, self.schedule.tokens_before(self.next_step), self.clock.elapsed_ms

    def _record_trained(self, late_graphs: int) -> None:
        device, memory = self.world.device, (0, 0)
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        position = self.train_batches.state_dict()
        self.recorder.trained(
            late_graphs=late_graphs,
            shards_read=position["shard"] + 1 if position["epoch"] == 0 else self.train_shards,
            passes=position["epoch"] + 1,
            memory=self.world.gather(memory),
            read_sha256=self.world.gather(self.train_batches.sha256()),
        )

    def _say(self, lines: Sequence[str]) -> None:
        """Print to the terminal, or the job's output, where somebody is waiting."""
        if self.run_directory is not None and self.world.is_main:
            for line in lines:
                say(line)

    # --- a step ---

    def enter(self, settings: StepSettings) -> None:
        """Apply what changes up to `settings.step`: each change of the windows."""
        done = len(self.schedule.window_changes(self._windows_of))
        for old, new in self.schedule.window_changes(settings.step)[done:]:
            self.model.change_windows(old, new)
        self._windows_of = settings.step

    def train_step(self, settings: StepSettings, micro_steps: int | None = None) -> Tensor:
        """Run all micro-steps of a step, or the first `micro_steps`, and the optimizer.

        Returns (1 + world size,) fp32 on the device: all ranks' mean loss per token, and how many milliseconds the
        step waited for its batch on each rank.
        """
        waited = self.train_batches.wait_seconds
        self.table_cycles.before(settings, alone=micro_steps is not None)
        coming = range(settings.step, min(settings.step + 2, self.schedule.total_steps))
        self.train_batches.build_ahead([self.schedule.at(step).request for step in coming])
        batches = self.train_batches.next_step(settings.request)
        self.table_cycles.before_update(settings, alone=micro_steps is not None)
        waited = self.train_batches.wait_seconds - waited
        self.optimizer.expect_rows(self.train_batches.step_extras, settings.rates)
        inputs = self.model.loss_inputs(settings.point, self.world.device)
        # The loss, then a slot for each rank's wait: one small average brings all of it to every rank.
        report = [0.0] * (1 + self.world.size)
        report[1 + self.world.rank] = 1000 * waited * self.world.size
        reported = to_device(tuple(report), self.world.device)
        for batch in batches[:micro_steps]:
            loss = self.micro_step(batch, inputs, stage=settings.stage)
            reported[0] += loss * (self.micro_step.grad_scale / self.model.training_loss_scale(batch))
        # Sent before the gradients: it has long arrived when the optimizer is done.
        average = self.world.communicator.average(reported)
        self.optimizer.step(settings.rates)
        self._weights_changed(settings.step)
        return average.wait()

    def _weights_changed(self, step: int) -> None:
        settled, captured = self.model.settled_step, self.settled_weights_changed
        if captured.active and settled is not None and step >= settled:
            captured(settled)
        else:
            self.model.weights_changed(step)

    def _graph_lines(self) -> list[str]:
        return [
            *self.micro_step.lines(),
            *self.optimizer.lines(),
            *self.settled_weights_changed.lines("rounding of weights"),
        ]

    def _touched_rows(self) -> dict[str, TouchedRows]:
        """By parameter, the tables whose gradients are exchanged by rows, if requested."""
        world, choice = self.world, self.spec.runtime.row_gradients
        if world.size == 1 or choice == "dense":
            return {}
        return {
            table.parameter: TouchedRows(table.rows, table.extra, world.rank, world.size, choice, world.device)
            for table in self.spec.model.row_tables()
        }

    def _set_prefixes(self) -> None:
        """Inside the clock, by the public record's rules: the prefixes are computed from the vocabulary's bytes."""
        if self._vocabulary is not None:
            prefixes = prefix_table(self._vocabulary, self.spec.model.padded_vocab_size)
            self.model.set_prefixes(torch.from_numpy(prefixes))

    # --- validation ---

    def validation_batches(self, files: Sequence[Path], tokens: int) -> ValBatches:
        """The first tokens of the shards, as validation reads them. Raises as `ValBatches` does."""
        size = self.spec.evaluation.micro_batch_tokens
        return ValBatches(files, tokens=tokens, micro_batch_tokens=size, **self._loader_arguments())

    def _loader_arguments(self) -> LoaderArguments:
        return {
            "slots": self.spec.training.slots,
            "rank": self.world.rank,
            "world_size": self.world.size,
            "bos": self.spec.data.bos,
            "vocab_size": self.spec.model.vocab_size,
            "device": self.world.device,
            "extras": self.spec.model.batch_extras,
        }

    def evaluate(self, windows: Windows, mask: Tensor | None = None, *, micro_steps: int | None = None) -> float:
        """Validation loss in nats: mean over (the first) micro-steps, then over ranks. `mask`: the canonical one."""
        losses, limits = [], windows.at_run_time()
        for index, batch in enumerate(self.val_batches):
            if index == micro_steps:
                break
            with rows_of(self.model, batch) as embedded:
                losses.append(self.evaluation_loss(batch, limits, embedded, mask))
        return float(self.world.communicator.average(torch.stack(losses).mean()).wait())

    def _read_for_validation(self) -> None:
        """Inside the clock, by the public record's rules: pull what the last validation reads of others' tables."""
        for batch in self.val_batches if self.model.tables and self.world.size > 1 else ():
            with rows_of(self.model, batch):
                pass

    def _validate(self, step: int, windows: Windows, mask: Tensor | None = None) -> float:
        self.reporter.take_losses(wait=True)
        with self.watch.phase("validating"):
            val_loss = self.evaluate(windows, mask)
        self.reporter.evaluation(step, val_loss, self.clock.elapsed_ms)
        self.recorder.evaluation(val_loss, *self._progress())
        if not math.isfinite(val_loss):
            raise RunError(f"step {step}: the validation loss is {val_loss}. The run stops")
        return val_loss

    # --- warm-up ---

    def compile_in_parallel(self) -> None:
        """Compile the run's graphs with several processes, if none are cached yet."""
        self.compiling_lines = compile_in_parallel(
            self.spec,
            self.world,
            self.cache,
            micro_step=self.micro_step,
            evaluation_loss=self.evaluation_loss,
            warm_up_optimizer=functools.partial(self.optimizer.warm_up, self.world.size),
            given_up=lambda: bool(self.watch.asked),
        )

    def warm_up(self) -> None:
        """Compile, run the steps around each stage change on real batches, then restore everything.

        Of a stage's first step only two micro-steps, one that compiles and one that is captured, of its others one.
        Each stage evaluates once.
        """
        with self.startup.phase("compiling, by several processes"):
            self.compile_in_parallel()
        entered: set[int] = set()
        parameters = [parameter.detach().clone() for parameter in self.model.parameters()]
        optimizer_state = self.optimizer.state_dict()
        for step in self.schedule.warmup_steps():
            settings = self.schedule.at(step)
            self.enter(settings)
            try:
                with self.startup.phase(f"warm-up, stage {settings.stage + 1}"):
                    first = settings.stage not in entered
                    if first:
                        entered.add(settings.stage)
                        self.evaluate(settings.windows, micro_steps=1)
                    self.train_step(settings, micro_steps=2 if first else 1)
                    self.world.synchronize()
            except Exception as error:
                if isinstance(error, NanogptError) or not self.watch.asked:
                    raise
                # The signal went to every process, including the compiler's workers.
                raise self._nothing_done(self.watch.asked) from error
            if reason := self.watch.boundary():
                raise self._nothing_done(reason)
        with self.startup.phase("warm-up, restoring"):
            self.evaluate(self.schedule.final_windows, self.end_of_run.mask, micro_steps=1)
            with torch.no_grad():
                for parameter, start in zip(self.model.parameters(), parameters, strict=True):
                    parameter.copy_(start)
            self.optimizer.load_state_dict(optimizer_state)
            self.model.restart()
            self._windows_of = 0
            self.train_batches.restart()

    # --- checkpoints ---

    def _checkpoint_due(self) -> bool:
        every, at_end = self.spec.checkpoint.every, self.spec.checkpoint.at_end
        if self.next_step == self.schedule.total_steps:
            return at_end
        return every is not None and self.next_step % every == 0

    def _save_checkpoint(self, *, needed: bool = False) -> bool:
        """Write the run's full state, unless no run could continue from it. Collective.

        Returns whether there is now a checkpoint of this step. Raises `RunError` on all ranks if it cannot be
        written and is `needed`, or the spec says to stop then.
        """
        self.reporter.take_losses(wait=True)
        broken = [name for name, value in self.model.named_parameters() if not bool(value.isfinite().all())]
        if broken:
            raise RunError(
                f"step {self.next_step}: {', '.join(broken)} no longer finite, although the training loss was. The"
                " run stops without a checkpoint of it; earlier ones stay"
            )
        failure: RunError | None = None
        with self.watch.phase("writing a checkpoint"):
            optimizer_state = self.optimizer.state_dict()
            end_state = self.end_of_run.state_dict()
            extra_states = self.world.gather(extra_state(self.model))
            if self.run_directory is not None and self.world.is_main:
                state = {
                    "run": owner(self.run_directory, self.spec),
                    "model": self.model.state_dict(),
                    "extra_state_by_rank": extra_states,
                    "optimizer": optimizer_state,
                    "batches": self.train_batches.state_dict(),
                    "end_of_run": end_state,
                    "elapsed_ms": self.clock.elapsed_ms,
                }
                directory = self.run_directory.checkpoint_directory
                try:
                    path = save_checkpoint(directory, self.next_step, state, keep=self.spec.checkpoint.keep)
                except RunError as error:
                    failure = error
            failed = self.world.gather(failure is not None)[0]  # no rank ends or continues before it is written
        if failed and (needed or self.spec.checkpoint.on_failure == "stop"):
            raise failure or RunError(f"the checkpoint after step {self.next_step} could not be written on rank 0")
        if failure is not None:
            self.reporter.checkpoint_failed(self.next_step, str(failure))
        elif self.run_directory is not None and self.world.is_main:
            self.reporter.checkpoint(self.next_step, path)
            self.recorder.progress(*self._progress())
        return not failed

    def _interrupt(self, reason: str, *, saved: bool) -> None:
        """End the run here, on all ranks, with a checkpoint. Raises `Interrupted`."""
        self.clock.stop()
        if not saved:
            self._save_checkpoint(needed=True)
        way_on = (
            "" if self.run_directory is None else f"; continue with: nanogpt train --resume {self.run_directory.path}"
        )
        raise Interrupted(f"{reason}: the run stopped after step {self.next_step}, its state is saved{way_on}")

    def _nothing_done(self, reason: str) -> Interrupted:
        return Interrupted(f"{reason}: the run stopped before its first step; there is nothing to save; start it again")

    def _load_checkpoint(self) -> bool:
        """Load the newest checkpoint in the run's directory, if there is one."""
        run = self.run_directory
        state = load_newest_checkpoint(run.checkpoint_directory, owner_check(run, self.spec)) if run else None
        self._check_same_everywhere("resumes at step", state["step"] if state else 0)
        if state is None:
            return False
        assert run is not None
        if not 0 <= state["step"] <= self.schedule.total_steps:
            raise InputError(
                f"{run.checkpoint_directory}: its newest checkpoint is of step {state['step']}, but the run has"
                f" {self.schedule.total_steps}; remove it if it is another run's"
            )
        self.next_step = state["step"]
        self._windows_of = max(self.next_step - 1, 0)
        with taken_over(run.checkpoint_directory):
            self.model.load_state_dict(model_state_of_rank(state, self.world.rank, self.world.size))
            self.optimizer.load_state_dict(state["optimizer"])
            self.train_batches.load_state_dict(state["batches"])
            self.end_of_run.load_state_dict(state.get("end_of_run", []))
            self.clock = Clock(self.world, float(state["elapsed_ms"]))
        return True

    def _check_same_everywhere(self, what: str, value: int) -> None:
        """Raise `RunError` if another rank has a different value."""
        mean = self.world.communicator.average(torch.tensor(float(value), device=self.world.device)).wait()
        if float(mean) != value:
            raise RunError(
                f"rank {self.world.rank} {what} {value}, but others do not. All ranks must see the same files: check"
                " the file system of the run's directory on every node"
            )
