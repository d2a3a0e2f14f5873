"""Compiled functions that are kept whole: a later process neither traces them nor asks torch's caches about them.

torch's cache has a graph's code, but Dynamo traces the function at every start to find out which graph that is: 1.5 s
for a record's. So a function's graph is compiled ahead of its first call (`torch._dynamo.aot_compile`), and what is
left of it, the bytecode that calls the graph and both passes, is a file of its own for each kind of call.

- A kind of call is what tracing may depend on: shapes, strides, dtypes and devices of tensors, all other arguments, and
  torch's modes. Tensors are arguments or read from the function's object at each call, never part of the file.
- Dynamo's guards are not kept. Source, versions and spec are in the file's key (`nanogpt.cache.key`); the numbers that
  tracing took from the function's object and its attributes are compared at each call.
- The process that compiles a graph runs what it has written, so the first run computes as every later one.
- What cannot be kept goes through torch.compile as usual, here and in later runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import functools
import hashlib
import io
import os
import pickle
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.console import say

FOLDER = "graphs"
UNKEPT = "its graph cannot be kept, and is traced at every start"
SUFFIX, REFUSED = ".graph", ".refused"
# In torch._dynamo.utils.counters. SPENT: by name of a function and of a field of `CompiledFunction`.
LOADED, PARTS_COMPILED = ("nanogpt", "graphs_loaded"), ("nanogpt", "parts_compiled")
NEW_KINDS, SPENT = "nanogpt: new kinds of calls", "nanogpt: spent"
RESTARTS = 3  # of tracing, which turns numbers into inputs one by one
SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.device)

_directory: ContextVar[Path | None] = ContextVar("directory of kept graphs", default=None)


@contextmanager
def kept_graphs(directory: Path) -> Iterator[None]:
    """Graphs of `compile_whole`'s functions are taken from `directory` and left there, while the context lasts."""
    token = _directory.set(directory)
    try:
        yield
    finally:
        _directory.reset(token)


def compile_whole(function: Callable[..., Any]) -> WholeFunction:
    """The compiled function: one graph per micro-batch size, which is constant in it; windows and scales are not."""
    # Adam's update has a graph for each shape of a shard; torch gives up at eight.
    torch._dynamo.config.recompile_limit = 64
    return WholeFunction(function)


class Unkept(Exception):
    """A graph that cannot be kept, or one that does not fit, and why."""


