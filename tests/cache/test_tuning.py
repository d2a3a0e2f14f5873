"""Choices among the variants of a kernel, on torch's own class; only its calls of the GPU are played."""

from __future__ import annotations

import contextlib
import json
import pickle
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor import async_compile
from torch._inductor.runtime import benchmarking
from torch._inductor.runtime.hints import HeuristicType
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

from nanogpt.cache import tuning
from nanogpt.cache.tuning import kept_tuning
from nanogpt.training.compilation import compile_counts


def variant(block: int) -> Any:
    return SimpleNamespace(config=SimpleNamespace(kwargs={"XBLOCK": 1, "R0_BLOCK": block}, num_warps=4, num_stages=1))


class Launcher(SimpleNamespace):
    __hash__ = object.__hash__


class Kernel(CachingAutotuner):
    """A kernel that has been loaded in the variants `blocks`, as a graph from the cache brings it."""

    def __init__(self, directory: str, blocks: Sequence[int], fastest: int | None):
        self.fn: Any = SimpleNamespace(__name__="sum")
        self.filename = f"{directory}/inductor/ab/cabcdef.py"
        self.inductor_meta: dict[str, Any] = {}
        self.triton_meta: dict[str, Any] = {}
        self.compile_results: list[Any] = [variant(block) for block in blocks]
        self.launchers: list[Any] = []
        self.fastest = fastest
        self.precompile_time_taken_ns = 0
        self.save_cache_hook = None
        self.lock = threading.Lock()
        self._plugins: list[Any] = []

    def _precompile_worker(self) -> None: ...

    def _make_launchers(self) -> None:
        self.launchers = [
            Launcher(config=result.config, n_regs=0, n_spills=0, shared=0, cache_hash="")
            for result in self.compile_results
        ]

    def _dynamic_scale_rblock(self) -> None:
        if self.inductor_meta.get("dynamic_scale_rblock", True):
            self.compile_results.append(variant(self.compile_results[-1].config.kwargs["R0_BLOCK"] // 2))
            self._make_launchers()

    def benchmark_all_configs(self, *args: object, **kwargs: object) -> dict[Any, float]:
        assert self.fastest is not None, "timed although the choice is known"
        return {launcher: float(block(launcher) != self.fastest) for launcher in self.launchers}


def block(launcher: Any) -> int:
    return int(launcher.config.kwargs["R0_BLOCK"])


def chosen(directory: Path, job: str, fastest: int | None, blocks: Sequence[int] = (64, 256, 1024)) -> int:
    """What a job launches; `fastest` by its own clock, None: it must not ask the clock."""
    with kept_tuning(directory):
        kernel = Kernel(job, blocks, fastest)
        kernel.precompile(static_triton_bundle_key=None)
        if len(kernel.launchers) > 1:
            kernel.autotune_to_one_config()
    [launcher] = kernel.launchers
    return block(launcher)


@pytest.mark.parametrize("fastest", [256, 512])  # one of those that are kept, and one that inductor derives at load
def test_a_job_in_another_directory_chooses_the_same_without_the_clock(tmp_path: Path, fastest: int):
    before = compile_counts().kernels_tuned
    assert chosen(tmp_path, "/tmp/job-1", fastest) == fastest
    assert compile_counts().kernels_tuned == before + 1
    assert chosen(tmp_path, "/tmp/job-2", None) == fastest
    assert compile_counts().kernels_tuned == before + 1


def test_a_known_variant_is_loaded_alone(tmp_path: Path):
    chosen(tmp_path, "/tmp/job-1", 64)
    with kept_tuning(tmp_path):
        kernel = Kernel("/tmp/job-2", (64, 256, 1024), None)
        kernel.precompile(static_triton_bundle_key=None)
    assert [block(launcher) for launcher in kernel.launchers] == [64]


def test_the_first_of_several_ranks_decides_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where the file system has no locks."""
    monkeypatch.setattr(tuning, "_alone", lambda directory: contextlib.nullcontext())
    with kept_tuning(tmp_path):
        ranks = [Kernel("/tmp/job", (64, 256), fastest) for fastest in (64, 256)]
        for kernel in ranks:
            kernel._make_launchers()
        slow, fast = ranks
        fast_clock = slow.benchmark_all_configs

        def overtaken(*args: object, **kwargs: object) -> dict[Any, float]:
            fast.autotune_to_one_config()
            return fast_clock()

        slow.benchmark_all_configs = overtaken  # type: ignore[method-assign]
        slow.autotune_to_one_config()
    assert [[block(launcher) for launcher in kernel.launchers] for kernel in ranks] == [[256], [256]]


@pytest.mark.parametrize("room", [True, False])
def test_a_kernel_that_overwrites_what_it_reads_is_timed_on_copies_on_the_gpu(tmp_path: Path, room: bool):
    """If the GPU has room; else inductor brings the contents back from the host."""
    from_host: list[bool] = []
    with kept_tuning(tmp_path):
        kernel = Kernel("/tmp/job", (64, 256), 256)
        kernel.optimize_mem = True
        kernel._make_launchers()
        clock = kernel.benchmark_all_configs

        def timed(*args: object, **kwargs: object) -> dict[Any, float]:
            from_host.append(kernel.optimize_mem)
            if not kernel.optimize_mem and not room:
                raise torch.OutOfMemoryError
            return clock()

        kernel.benchmark_all_configs = timed  # type: ignore[method-assign]
        kernel.autotune_to_one_config()
    assert from_host == ([False] if room else [False, True])
    assert [block(launcher) for launcher in kernel.launchers] == [256] and kernel.optimize_mem


def test_a_variant_is_timed_by_few_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only while a kernel is tuned."""
    timed: list[dict[str, object]] = []

    def benchmark_gpu(self: object, function: object, **how: object) -> float:
        timed.append({name: how.get(name) for name in ("benchmark_iters", "memory_warmup_iters")})
        return 1.0

    monkeypatch.setattr(benchmarking.InductorBenchmarker, "benchmark_gpu", benchmark_gpu)
    monkeypatch.setattr(benchmarking, "benchmarker", clock := benchmarking.InductorBenchmarker())

    class Timed(Kernel):
        def benchmark_all_configs(self, *args: object, **kwargs: object) -> dict[Any, float]:
            clock.benchmark(fn=print, device="cuda", rep=40, is_vetted_benchmarking=True)
            return super().benchmark_all_configs()

    with kept_tuning(tmp_path):
        kernel = Timed("/tmp/job", (64, 256), 256)
        kernel._make_launchers()
        kernel.autotune_to_one_config()
    clock.benchmark(fn=print, device="cuda", rep=40, is_vetted_benchmarking=True)
    few, as_ever = {"benchmark_iters": 10, "memory_warmup_iters": 10}, dict.fromkeys(timed[-1])
    assert timed == [few, as_ever]


def test_processes_of_a_node_tune_one_after_another(tmp_path: Path):
    """Two that time kernels on one GPU would see each other's; and what one has timed the other need not."""
    with kept_tuning(tmp_path):
        kernel = Kernel("/tmp/job", (64, 256), None)  # which must not ask the clock
        kernel._make_launchers()
        with ThreadPoolExecutor(1) as other:
            with tuning._alone(tmp_path):
                waiting = other.submit(kernel.autotune_to_one_config)
                with pytest.raises(TimeoutError):
                    waiting.result(timeout=0.3)
                choice = tuning._description(variant(256).config)
                (tmp_path / "cabcdef.json").write_text(json.dumps(choice))
            waiting.result(timeout=60)
    assert [block(launcher) for launcher in kernel.launchers] == [256]


def config(x_block: int, **blocks: int) -> Any:
    return SimpleNamespace(kwargs={"XBLOCK": x_block, **blocks}, num_warps=8, num_stages=1)


class Reduction(CachingAutotuner):
    """A kernel as its source makes it, in `configs`, of which no variant is compiled yet."""

    def __init__(self, configs: Sequence[Any], outputs: int, kind: HeuristicType, **settings: Any):
        self.fn: Any = SimpleNamespace(fn=print)
        self.configs: Any = list(configs)
        self.inductor_meta: dict[str, Any] = settings
        self.deterministic_mode = settings.get("deterministic", False)
        self.heuristic_type = kind
        self.size_hints = {"x": outputs, "r0_": 4096}
        self.device_props: Any = SimpleNamespace(
            type="cuda",
            major=9,
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=2048,
            multi_processor_count=132,
            warp_size=32,
            warp_size_or_default=32,
        )
        self.compile_results: list[Any] = []
        self.autotune_cache_info = None

    def _make_launchers(self) -> None: ...

    def _precompile_config(self, cfg: Any) -> Any:
        return SimpleNamespace(config=cfg, kernel=SimpleNamespace(n_regs=None))

    def derived(self) -> list[Any]:
        """What inductor makes of it after a load, where a thread needs 255 registers."""
        self.compile_results = [
            SimpleNamespace(config=config, kernel=SimpleNamespace(n_regs=255)) for config in self.configs
        ]
        CachingAutotuner._dynamic_scale_rblock(self)
        return [result.config for result in self.compile_results]


@pytest.mark.parametrize(
    ("configs", "outputs", "kind", "settings", "more"),
    [
        ([config(2, R0_BLOCK=1024)], 65536, HeuristicType.REDUCTION, {}, 1),
        ([config(1, R0_BLOCK=512, R1_BLOCK=1024)], 65536, HeuristicType.REDUCTION, {}, 1),
        ([config(1, R0_BLOCK=1024), config(1, R0_BLOCK=512)], 65536, HeuristicType.REDUCTION, {}, 1),
        ([config(2, R0_BLOCK=1024)], 264, HeuristicType.REDUCTION, {}, 0),  # a program on each multiprocessor
        ([config(2, R0_BLOCK=1024)], 265, HeuristicType.REDUCTION, {}, 1),
        ([config(64, R0_BLOCK=64)], 65536, HeuristicType.REDUCTION, {}, 0),
        pytest.param(
            *([config(2, R0_BLOCK=1024)], 65536, HeuristicType.REDUCTION, {"min_rblock": 1024}, 0),
            marks=pytest.mark.skipif(
                not hasattr(CachingAutotuner, "_iter_rblock_scale_candidates"), reason="torch has no such limit yet"
            ),
        ),
        ([config(2, R0_BLOCK=1024)], 65536, HeuristicType.REDUCTION, {"persistent_reduction": True}, 0),
        ([config(2, R0_BLOCK=1024)], 65536, HeuristicType.REDUCTION, {"deterministic": True}, 0),
        ([config(2, R0_BLOCK=1024)], 65536, HeuristicType.REDUCTION, {"dynamic_scale_rblock": False}, 0),
        ([config(1024)], 65536, HeuristicType.POINTWISE, {}, 0),
    ],
)
def test_a_process_compiles_the_variants_that_inductor_derives_later(
    configs: list[Any], outputs: int, kind: HeuristicType, settings: dict[str, Any], more: int
):
    """The same ones, if a thread needs many registers; then nothing is left to derive."""
    wanted = [tuning._description(derived) for derived in Reduction(configs, outputs, kind, **settings).derived()]
    kernel = tuning._with_derived(lambda: Reduction(configs, outputs, kind, **settings))
    found = [tuning._description(config) for config in kernel.configs]
    assert found == wanted and len(found) == len(configs) + more
    assert [tuning._description(config) for config in kernel.derived()] == found


def test_inductors_processes_are_given_all_variants(tmp_path: Path):
    """Called as inductor does, by a name that another process can import."""

    class Compiled(Reduction):
        def precompile(self, *args: Any, **kwargs: Any) -> None:
            self.compile_results = [self._precompile_config(config) for config in self.configs]

        def prepare_for_pickle(self) -> Any: ...

    with kept_tuning(tmp_path):
        task = pickle.loads(pickle.dumps(async_compile._worker_compile_triton))
    kernel, _ = task(lambda: Compiled([config(2, R0_BLOCK=1024)], 65536, HeuristicType.REDUCTION), {}, {})
    assert [result.config.kwargs["R0_BLOCK"] for result in kernel.compile_results] == [1024, 512]


@pytest.mark.parametrize("content", ["", "null", "[]", '{"R0_BLOCK": 7}'])
def test_a_choice_that_is_none_of_the_variants_is_not_taken(tmp_path: Path, content: str):
    (tmp_path / "cabcdef.json").write_text(content)
    assert chosen(tmp_path, "/tmp/job", 256) == 256


def test_a_kernel_without_a_source_is_tuned_as_ever(tmp_path: Path):
    with kept_tuning(tmp_path):
        kernel = Kernel("/tmp/job", (64, 256), 256)
        kernel.filename = None  # type: ignore[assignment]
        kernel._make_launchers()
        kernel.autotune_to_one_config()
    assert [block(launcher) for launcher in kernel.launchers] == [256]
    assert not list(tmp_path.glob("*.json"))


def test_torch_is_as_before_afterwards(tmp_path: Path):
    def changed() -> tuple[Any, ...]:
        kernel = CachingAutotuner
        return kernel.autotune_to_one_config, kernel.precompile, async_compile._worker_compile_triton

    before = changed()
    with pytest.raises(RuntimeError), kept_tuning(tmp_path):
        assert not set(changed()) & set(before)
        raise RuntimeError
    assert changed() == before
