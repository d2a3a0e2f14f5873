"""A run's use of the cache: which file, when it is not used, and the job's directory on the node."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import losses, make_data, python, tiny_spec, train, write_recipe

from nanogpt.cache import compile_cache as module
from nanogpt.cache.compile_cache import CompileCache, cache_directory, compile_cache
from nanogpt.cache.key import cache_key
from nanogpt.cache.pack import SUFFIX
from nanogpt.launch.world import World
from nanogpt.optim.communication import Communicator
from nanogpt.runs.record import Record, read_record

SPEC = tiny_spec()
WORLD = World(0, 1, 0, torch.device("cpu"), Communicator())


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node-local directory of the test's own, and no choice of a compiler's directory."""
    place = tmp_path / "node"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    return place


class SecondRank(World):
    """Of a node, the first rank of which has made a directory."""

    def gather(self, value, kind=None):  # type: ignore[no-untyped-def]
        first = (True, Path(tempfile.gettempdir())) if value == (False, None) else value
        return [first, value]


def use(directory: Path | None, **compiled: str) -> CompileCache:
    """A run that finds what is kept, and compiles `compiled`: names and contents of files."""
    with compile_cache(SPEC, WORLD, directory) as cache:
        if cache.root is not None:
            place = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
            assert place.parent == cache.root
            place.mkdir(exist_ok=True)
            for name, content in compiled.items():
                (place / name).write_text(content)
            cache.save()
    return cache


def found(directory: Path) -> dict[str, str]:
    """What a run finds compiled."""
    with compile_cache(SPEC, WORLD, directory) as cache:
        assert cache.root is not None
        return {path.name: path.read_text() for path in cache.root.glob("inductor/*")}


def test_a_run_leaves_what_it_compiled_and_later_runs_add_to_it(tmp_path: Path, node: Path):
    kept = tmp_path / "kept"
    first = use(kept, a="1")
    assert re.fullmatch(r"compile cache: .*\.compiled: not there yet; compiling, and .*", first.lines[0])
    assert re.fullmatch(r"compile cache: .*\.compiled: written, .*", first.lines[1])
    assert found(kept) == {"a": "1"}

    [file] = kept.iterdir()
    written = file.stat().st_mtime_ns, file.read_bytes()
    again = use(kept, a="1")
    assert [line.split(": ")[2].split(",")[0] for line in again.lines] == ["used"]
    assert file.read_bytes() == written[1]

    assert len(use(kept, b="2").lines) == 2
    assert found(kept) == {"a": "1", "b": "2"}
    assert list(node.iterdir()) == []


def test_what_another_job_has_added_meanwhile_is_kept(tmp_path: Path):
    use(tmp_path / "kept", a="1")
    with compile_cache(SPEC, WORLD, tmp_path / "kept") as cache:
        with pytest.MonkeyPatch.context() as another:
            another.delenv("TORCHINDUCTOR_CACHE_DIR")
            use(tmp_path / "kept", b="2")
        assert cache.root is not None
        (cache.root / "inductor/c").write_text("3")
        cache.save()
    assert found(tmp_path / "kept") == {"a": "1", "b": "2", "c": "3"}


def test_a_few_small_kernels_do_not_keep_a_run_waiting(tmp_path: Path):
    """They are added at its end. Whatever takes seconds to compile is kept at once, against a run that is killed."""

    def run(*names: str) -> tuple[str | None, int]:
        with compile_cache(SPEC, WORLD, tmp_path) as cache:
            assert cache.root is not None
            for name in names:
                (cache.root / name).parent.mkdir(parents=True, exist_ok=True)
                (cache.root / name).write_text("code")
            line, before = cache.save(small_additions=False), len(cache.lines)
        return line, len(cache.lines) - before

    kernels = [f"triton/{number}/kernel.cubin" for number in range(30)]
    first, later = run(kernels[0])
    assert first is not None and not later  # there was no file
    assert run(kernels[1], "triton/1/kernel.json") == (None, 1)
    assert run(kernels[0], kernels[1], "triton/1/kernel.json") == (None, 0)
    for names in (
        kernels[2:20],
        ["inductor/aotautograd/key/entry"],
        ["inductor/fxgraph/ab/key/entry"],
        ["inductor/ab/kernel.so"],
        ["cute/kernel.o"],
        ["tuning/kernel.json"],
    ):
        line, later = run(*names)
        assert line is not None and "written" in line and not later, names