class WholeFunction:
    """A function or bound method that is compiled as one graph for each kind of call; see the module."""

    def __init__(self, function: Callable[..., Any]):
        self.name = function.__name__
        self._function = function
        self._plain: Any = getattr(function, "__func__", function)
        self._owner: tuple[Any, ...] = (function.__self__,) if isinstance(function, types.MethodType) else ()
        # Its only variable in the expressions of what tracing has read from it.
        self._variables = dict(zip(self._plain.__code__.co_varnames, self._owner, strict=False))
        self._owner_kind = tuple(_kind_of_owner(owner) for owner in self._owner)
        self._by_torch: Callable[..., Any] | None = None
        self._graphs: dict[Any, Graph] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the graph for such arguments, which is found or compiled first."""
        graph = self.prepare(*args, **kwargs)
        return self._traced()(*args, **kwargs) if graph is None else graph.call(*args, **kwargs)

    def prepare(self, *args: Any, **kwargs: Any) -> Graph | None:
        """Find or compile the graph for such arguments; None: torch.compile has it, and compiles it when called."""
        directory = _directory.get()
        try:
            kind = kind_of_call(args, kwargs) if directory is not None else None
        except Unkept as error:
            if self._by_torch is None:
                say(f"{self.name}: {UNKEPT}: {error}")
            kind = None
        if directory is None or kind is None:
            return None
        graph = self._graphs.get(kind)
        if graph is None or not graph.fits(self._variables):
            graph = self._graphs[kind] = self._find_or_make(directory, kind, args, kwargs)
        return graph

    def _traced(self) -> Callable[..., Any]:
        if self._by_torch is None:
            self._by_torch = torch.compile(self._function, fullgraph=True, dynamic=False)
        return self._by_torch

    def _find_or_make(self, directory: Path, kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph:
        from torch._dynamo.utils import counters

        if self._graphs:
            counters[NEW_KINDS][f"{self.name}: {_difference(kind, list(self._graphs)[-1])}"] += 1
        digest = hashlib.sha256(repr((self._owner_kind, kind)).encode()).hexdigest()[:16]
        path = directory / f"{self._plain.__qualname__}-{digest}{SUFFIX}"
        refused = path.with_suffix(REFUSED)
        if refused.exists():
            return Graph(self._traced(), {})
        if path.exists():
            try:
                started = time.perf_counter()
                graph = self._load(path)
                counters[LOADED[0]][LOADED[1]] += 1
                self._count_spent(graphs=1, forward_s=_since(started))
                return graph
            except Exception as error:
                say(f"{path.name}: not used: {_reason(error)}; compiling it again")
        graphs = counters["stats"]["unique_graphs"]  # a failed attempt may have counted, or one that restarted twice
        try:
            self._make(path, args, kwargs)
            graph = self._load(path)
            counters["stats"]["unique_graphs"] = graphs + 1
            return graph
        except Exception as error:  # an error of the function's own comes again
            say(f"{self.name}: {UNKEPT}: {_reason(error)}")
            counters["stats"]["unique_graphs"] = graphs
            path.unlink(missing_ok=True)
            if not isinstance(error, OSError | MemoryError | torch.OutOfMemoryError):  # may be otherwise next time
                with contextlib.suppress(OSError):
                    _write(refused, _reason(error).encode())
            return Graph(self._traced(), {})

    def _make(self, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compile the graph for these arguments into `path`."""
        from torch._dynamo.aot_compile import AOTCompilePickler
        from torch._dynamo.package import SerializedCode
        from torch._dynamo.utils import counters

        constants: dict[str, Any] = {}

        def keep_constants(guards: Any) -> list[bool]:
            for guard in guards:
                if not guard.is_global and type(guard.value) in SIMPLE:
                    with contextlib.suppress(Exception):  # of an argument, or no expression of Python
                        if _same(eval(guard.name, {}, self._variables), guard.value):
                            constants[guard.name] = guard.value
            return [False] * len(guards)

        made = self._compile_ahead(keep_constants, args, kwargs)._artifacts
        code = made.runtime_env.bytecode
        if any(instruction.opname in ("LOAD_DEREF", "LOAD_CLOSURE") for instruction in dis.get_instructions(code)):
            raise Unkept("its bytecode reads what the function encloses")
        with torch._functorch.config.patch(bundled_autograd_cache=True):
            passes = made.compiled_fn.compiled_fn.serialize()
        counters[PARTS_COMPILED[0]][PARTS_COMPILED[1]] += 1 if passes.compiled_bw is None else 2
        environment = dataclasses.replace(
            made.runtime_env, bytecode=SerializedCode.from_code_object(code), closure=None
        )
        content = io.BytesIO()
        pickler = AOTCompilePickler({}, content)
        pickler.dump((made.backend_id, environment, constants, pickle.dumps(passes)))
        if pickler.errors:
            kinds = ", ".join(sorted({type(value).__name__ for value in pickler.errors.values()}))
            raise Unkept(f"its bytecode refers to a module: {kinds}")
        _write(path, content.getvalue())

    def _compile_ahead(
        self, guard_filter: Callable[[Any], list[bool]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        from torch._dynamo.exc import TensorifyScalarRestartAnalysis
        from torch._dynamo.utils import counters, cumulative_time_spent_ns

        events = {"forward_s": "inductor_compile", "kernels_s": "async_compile.wait"}  # of both passes
        before, started = [cumulative_time_spent_ns[event] for event in events.values()], time.perf_counter()
        with torch._dynamo.config.patch(enable_aot_compile=True), _without_torchs_entry(), tilings_solved_once():
            options: dict[str, Any] = {"guard_filter_fn": guard_filter}
            compiled: Any = torch.compile(self._function, fullgraph=True, dynamic=False, options=options)
            for attempt in range(RESTARTS + 1):
                operations = counters["stats"]["calls_captured"]
                try:
                    made = compiled.aot_compile((args, kwargs))
                    break
                except TensorifyScalarRestartAnalysis:
                    if attempt == RESTARTS:
                        raise
        spent = {
            field: (cumulative_time_spent_ns[event] - ns) / 1e9
            for (field, event), ns in zip(events.items(), before, strict=True)
        }
        operations = counters["stats"]["calls_captured"] - operations
        self._count_spent(graphs=1, operations=operations, tracing_s=_since(started) - spent["forward_s"], **spent)
        return made

    def _count_spent(self, **amounts: float) -> None:
        from torch._dynamo.utils import counters

        spent: Any = counters[SPENT]
        spent.update({(self.name, field): amount for field, amount in amounts.items()})

    def _load(self, path: Path) -> Graph:
        from torch._dynamo.aot_compile import AOTCompileUnpickler
        from torch._dynamo.package import SerializedCode
        from torch._dynamo.utils import counters
        from torch._functorch._aot_autograd.aot_autograd_result import deserialize_bundled_cache_entry
        from torch._inductor.async_compile import CompiledTritonKernels

        backend_id, environment, constants, passes = AOTCompileUnpickler({}, io.BytesIO(_read(path))).load()
        for name, value in constants.items():
            if not _same(found := eval(name, {}, self._variables), value):
                raise Unkept(f"{name} was {value!r} and is {found!r}")
        CompiledTritonKernels.cache_clear()  # as torch does before a graph of its cache is loaded
        before = {name: counters[name].copy() for name in ("inductor", "aot_autograd")}
        # Its kernels come from the cache: no processes are started to compile them.
        with torch._inductor.config.patch(enable_autograd_for_aot=True, compile_threads=1):
            entry = pickle.loads(passes)
            entry.__deepcopy__ = lambda _: entry  # else all of it is copied, to be serialized again
            both_passes = deserialize_bundled_cache_entry(entry)
        for name, counts in before.items():  # a loaded graph repeats what was counted when it was compiled
            counters[name] = counts
        code = SerializedCode.to_code_object(environment.bytecode)
        environment = dataclasses.replace(
            environment, bytecode=code, closure=tuple(types.CellType() for _ in code.co_freevars)
        )
        graph = environment.forward_callable(backend_id, both_passes, extra_globals=self._plain.__globals__)
        return Graph(types.MethodType(graph, *self._owner) if self._owner else graph, constants)


def prepare(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Find or compile the function's graph for such arguments without calling it, if it is a `WholeFunction`."""
    if isinstance(function, WholeFunction):
        function.prepare(*args, **kwargs)


class Graph:
    """What to `call` for a kind of call; `constants`: what tracing has read from the function's object."""

    def __init__(self, call: Callable[..., Any], constants: Mapping[str, Any]):
        self.call = call
        self._values = tuple(constants.values())
        self._expressions = compile(f"({''.join(f'{name}, ' for name in constants)})", "<constants>", "eval")

    def fits(self, variables: dict[str, Any]) -> bool:
        """Whether all of it is as it was."""
        found: bool = eval(self._expressions, {}, variables) == self._values
        return found


@contextmanager
def _without_torchs_entry() -> Iterator[None]:
    """torch's cache keeps no copy of what is compiled meanwhile."""
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache

    cache: Any = AOTAutogradCache
    before = cache._write_to_local_cache
    cache._write_to_local_cache = staticmethod(lambda key, content: None)
    try:
        yield
    finally:
        cache._write_to_local_cache = staticmethod(before)


@contextmanager
def tilings_solved_once() -> Iterator[None]:
    """Inductor solves each index for a tiling once while the context lasts, not again in every layer that has it.

    Sympy decides by random numbers whether an expression is constant, in some milliseconds.
    """
    from torch._inductor import tiling_utils

    module: Any = tiling_utils
    before = module.solve_for_tiling
    module.solve_for_tiling = functools.cache(before)
    try:
        yield
    finally:
        module.solve_for_tiling = before


def kind_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Everything about a call that tracing may depend on, hashable. Raises `Unkept` for an argument of unknown type."""
    seen: dict[int, int] = {}
    modes = (
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
    )
    return (modes, _kind(args, seen), *((name, _kind(kwargs[name], seen)) for name in sorted(kwargs)))


def _kind(value: Any, seen: dict[int, int]) -> Any:
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter:
        number = seen.setdefault(id(value), len(seen))  # the same tensor twice is another graph
        return (number, kind, value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
    if kind in SIMPLE:
        return (kind, repr(value) if kind is float else value)  # 0.0 equals -0.0, NaN not itself, and 1 equals True
    if isinstance(value, tuple | list):
        return (kind, *[_kind(entry, seen) for entry in value])
    if isinstance(value, Mapping):
        return (kind, *[(name, _kind(entry, seen)) for name, entry in value.items()])
    if dataclasses.is_dataclass(value):
        return (kind, *[(f.name, _kind(getattr(value, f.name), seen)) for f in dataclasses.fields(value)])
    raise Unkept(f"an argument is a {kind.__name__}")


def _kind_of_owner(owner: Any) -> Any:
    """What of a method's object is known to matter: a module's tensors."""
    seen: dict[int, int] = {}
    tensors = [*owner.named_parameters(), *owner.named_buffers()] if isinstance(owner, nn.Module) else []
    return (type(owner), *[(name, _kind(tensor, seen)) for name, tensor in tensors])


def _difference(one: Any, other: Any) -> str:
    """The first place where two kinds of call differ."""
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return next((_difference(a, b) for a, b in zip(one, other, strict=True) if a != b), "the function's object")
    return f"{one} instead of {other}"


def _since(started: float) -> float:
    return time.perf_counter() - started


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, whichever process is faster; with a checksum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read(path: Path) -> bytes:
    whole = path.read_bytes()
    if hashlib.sha256(whole[32:]).digest() != whole[:32]:
        raise Unkept("damaged")
    return whole[32:]
