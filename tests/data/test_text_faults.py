"""Own text to shards when something goes wrong: killed processes, full disks, other sets, changing files; memory."""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from text_samples import contents, jsonl, read_set, some_texts, write_jsonl

from nanogpt.data import documents, encode, text_shards
from nanogpt.data.text import embedded_corpus, prepare_text
from nanogpt.errors import InputError, RunError


@contextmanager
def running(code: str, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A Python process of its own, ended at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [one for child in map(int, children) for one in [child, *descendants(child)]]


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


PREPARE = """
import sys
from nanogpt.data.text import prepare_text
prepare_text(sys.argv[1:2], sys.argv[2], val_tokens=1000, shard_tokens=100_000, workers=2)
"""


@pytest.fixture(scope="module")
def many_lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20 MB of JSON lines."""
    with gzip.open(embedded_corpus(), "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    path = tmp_path_factory.mktemp("many") / "many.jsonl"
    return write_jsonl(path, [f"{copy} {text}" for copy in range(3) for text in texts])


def test_a_killed_run_leaves_no_shard_and_no_worker(many_lines: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(PREPARE, many_lines, out) as process:
        spool = out / text_shards.STAGING / "spool_000000"
        wait_for(lambda: spool.exists() and spool.stat().st_size > 100_000)
        workers = descendants(process.pid)
        assert len(workers) == 3
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_for(lambda: not any(alive(pid) for pid in workers), 20)
    assert [path.name for path in out.iterdir()] == [text_shards.STAGING]
    prepare_text([many_lines], out, val_tokens=1000, shard_tokens=1_000_000, workers=1, quiet=True)
    assert not (out / text_shards.STAGING).exists()
    assert sum(len(shard) for shard in read_set(out)[1]) + len(read_set(out)[0]) == 3 * 3415


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


KILLED_WHILE_PUBLISHING = """
import os, signal, sys
from itertools import pairwise
from pathlib import Path
from nanogpt.data import text_shards
from nanogpt.data.text import prepare_text
replace, count = Path.replace, 0
def die_at_the_nth(self, target):
    global count
    count += 1
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = die_at_the_nth
prepare_text(sys.argv[1:2], sys.argv[2], val_tokens=300, shard_tokens=1000, workers=1, force=True)
"""


def test_a_run_killed_while_its_shards_take_their_names_can_be_repeated(tmp_path: Path) -> None:
    old = write_jsonl(tmp_path / "old.jsonl", some_texts(300, seed=5))
    new = write_jsonl(tmp_path / "new.jsonl", some_texts(100))
    prepare_text([new], tmp_path / "whole", val_tokens=300, shard_tokens=1000, quiet=True)
    whole = contents(tmp_path / "whole")
    count = 1 + len(whole)
    for nth in (1, 2, 3, -2, -1):
        out = tmp_path / f"out{nth}"
        prepare_text([old], out, val_tokens=300, shard_tokens=1000, quiet=True)
        before = contents(out)
        # The new manifest in its folder, the old set out of the way, the new one; -1 is the very last.
        steps = nth if nth > 0 else count + len(before) + 1 + nth
        with running(KILLED_WHILE_PUBLISHING, new, out, str(steps)) as process:
            assert process.wait() == -signal.SIGKILL
        left = contents_of_files(out)
        if nth in (1, 2):  # nothing is touched before the new set is whole, and the old one is still a set
            assert contents_of_files(out) == list(before)
            with pytest.raises(InputError, match="--force"):
                prepare_text([new], out, val_tokens=300, shard_tokens=1000, quiet=True)
        else:
            assert "text.json" not in contents_of_files(out)
            # None to train with, until it is all there.
            assert (text_shards.val_name() in left) == (nth in (3, -1))
            prepare_text([new], out, val_tokens=300, shard_tokens=1000, quiet=True)
            assert contents(out) == whole


def contents_of_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_sets_are_not_mixed(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", some_texts(300, seed=5))
    second = write_jsonl(tmp_path / "second.jsonl", some_texts(40))
    out = tmp_path / "out"
    prepare_text([first], out, shard_tokens=1000, quiet=True)
    before = contents(out)
    (out / "notes.bin").write_text("mine")
    with pytest.raises(InputError, match=r"already holds \d+ file\(s\) of a data set \(text.json.*--force"):
        prepare_text([second], out, shard_tokens=1000, quiet=True)
    with pytest.raises(InputError, match="--val-tokens 999999"):  # a run that fails leaves the old set alone
        prepare_text([second], out, val_tokens=999_999, force=True, quiet=True)
    assert {name: data for name, data in contents(out).items() if name != "notes.bin"} == before
    prepare_text([second], out, shard_tokens=1000, force=True, quiet=True)
    prepare_text([second], tmp_path / "alone", shard_tokens=1000, quiet=True)
    assert contents(out) == contents(tmp_path / "alone") | {"notes.bin": b"mine"}
    (tmp_path / "alone" / "text.json").unlink()  # shards from elsewhere, such as FineWeb's, are a set too
    with pytest.raises(InputError, match=r"fineweb_val_000000\.bin, \.\.\."):
        prepare_text([second], tmp_path / "alone", quiet=True)


PREP = "from nanogpt.cli.prep_text import text_main; text_main()"
STOPS = """
import os, signal
from nanogpt.data import text_shards
write, count = text_shards.Spool.write, 0
def write_and_stop(self, tokens):
    global count
    write(self, tokens)
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
text_shards.Spool.write = write_and_stop
"""


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", [PREP, "from nanogpt.cli.main import main; main()"])
def test_a_signal_leaves_nothing_and_no_worker(
    many_lines: Path, tmp_path: Path, number: signal.Signals, command: str
) -> None:
    out = tmp_path / "out"
    name = [] if command == PREP else ["prep-text"]
    with running(STOPS + command, *name, many_lines, "--dir", out, "--workers", "2") as process:
        wait_for(lambda: state(process.pid) == "T")
        workers = descendants(process.pid)
        assert len(workers) == 3
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        _, stderr = process.communicate()
    assert process.returncode == 128 + number
    assert stderr.splitlines()[-1].endswith(f"stopped by {number.name}: nothing is written; run the same command again")
    assert "Traceback" not in stderr
    assert list(out.iterdir()) == []
    wait_for(lambda: not any(alive(pid) for pid in workers), 20)


def test_a_second_run_into_the_same_directory_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    write_jsonl(one, ["word " * 200_000, *some_texts(9), "more " * 200_000, *some_texts(9)] * 2)
    write_jsonl(other, some_texts(40))
    with running(STOPS + PREP, one, "--dir", out, "--workers", "1") as first:
        wait_for(lambda: state(first.pid) == "T")
        with running(PREP, other, "--dir", out, "--force") as second:
            _, stderr = second.communicate()
        assert second.returncode == 1
        assert f"{out}: another prep-text is writing to it" in stderr
        first.send_signal(signal.SIGCONT)
        _, stderr = first.communicate()
        assert first.returncode == 0, stderr
    assert sum(len(shard) for shard in [read_set(out)[0], *read_set(out)[1]]) == 40


def test_without_locks_a_folder_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(text_shards.fcntl, "flock", no_locks)
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(40))
    out = tmp_path / "out"
    with text_shards.writing_to(out, force=False) as staging:
        (staging / "spool_000000").write_text("in use")
        with pytest.raises(RunError, match=r"partial exists: another prep-text.* or was killed.*remove that folder"):
            prepare_text([source], out, force=True, quiet=True)
        assert (staging / "spool_000000").read_text() == "in use"
    prepare_text([source], out, quiet=True)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_an_error_while_shards_take_their_names_leaves_the_old_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    old = write_jsonl(tmp_path / "old.jsonl", some_texts(60, seed=5))
    new = write_jsonl(tmp_path / "new.jsonl", some_texts(60))
    out = tmp_path / "out"
    prepare_text([old], out, val_tokens=300, shard_tokens=500, quiet=True)
    before = contents(out)
    replace = Path.replace
    count = 0

    def fail_at(nth: int) -> Any:
        def replace_or_fail(self: Path, target: Path) -> Path:
            nonlocal count
            count += 1
            if count == nth:
                raise error
            return replace(self, target)

        return replace_or_fail

    for nth in (1, 2, 3, len(before) + 1, len(before) + 2, len(before) + 4):
        count = 0
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", fail_at(nth))
            with pytest.raises((RunError, KeyboardInterrupt)):
                prepare_text([new], out, val_tokens=300, shard_tokens=500, force=True, quiet=True)
        assert count >= nth
        assert contents(out) == before


FULL = """
mount -t tmpfs -o size=$1k tmpfs "$2" || exit 99
"$3" -c "$4" "$5" --dir "$2/out" --workers 1
code=$?
ls -A "$2/out"
exit $code
"""


def test_a_full_disk_at_any_moment_leaves_nothing(tmp_path: Path, many_lines: Path) -> None:
    """A real file system of so many KiB: too small for the spool, for the shards beside it, and just large enough."""
    source = tmp_path / "some.jsonl"
    source.write_bytes(b"".join(many_lines.read_bytes().splitlines(keepends=True)[:1000]))
    (tmp_path / "disk").mkdir()
    prepare_text([source], tmp_path / "whole", quiet=True)
    need = sum(map(len, contents(tmp_path / "whole").values())) // 1024
    for size in (need // 3, need + 200, 2 * need + 200):
        arguments = [size, tmp_path / "disk", sys.executable, PREP, source]
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", FULL, "sh", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode not in (0, 1) or "unshare:" in done.stderr:
            pytest.skip(f"no file system can be mounted here: {done.stderr}")
        if size < 2 * need:
            assert done.returncode == 1, size
            assert "writing failed: [Errno 28] No space left on device" in done.stderr
            assert done.stderr.endswith("free some room or choose another --dir\n")
            assert done.stdout == ""
        else:
            assert done.returncode == 0, done.stderr


def test_two_runs_at_once_do_not_share_a_directory(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(40))
    with text_shards.writing_to(tmp_path / "out", force=False), pytest.raises(RunError, match="another prep-text"):
        prepare_text([source], tmp_path / "out", quiet=True)
    prepare_text([source], tmp_path / "out", quiet=True)


def test_a_disk_that_takes_no_more_is_an_error_and_leaves_nothing(tmp_path: Path, many_lines: Path) -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
    code += "import sys; from nanogpt.cli.prep_text import text_main; text_main()"
    with running(code, many_lines, "--dir", tmp_path / "out", "--workers", "2") as process:
        _, stderr = process.communicate()
    assert process.returncode == 1
    assert stderr.splitlines()[-1].startswith(f"prep-text: {tmp_path}/out: writing failed")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_killed_worker_ends_the_run(tmp_path: Path, many_lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = text_shards.Spool.write

    def kill_one(spool: text_shards.Spool, tokens: Any) -> None:
        write(spool, tokens)
        workers = descendants(os.getpid())
        if len(workers) == 3:
            os.kill(workers[-1], signal.SIGKILL)

    monkeypatch.setattr(text_shards.Spool, "write", kill_one)
    with pytest.raises(RunError, match="a tokenizing worker was killed"):
        prepare_text([many_lines], tmp_path / "out", workers=2, quiet=True)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.2, 0.3])
def test_an_error_ends_the_workers_even_while_they_start(seconds: float) -> None:
    with pytest.raises(ZeroDivisionError), encode.Encoder(16):
        time.sleep(seconds)
        workers = descendants(os.getpid())
        raise ZeroDivisionError
    assert workers
    wait_for(lambda: not any(alive(pid) for pid in workers))


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LARGE_FILE", 500)
    source = tmp_path / "large.txt"
    source.write_text("\n".join(some_texts(60)))
    units = list(documents.plan(documents.find_files([source], documents.Skips()), "text", documents.Skips()))
    source.write_text("short")
    with encode.Encoder(2) as encoder, pytest.raises(RunError, match=r"large.txt: changed while it was read"):
        list(encoder.encode(units))


MEASURE = """
import json, re, resource, sys
from itertools import pairwise
from pathlib import Path
from nanogpt.data.text import prepare_text
summary = prepare_text(sys.argv[1:2], sys.argv[2], val_tokens=1, workers=2, quiet=True)
# Not the parent's ru_maxrss, which starts with the peak of the process that started it.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
peaks = [peak / 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024]
print(json.dumps([summary.text_bytes, *peaks]))
"""


@pytest.mark.parametrize("kind", ["jsonl.gz", "txt", "jsonl"])
def test_memory_is_bounded(tmp_path: Path, kind: str) -> None:
    """60 MB in 4 kB records, 40 MB as one text: 120 MiB a process. 40 MB in records of 8 MB: 250 MiB."""
    with gzip.open(embedded_corpus(), "rt", encoding="utf-8") as lines:
        prose = "\n".join(json.loads(line)["text"] for line in lines)
    source = tmp_path / f"in.{kind}"
    if kind == "txt":
        source.write_text(prose * 6, encoding="utf-8")
        write_jsonl(tmp_path / "more.jsonl", ["two", "three"])
        source = tmp_path
    elif kind == "jsonl":
        write_jsonl(source, [f"{i}" + prose + prose[:1_400_000] for i in range(5)])
    else:
        pieces = [prose[i : i + 4000] for i in range(0, len(prose), 4000)]
        source.write_bytes(gzip.compress(jsonl([f"{copy} {piece}" for copy in range(9) for piece in pieces]), 1))
    with running(MEASURE, source, tmp_path / "out") as process:
        stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    text_bytes, parent, worker = json.loads(stdout)
    bound = 250 if kind == "jsonl" else 120
    print(f"{kind}: parent {parent:.0f} MiB, worker {worker:.0f} MiB")
    assert text_bytes > 38e6
    assert parent < bound, f"the parent took {parent:.0f} MiB"
    assert worker < bound, f"a worker took {worker:.0f} MiB"