def test_a_fresh_file_has_nothing_of_the_old_one(tmp_path: Path):
    use(tmp_path, a="1")
    with compile_cache(SPEC, WORLD, tmp_path, fresh=True) as cache:
        assert cache.root is not None and not list(cache.root.glob("inductor/*"))
        (cache.root / "inductor").mkdir()
        (cache.root / "inductor/b").write_text("2")
    assert found(tmp_path) == {"b": "2"}


def test_helpers_start_before_the_compiler_is_imported_if_there_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And they end before their directory goes; with a file that cannot be used, as soon as that is known."""
    told: list[str] = []

    @contextmanager
    def helpers(root: Path) -> Iterator[str]:
        told.append("start")
        yield "helpers"
        told.append(f"end, {root.exists()}")

    @contextmanager
    def compiler(*_: Any) -> Iterator[None]:
        told.append("import")
        yield

    def opened(directory: Path, world: World = WORLD) -> tuple[Any, list[str]]:
        told.clear()
        with compile_cache(SPEC, world, directory, when_cold=helpers) as cache:
            pass
        return cache.helpers, told

    monkeypatch.setattr(module, "_tuning_in", compiler)
    assert opened(tmp_path) == ("helpers", ["start", "import", "end, True"])
    use(tmp_path, a="1")
    assert opened(tmp_path) == ((), ["import"])
    [file] = tmp_path.glob(f"*{SUFFIX}")
    file.write_bytes(b"")
    assert opened(tmp_path) == ("helpers", ["import", "start", "end, True"])
    assert opened(tmp_path / "none", SecondRank(1, 2, 1, torch.device("cpu"), Communicator())) == ((), ["import"])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def foreign(path: Path) -> None:
    if path.stat().st_uid != 0 or os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(path, 1234, 1234)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), "damaged"),
        (flip, "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.chmod(0o666), "others may write it"),
        (foreign, "belongs to user 1234"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_one_line_and_replaced(
    tmp_path: Path, damage: Callable[[Path], object], reason: str
):
    use(tmp_path, a="1")
    [file] = tmp_path.glob(f"*{SUFFIX}")
    damage(file)
    cache = use(tmp_path, b="2")
    assert len(cache.lines) == 2
    assert reason in cache.lines[0] and cache.lines[0].endswith("; compiling")
    assert found(tmp_path) == {"b": "2"}


def test_a_file_of_another_key_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use(tmp_path, a="1")
    [file] = tmp_path.glob(f"*{SUFFIX}")
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1")
    with compile_cache(SPEC, WORLD, tmp_path) as cache:
        assert cache.loaded is None
        assert "not there yet (the newest one differs in environment TORCHINDUCTOR_MAX_AUTOTUNE)" in cache.lines[0]
        shutil.copy(file, cache.path)  # under the name of the wanted one
    with compile_cache(SPEC, WORLD, tmp_path) as cache:
        assert cache.loaded is None
        assert "made for other code: differs in environment TORCHINDUCTOR_MAX_AUTOTUNE" in cache.lines[0]
        assert cache.root is not None and not list(cache.root.glob("inductor"))


def test_the_image_is_looked_at_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "IMAGE_DIRECTORY", tmp_path / "image")
    use(tmp_path / "image", a="image")
    assert found(tmp_path / "own") == {"a": "image"}
    use(tmp_path / "own", b="own")
    assert found(tmp_path / "own") == {"a": "image", "b": "own"}
    [file] = (tmp_path / "own").iterdir()
    flip(file)
    assert found(tmp_path / "own") == {"a": "image"}
    assert found(tmp_path / "image") == {"a": "image"}


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    cache = use(tmp_path / "file" / "kept", a="1")
    assert "cannot be written: Not a directory; the next run compiles again" in cache.lines[-1]


def test_where_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert cache_directory() == Path("runs/cache")
    assert cache_directory(tmp_path) == tmp_path / "cache"
    monkeypatch.setenv("NANOGPT_RUNS", "elsewhere")
    assert cache_directory() == Path("elsewhere/cache")
    monkeypatch.setenv("NANOGPT_CACHE", "/shared")
    assert cache_directory(tmp_path) == Path("/shared")
    monkeypatch.setenv("NANOGPT_CACHE", "off")
    assert cache_directory(tmp_path) is None
    assert use(None, a="1").lines == []


def test_a_users_own_directory_is_left_to_him(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    with compile_cache(SPEC, WORLD, tmp_path) as cache:
        assert cache.root is None and os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")
        assert cache.save() is None
    [line] = cache.lines
    assert line.startswith(
        f"compile cache: TORCHINDUCTOR_CACHE_DIR is set: compiled code is kept in {tmp_path / 'mine'},"
    )


@pytest.mark.parametrize("why", ["off", "chosen", "no room elsewhere"])
def test_without_a_file_no_compiler_takes_its_own_place(
    tmp_path: Path, node: Path, why: str, monkeypatch: pytest.MonkeyPatch
):
    """It lies in a shared /tmp under a name that another user may have made before."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    world: World = WORLD
    if why == "chosen":
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    if why == "no room elsewhere":
        world = SomeRanks(0, 2, 0, torch.device("cpu"), Communicator())
        object.__setattr__(world, "other", (True, None))
    before = dict(os.environ)
    with compile_cache(SPEC, world, None if why == "off" else tmp_path / "kept") as cache:
        assert cache.root is None
        places = [cache_dir()] if why != "chosen" else []
        places += [os.environ[name] for name in ("CUTE_DSL_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")]
        for place in map(Path, places):
            assert place.parent.parent == node and place != Path(default_cache_dir())
            assert place.parent.stat().st_mode & 0o777 == 0o700
        if why == "chosen":
            assert cache_dir() == str(tmp_path / "mine")
    assert dict(os.environ) == before
    assert list(node.iterdir()) == []


