"""A run's use of the compile cache: from the file to a directory on the node, and back where something was compiled.

Notable features:
- The first rank of a node reads the file and unpacks it into a directory that it has made for this job alone; torch,
  Triton and FlashAttention of all ranks there look for compiled code in it, and leave theirs in it. On a GPU another
  process does so while the compiler is imported.
- After the warm-up, rank 0 writes the file again if anything has been compiled, with what another job may have added.
  A few small kernels that the file lacked do not hold up the run: they are added at its end.
- Nothing here fails a run: a file that cannot be used or written is a line in the log.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt.cache.key import cache_key, key_of_spec, key_sha256
from nanogpt.cache.pack import SUFFIX, Header, Pack, PackError, count_contents, kept_files, peek, write_pack
from nanogpt.cache.tuning import FOLDER, kept_tuning, kernels_counted
from nanogpt.console import human_bytes
from nanogpt.environment import path_of
from nanogpt.private_directories import make_private
from nanogpt.spec import RunSpec

if TYPE_CHECKING:
    from nanogpt.launch.world import World

VARIABLE = "NANOGPT_CACHE"
OFF = "off"
IMAGE_DIRECTORY = Path("/opt/nanogpt/cache")  # files that ship in a container's image; looked at second
PRIVATE_PREFIX = "nanogpt-compiled-"
CUTE_DSL_FOLDER = "tmp.cute-dsl"  # not kept: FlashAttention keeps the same code itself, and its key names the place
FEW_KERNELS = 8  # Triton's: compiling this many takes about as long as writing the file


def cache_directory(runs: Path | str | None = None) -> Path | None:
    """Where cache files are: NANOGPT_CACHE, else `cache` in the directory of the `runs`; None: NANOGPT_CACHE is off."""
    if os.environ.get(VARIABLE) == OFF:
        return None
    return path_of(VARIABLE) or Path(runs or path_of("NANOGPT_RUNS") or "runs") / "cache"


def may_have(spec: RunSpec, directory: Path) -> bool:
    """Whether a file in `directory`, or the image, is for the spec's code, as far as can be told without torch.

    Its versions and machine are not asked about.
    """
    wanted = key_of_spec(spec)
    for path in (*directory.glob(f"*{SUFFIX}"), *IMAGE_DIRECTORY.glob(f"*{SUFFIX}")):
        with contextlib.suppress(OSError, PackError):
            key = peek(path).key
            if all(key.get(name) == value for name, value in wanted.items()):
                return True
    return False


class CompileCache:
    """A run's compiled code. Made by `compile_cache`."""

    def __init__(self, world: World | None = None, directory: Path | None = None):
        self.lines: list[str] = []  # for the log: what became of the file
        self.loaded: Header | None = None
        self.found = False  # a file was read on every node; the same on all ranks
        self.root: Path | None = None  # where compiled code is while the run lasts; None: where torch keeps it
        self.helpers: Any = ()  # from `when_cold`, if no file was found
        self._world = world
        self._directory = directory
        self._key: dict[str, Any] = {}
        self._recipe = ""
        self._fresh = False
        self._names: set[str] = set()  # what the file has
        self._lock: int | None = None

    @property
    def path(self) -> Path:
        """The file of this run's key."""
        assert self._directory is not None
        return self._directory / file_name(self._key)

    def save(self, *, small_additions: bool = True) -> str | None:
        """Keep what has been compiled so far for later runs. Every rank calls it; returns rank 0's line for the log.

        Without `small_additions`, a file that was used is not written again for a few small kernels that it lacked.
        """
        world = self._world
        if world is None or self.root is None:
            return None
        world.communicator.barrier()  # the others' code, too
        if not world.is_main:
            return None
        new = set(kept_files(self.root)) - self._names
        if not new or (not small_additions and self.loaded is not None and _is_small_addition(new)):
            return None
        started = time.perf_counter()
        if not self._fresh:
            with contextlib.suppress(PackError, OSError):  # another job's
                other = Pack(self.path)
                if other.header.key_sha256 == key_sha256(self._key):
                    other.unpack(self.root)
        try:
            header = write_pack(
                self.path, self.root, key=self._key, key_sha256=key_sha256(self._key), recipe=self._recipe
            )
            size = self.path.stat().st_size
        except OSError as error:
            return self._say(f"{self.path}: cannot be written: {error.strerror}; the next run compiles again")
        self._names = set(kept_files(self.root))
        seconds = time.perf_counter() - started
        return self._say(f"{self.path}: written, {_describe(header, size)} in {seconds:.1f} s")

    # --- for compile_cache ---

    def _say(self, text: str) -> str:
        line = f"compile cache: {text}"
        self.lines.append(line)
        return line

    def _files(self) -> list[Path]:
        """The run's file, and the image's, where they are there."""
        return [path for path in (self.path, IMAGE_DIRECTORY / self.path.name) if path.exists()]

    def _load(self, files: Sequence[Path], *, apart: bool = False) -> None:
        """Unpack the first of `files` that can be used into `root`; `apart`: by another process."""
        assert self._directory is not None and self.root is not None
        for path in files:
            try:
                pack = Pack(path, in_image=path.parent == IMAGE_DIRECTORY and _in_container())
                if pack.header.key_sha256 != key_sha256(self._key):
                    raise PackError(f"made for other code: differs in {differences(pack.header.key, self._key)}")
                self._names = set(pack.unpack_apart(self.root) if apart else pack.unpack(self.root))
            except (PackError, OSError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                self._say(f"{path}: not used: {reason}; compiling")
                _empty(self.root)
                continue
            self.loaded = pack.header
            self._say(f"{path}: used, {_describe(pack.header, pack.size)}")
            with contextlib.suppress(OSError):  # the newest are kept by `nanogpt cache prune`
                os.utime(path)
            return
        if not self.lines:
            self._say(f"{self.path}: not there yet{self._nearest()}; compiling, and keeping it for later runs")

    def _nearest(self) -> str:
        """How the newest file that is there differs."""
        assert self._directory is not None
        with contextlib.suppress(OSError, PackError):
            files = sorted(self._directory.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime)
            if files:
                return f" (the newest one differs in {differences(peek(files[-1]).key, self._key)})"
        return ""


@contextmanager
def compile_cache(
    spec: RunSpec,
    world: World,
    directory: Path | None,
    *,
    fresh: bool = False,
    when_cold: Callable[[Path], AbstractContextManager[Any]] | None = None,
) -> Iterator[CompileCache]:
    """While the context lasts, compiled code is taken from the file for the spec's key, and kept in it.

    Every rank enters it, before anything is compiled and before FlashAttention is imported.

    Args:
        spec: the run.
        world: this process.
        directory: where the files are; rank 0's counts. None: no file is used, and none written.
        fresh: take nothing from a file; it is replaced.
        when_cold: entered with the directory of compiled code as soon as it is known that no file will fill it, by a
            node's first rank; what it gives becomes `helpers`. It is left before the directory goes.
    """
    directory, chosen = world.gather((directory, _users_directory()), tuple[Path | None, str | None])[0]
    cache = CompileCache(world, directory)
    if directory is None or chosen is not None:
        if directory is not None:
            cache._say(f"TORCHINDUCTOR_CACHE_DIR is set: compiled code is kept in {chosen}, and no file is used")
        with places_of_this_job(chosen):
            yield cache
        return
    cache._key, cache._recipe, cache._fresh = cache_key(spec, world.device), spec.name, fresh
    mine = None
    if world.local_rank == 0:
        try:
            mine, cache._lock = make_private(PRIVATE_PREFIX)
        except OSError as error:
            cache._say(f"{error.filename or tempfile.gettempdir()}: {error.strerror}; no file is used")
    # What follows has collectives in it, so all nodes do the same: if one has no room, none uses a file.
    everywhere = world.gather((world.local_rank == 0, mine), tuple[bool, Path | None])
    if all(root is not None for leads, root in everywhere if leads):
        cache.root = everywhere[world.rank - world.local_rank][1]
    elif mine is not None:
        cache._say("a node has no room for compiled code; no file is used")
    try:
        with _compiled_code_in(cache.root), ExitStack() as stack:
            if cache.root is None:
                stack.enter_context(places_of_this_job())
            reads = cache.root is not None and mine is not None and not fresh
            files = cache._files() if reads else []

            def cold() -> None:
                if cache.root is not None and mine is not None and when_cold is not None:
                    cache.helpers = stack.enter_context(when_cold(cache.root))

            if not files:
                cold()
            apart = world.device.type == "cuda"
            with ThreadPoolExecutor(1) as reader:
                reading = reader.submit(cache._load, files, apart=apart) if reads else None
                stack.enter_context(_tuning_in(cache.root, world))  # imports the compiler meanwhile
                if apart:
                    stack.enter_context(kernels_counted())
                if reading is not None:
                    reading.result()
            if files and cache.loaded is None:
                cold()
            cache.found = all(world.gather(cache.loaded is not None or mine is None)) and cache.root is not None
            yield cache
            cache.save()  # what a run without warm-up has compiled
    finally:
        if mine is not None:
            shutil.rmtree(mine, ignore_errors=True)
        if cache._lock is not None:
            os.close(cache._lock)


@contextmanager
def compiled_code_of(root: Path, world: World) -> Iterator[None]:
    """For a process that helps another: compiled code is read from and left in the `root` of the other's cache."""
    with _compiled_code_in(root), _tuning_in(root, world):
        yield


def file_name(key: Mapping[str, Any]) -> str:
    """The file name for a key; it includes the device and torch's version for people to read."""
    device = "".join(c if c.isalnum() else "-" for c in str(key["device"][0]).removeprefix("NVIDIA ").lower())
    return f"{device}-torch{key['torch'][0]}-{key_sha256(key)[:16]}{SUFFIX}"


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Where two keys differ, down to the names of packages and spec keys."""
    parts = []
    for name in wanted:
        one, other = found.get(name), wanted[name]
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            parts += [f"{name} {key}" for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
        else:
            parts.append(name)
    return ", ".join(parts[:8]) + (", ..." if len(parts) > 8 else "") or "nothing"


def _describe(header: Header, size: int) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in header.contents.items() if count)
    return f"{human_bytes(size)} ({counts})"


@contextmanager
def _compiled_code_in(root: Path | None) -> Iterator[None]:
    """Point torch, Triton and FlashAttention 4 at `root`."""
    if root is None:
        yield
        return
    import torch._functorch.config

    from nanogpt.cache import graphs

    variables = _places(root) | {
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
        "TRITON_STORE_BINARY_ONLY": "1",  # without the stages before it: half of the files
        "TRITON_CACHE_MANAGER": os.environ.get("TRITON_CACHE_MANAGER", "nanogpt.cache.compiled_once:CompiledOnce"),
    }
    # Else no graph with the MLP in it, a torch.autograd.Function, would be kept. It changes no code; and what such a
    # function does is part of the graph's key, its source of the file's.
    custom_functions = torch._functorch.config.patch(autograd_cache_allow_custom_autograd_functions=True)
    with _environment(variables), custom_functions, graphs.kept_graphs(root / graphs.FOLDER):
        yield


def _places(root: Path) -> dict[str, str]:
    """Where each compiler keeps its output. Their defaults lie in a shared /tmp, under the user's name."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(root / "inductor"),
        "TRITON_CACHE_DIR": str(root / "triton"),
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(root / "cute"),
        "CUTE_DSL_CACHE_DIR": str(root / CUTE_DSL_FOLDER),
    }


@contextmanager
def places_of_this_job(chosen: str | None = None) -> Iterator[None]:
    """Without a file: a directory for this process's compiled code alone, except what the user has `chosen`.

    What others have put under the compilers' default names is not run: torch's and CuTe's
    lie in /tmp (Triton's is in home). Where there is no room for a directory they get one that does not exist:
    a process that compiles nothing needs none.
    """
    try:
        root, lock = make_private(PRIVATE_PREFIX)
    except OSError:
        root, lock = Path(tempfile.gettempdir(), f"{PRIVATE_PREFIX}{os.geteuid()}-{secrets.token_hex(16)}"), None
    places = {name: place for name, place in _places(root).items() if name not in os.environ}
    places.pop("TRITON_CACHE_DIR", None)
    if chosen is None:
        places["TORCHINDUCTOR_CACHE_DIR"] = str(root / "inductor")
    try:
        with _environment(places):
            yield
    finally:
        shutil.rmtree(root, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _tuning_in(root: Path | None, world: World) -> AbstractContextManager[None]:
    return kept_tuning(root / FOLDER) if root is not None and world.device.type == "cuda" else nullcontext()


def _is_small_addition(names: Collection[str]) -> bool:
    """Whether a run that finds everything but these files loses hardly any time."""
    counts = count_contents(names)
    return counts.pop("Triton kernels") <= FEW_KERNELS and not any(counts.values())


def _users_directory() -> str | None:
    """TORCHINDUCTOR_CACHE_DIR, unless it is torch's own choice, which it writes there at its first use."""
    found = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if found is None:
        return None
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return None if found == default_cache_dir() else found


def _in_container() -> bool:
    return bool(os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER"))


def _empty(root: Path) -> None:
    """Remove what a broken file has left."""
    for child in root.iterdir():
        if child.is_dir():
            shutil.rmtree(child, ignore_errors=True)