def test_where_there_is_no_room_a_compiler_gets_no_shared_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with compile_cache(SPEC, WORLD, tmp_path / "kept") as cache:
        assert cache.root is None and not Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).exists()
        assert re.search(r"/nanogpt-compiled-\d+-[0-9a-f]{32}/inductor$", os.environ["TORCHINDUCTOR_CACHE_DIR"])


def test_a_failed_run_leaves_no_file_and_restores_the_environment(tmp_path: Path, node: Path):
    before = dict(os.environ)
    with pytest.raises(RuntimeError), compile_cache(SPEC, WORLD, tmp_path / "kept") as cache:
        assert cache.root is not None
        assert cache.root.stat().st_mode & 0o777 == 0o700
        (cache.root / "half").write_text("compiled")
        raise RuntimeError
    assert dict(os.environ) == before
    assert not (tmp_path / "kept").exists() and list(node.iterdir()) == []


def test_directories_of_killed_jobs_are_removed_and_those_of_living_ones_are_not(tmp_path: Path, node: Path):
    killed, living, new = (node / f"nanogpt-compiled-{os.geteuid()}-{name}" for name in ("killed", "living", "new"))
    for place in (killed, living):
        place.mkdir()
        (place / ".lock").touch()
    new.mkdir()  # its job has not come to its lock yet
    with (living / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        use(tmp_path / "kept", a="1")
    assert {path.name.rpartition("-")[2] for path in node.iterdir()} == {"living", "new"}


def test_the_key_does_not_name_this_job(tmp_path: Path):
    with compile_cache(SPEC, WORLD, tmp_path):
        inside = cache_key(SPEC, torch.device("cpu"))
    assert inside == cache_key(SPEC, torch.device("cpu"))


class SomeRanks(World):
    """Rank 0 of two nodes of one rank, the other of which says `other`."""

    other: tuple[bool, Path | None] = (True, None)
    other_found = False

    def gather(self, value, kind=None):  # type: ignore[no-untyped-def]
        return [value, self.other if isinstance(value, tuple) else self.other_found]


@pytest.mark.parametrize(("roots", "found"), [(True, True), (True, False), (False, False)])
def test_nodes_do_alike(tmp_path: Path, roots: bool, found: bool):
    """Or one would wait for what another does not do."""
    use(tmp_path / "kept", a="1")
    world = SomeRanks(0, 2, 0, torch.device("cpu"), Communicator())
    object.__setattr__(world, "other", (True, tmp_path if roots else None))
    object.__setattr__(world, "other_found", found)
    with compile_cache(SPEC, world, tmp_path / "kept") as cache:
        assert (cache.loaded is not None) == roots  # here
        assert (cache.root is not None) == roots
        assert cache.found == found
    if not roots:
        assert cache.lines[-1] == "compile cache: a node has no room for compiled code; no file is used"


# --- with a compiler ------------------------------------------------------------------------------------------------


COMPILED = tiny_spec("model.layers=1", "runtime.compile=on", "training.warmup=true", "evaluation.every=9", model="gpt2")


def run_in(place: Path, data: Path) -> tuple[Record, tuple[dict[int, float], dict[int, float]]]:
    """A run in a process and a node-local directory of its own; only the kept file beside `data` is common."""
    place.mkdir()
    arguments = ("train", write_recipe(place / "recipe.yaml", COMPILED), "--data", data, "--out", place / "runs")
    places = {"TMPDIR": str(place), "NANOGPT_CACHE": str(data.parent / "kept")}
    done = python("-m", "nanogpt", *map(str, arguments), timeout=800, **places)
    assert done.returncode == 0, done.stderr
    assert list(place.glob("nanogpt-compiled-*")) == []
    [path] = (place / "runs").glob("tiny-gpt2-*")
    return read_record(path), losses(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("compiled") / "data")


@pytest.fixture(scope="module")
def cold(data: Path) -> tuple[Record, tuple[dict[int, float], dict[int, float]]]:
    """The first run, which finds nothing."""
    return run_in(data.parent / "cold", data)


def total(record: Record, count: str) -> int:
    return sum(getattr(phase, count) for phase in record.starts[-1].start_up)


@pytest.mark.slow
def test_a_second_process_compiles_nothing_and_computes_the_same(data: Path, cold: Any):
    first, first_losses = cold
    second, second_losses = run_in(data.parent / "warm", data)
    assert "written" in first.compilation.cache[-1]
    assert [line.split(": ")[2].split(",")[0] for line in second.compilation.cache] == ["used"]
    assert (total(first, "graphs"), total(first, "from_cache"), total(first, "parts_compiled")) == (2, 0, 3)
    assert (total(second, "graphs"), total(second, "from_cache"), total(second, "parts_compiled")) == (2, 2, 0)
    assert total(first, "bypassed") == total(second, "bypassed") == 0
    assert first.compilation.late_graphs == second.compilation.late_graphs == 0
    assert second_losses == first_losses
    assert len(second_losses[0]) == 9


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_helper_compiles_for_the_run(tmp_path: Path, data: Path, cold: Any, monkeypatch: pytest.MonkeyPatch):
    """The run compiles evaluation alone, and then loads the training graph; the losses are those of a run alone."""
    monkeypatch.setattr("nanogpt.training.parallel_compile.helpers_that_fit", lambda *_, **__: (1, 1))
    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path / "kept"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the helper's
    torch._dynamo.reset()
    train(COMPILED, data, tmp_path / "run")
    phases = {phase.name: phase for phase in read_record(tmp_path / "run").starts[-1].start_up}
    together = phases["compiling, by several processes"]
    assert (together.parts_compiled, together.from_cache) == (1, 1)  # evaluation's; training's, which the helper left
    rest = phases["warm-up, stage 1"]
    assert (rest.parts_compiled, rest.from_cache) == (0, 0)
    assert losses(tmp_path / "run") == cold[1]
    log = (tmp_path / "run/log.txt").read_text()
    for process, graph in (
        ("the run", "evaluation"),
        ("the run", "the optimizer's"),
        ("the run", "training, [0-9]+ tokens, loading"),
        ("helper 1", "start"),
        ("helper 1", "training"),
    ):
        assert re.search(rf"^\| {process} +\| {graph}", log, re.MULTILINE), log
