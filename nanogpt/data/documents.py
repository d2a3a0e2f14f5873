"""Where your own text comes from: files and folders in, documents out, in the same order on every machine.

- A text file (`TEXT_SUFFIXES`) is one document. A folder is walked depth first, names in the order
  of their characters.
- JSON (`JSON_SUFFIXES`, plain or compressed) and Parquet hold one document per record, in one field. `.jsonl` and
  `.ndjson` are lines; `.json` may also be one array of objects, or objects one after another.
- The work is cut into units of about half a megabyte that any process can turn into documents on its own:
  `plan` makes them, `read_unit` reads one. Neither ever holds more than `MAX_RECORD` of text, whatever is in a file.
- A text file above `LARGE_FILE` is checked once from start to end, then read in segments. They are cut where
  GPT-2's pattern starts a new piece whatever comes before, so the tokens are those of the whole file.
- What cannot be used is left out, with a reason, and counted (`Skips`), separately if the user named the file.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib.util import find_spec
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from nanogpt.data.skips import Skip, Skips, as_text, listed
from nanogpt.data.sources import SplitBy
from nanogpt.data.streams import (
    COMPRESSED_SUFFIXES,
    DamagedFileError,
    line_blocks,
    peek,
    read_blocks,
    record_blocks,
    wide_encoding,
)
from nanogpt.data.tokenizer import TEXT_PIECE_START, UTF8_PIECE_START
from nanogpt.errors import InputError, RunError

if TYPE_CHECKING:
    import pyarrow

_PROSE = ".txt .text .md .markdown .rst .adoc .org .tex"
_SOURCE = """
    .py .pyi .pyx .c .h .cc .cpp .cxx .hh .hpp .hxx .cu .cuh .m .mm .rs .go .java .kt .scala .groovy .cs .fs .vb .swift
    .dart .zig .nim .d .js .mjs .cjs .jsx .ts .tsx .vue .php .rb .pl .pm .lua .tcl .r .jl .hs .ml .mli .elm .clj .cljs
    .ex .exs .erl .hrl .el .lisp .scm .rkt .f .f90 .f95 .f03 .for .pas .adb .ads .asm .s .v .sv .vhd .sql .sh .bash
    .zsh .fish .ps1 .bat .awk .sed .cmake .mk .toml .yaml .yml .ini .proto .css .scss
"""
PROSE_SUFFIXES = tuple(_PROSE.split())
SOURCE_SUFFIXES = tuple(_SOURCE.split())
TEXT_SUFFIXES = frozenset(PROSE_SUFFIXES + SOURCE_SUFFIXES)
LINES_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIXES = (*LINES_SUFFIXES, ".json")
PARQUET_SUFFIXES = (".parquet",)
UNREAD_FOLDERS = frozenset({"__pycache__", "CVS", "_darcs"})  # and every hidden one: .git, .hg, .svn, .venv

READ_BYTES = 1024 * 1024  # of a large file at a time
UNIT_BYTES = 512 * 1024
LARGE_FILE = 4 * 1024 * 1024
MAX_RECORD = 32 * 1024 * 1024
MAX_SEGMENT = 8 * 1024 * 1024
MAX_UNBROKEN = 4 * 1024 * 1024  # characters without a place to cut: the tokenizer takes 55 bytes of memory for each
COMPLEX_RECORD = 1024 * 1024  # bytes: a larger record's values are counted before it is parsed
MAX_VALUES = 1024 * 1024  # in a record: each takes up to 100 bytes
CHANGED = "changed while it was read; leave the input alone and run again"
UTF8_BOM = b"\xef\xbb\xbf"

JSON_SPACE = "\ufeff \t\r\n"  # and the mark that joined files may have in the middle
JSON_VALUES = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[,\[{]', re.DOTALL)
DECODER = json.JSONDecoder()

Kind = Literal["text", "lines", "json", "parquet"]
Kinds = dict[str, Kind]  # suffix -> how to read such a file


class SourceFile(NamedTuple):
    """A file that holds documents.

    `input`: the index of the PATH that it was found under. `explicit`: the user named it, rather than a folder.
    `source`: what it belongs to, if the split goes by files.
    """

    path: str
    size: int
    kind: Kind
    input: int
    explicit: bool
    source: str = ""


class Document(NamedTuple):
    """A document's text, whole or in part, its length in UTF-8, its key, and, on request, what it belongs to."""

    text: str
    bytes: int
    key: int
    source: str = ""


@dataclass(slots=True)
class Unit:
    """Work for one process. `done` is how many bytes of the input files the unit stands for."""

    input: int
    done: int


@dataclass(slots=True)
class FilesUnit(Unit):
    """Text files, each a document."""

    paths: list[str]
    sources: list[str]


@dataclass(slots=True)
class SegmentUnit(Unit):
    """Bytes `start` to `end` of a large text file; all but its `first` segment continue with the document."""

    path: str
    start: int
    end: int
    key: int
    first: bool
    source: str


@dataclass(slots=True)
class LinesUnit(Unit):
    """Whole lines of JSON, or one record per line; `line` is the number of the first one.

    A record's source is the file's, or what its field `source_field` says.
    """

    path: str
    line: int
    data: bytes
    field: str
    source: str
    source_field: str


@dataclass(slots=True)
class ValuesUnit(Unit):
    """A column's values; `row` is the number of the first one. A source is None if its row names none."""

    path: str
    row: int
    values: list[bytes | None]
    field: str
    sources: list[str | None]


def held_bytes(unit: Unit) -> int:
    """How much text a unit holds itself, rather than the names of files."""
    if isinstance(unit, LinesUnit):
        return len(unit.data)
    return sum(len(value or b"") for value in unit.values) if isinstance(unit, ValuesUnit) else 0


def text_key(text: bytes) -> int:
    """64 bits of BLAKE2b of a document's UTF-8 text: they decide the split, unless it goes by sources."""
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def suffix_of(name: str) -> str:
    """The suffix that says how a file is read, in lower case: `.txt`, `.jsonl.gz`, or "" if there is none."""
    lower = name.lower()
    dot = lower.rfind(".")
    if lower.endswith(COMPRESSED_SUFFIXES):
        dot = max(0, lower.rfind(".", 0, dot))
    return lower[dot:] if dot > 0 else ""


def find_files(
    paths: Sequence[str | Path],
    skips: Skips,
    *,
    suffixes: Iterable[str] = (),
    exclude: Path | None = None,
    split_by: SplitBy = SplitBy(),  # noqa: B008 (it is frozen)
) -> list[SourceFile]:
    """Every file with documents under `paths`, in the order of the documents.

    A folder's links to files are followed and its links to folders are not; a file met twice counts once.

    Args:
        skips: counts what is left out.
        suffixes: further suffixes of text files.
        exclude: a folder that is not entered: the one being written to.
        split_by: says which source a file belongs to.

    Raises:
        InputError: a path is missing, or its suffix is not known; a reader is not installed; a file
            has no fields to split by.
    """
    kinds: Kinds = dict.fromkeys(TEXT_SUFFIXES, "text")
    for suffix in JSON_SUFFIXES:
        kind: Kind = "lines" if suffix in LINES_SUFFIXES else "json"
        kinds.update(dict.fromkeys([suffix, *(suffix + packed for packed in COMPRESSED_SUFFIXES)], kind))
    kinds.update(dict.fromkeys(PARQUET_SUFFIXES, "parquet"))
    kinds.update(dict.fromkeys([suffix.lower() for suffix in suffixes], "text"))  # last, so that the user's wins
    for suffix in suffixes:
        if not re.fullmatch(r"\.[^./\s]+", suffix):
            raise InputError(f"--suffix {suffix!r}: expected a dot and a name, such as .log")
    excluded = os.path.realpath(exclude) if exclude else ""
    seen: set[str] = set()
    names: dict[str, str] = {}  # so that equal ones are stored once
    files = []
    for index, given in enumerate(paths):
        path = os.fspath(given)
        real = os.path.realpath(path)
        if not os.path.exists(path):  # noqa: PTH110 (a path that is not UTF-8 stays a str)
            raise InputError(f"{as_text(path)}: no such file or folder")
        explicit = not os.path.isdir(real)  # noqa: PTH112
        if not explicit:
            found = _walk(path, real, excluded, kinds, skips)
        else:
            found = iter([_explicit(path, real, kinds)])
        for name, real_name, size, kind in found:
            if real_name in seen:
                skips.add("given twice", name)
            elif size == 0 and kind != "parquet" and not name.lower().endswith(COMPRESSED_SUFFIXES):
                skips.add("empty", name)
            else:
                if kind == "text" and split_by.kind == "field":
                    raise InputError(
                        f"{as_text(name)}: --split-by field:{split_by.field} needs records, but this is a text file;"
                        " give JSON or Parquet, or --split-by source"
                    )
                source = split_by.of_file(name, path)
                files.append(SourceFile(name, size, kind, index, explicit, names.setdefault(source, source)))
            seen.add(real_name)
    return _readable(files, skips)


def _explicit(path: str, real: str, kinds: Kinds) -> tuple[str, str, int, Kind]:
    """A file named by the user, so that leaving it out silently would be wrong."""
    if not os.path.isfile(real):  # noqa: PTH113
        raise InputError(f"{as_text(path)}: neither a file nor a folder")
    kind = kinds.get(suffix_of(path))
    if kind is None:
        suffix = os.path.splitext(path)[1]  # noqa: PTH122
        way_out = f"if it is plain text, add --suffix {suffix}" if suffix else "rename it if it is plain text"
        if suffix.lower() in COMPRESSED_SUFFIXES:
            suffix = suffix_of(path) or suffix
            way_out = "only JSON is read from compressed files: unpack it first"
        raise InputError(
            f"{as_text(path)}: the suffix {suffix!r} is not known; known are {' '.join(JSON_SUFFIXES)}, also with"
            f" {' '.join(COMPRESSED_SUFFIXES)}, {' '.join(PARQUET_SUFFIXES)}, and for text {' '.join(PROSE_SUFFIXES)}"
            f" and those of source code; {way_out}"
        )
    return path, real, os.stat(real).st_size, kind  # noqa: PTH116


def _walk(top: str, real_top: str, excluded: str, kinds: Kinds, skips: Skips) -> Iterator[tuple[str, str, int, Kind]]:
    """Files below a folder, depth first, names in the order of their characters: (path, real path, size, kind).

    Paths are joined by hand, for speed: a walk may meet a million files before any of them is read.
    """
    stack: list[tuple[str, str, Kind | None]] = [(top.rstrip("/") or "/", real_top.rstrip("/"), None)]  # None: a folder
    while stack:
        path, real, kind = stack.pop()
        if kind is not None:
            try:
                yield path, real, os.stat(path).st_size, kind  # noqa: PTH116
            except OSError:
                skips.add("cannot be read", path)
            continue
        if real == excluded:
            continue
        try:
            with os.scandir(path) as scan:
                entries = sorted(scan, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            skips.add("cannot be read", path, note=error.strerror or "", named=path == (top.rstrip("/") or "/"))
            continue
        below: list[tuple[str, str]] = []
        for entry in entries:
            name = entry.name
            link = entry.is_symlink()
            if name.startswith("."):
                below.append(("hidden", entry.path))
            elif entry.is_dir(follow_symlinks=False):
                if name in UNREAD_FOLDERS:
                    below.append(("cache or version control", entry.path))
                else:
                    stack.append((entry.path, f"{real}/{name}", None))
            elif not entry.is_file():
                below.append(("link to a folder or to nothing" if link else "special file", entry.path))
            elif kind := kinds.get(suffix_of(name)):
                stack.append((entry.path, os.path.realpath(entry.path) if link else f"{real}/{name}", kind))
            else:
                below.append(("suffix not known", entry.path))
        for skip in reversed(below):
            skips.add(*skip)


def _readable(files: Iterable[SourceFile], skips: Skips) -> list[SourceFile]:
    """The files that the installed packages can read: others are refused if named by the user, else left out."""
    readable = []
    for file in files:
        package = "pyarrow" if file.kind == "parquet" else "zstandard" if file.path.lower().endswith(".zst") else None
        if package is None or find_spec(package) is not None:
            readable.append(file)
        elif file.explicit:
            raise InputError(
                f"{as_text(file.path)}: reading it needs the package {package}, which is not installed;"
                " run: pip install 'nanogpt-speedrun[text]'"
            )
        else:
            skips.add(f"{package} is not installed", file.path)
    return readable


def plan(files: Iterable[SourceFile], field: str, skips: Skips, source_field: str = "") -> Iterator[Unit]:
    """Cut the files into units, in order, reading ahead no more than one unit.

    Raises:
        InputError: a Parquet file that the user named has no column `field`, or `source_field`, of text.
    """
    small: deque[SourceFile] = deque()
    held = 0

    def flush() -> Iterator[Unit]:
        nonlocal held
        if small:
            yield FilesUnit(small[0].input, held, [f.path for f in small], [f.source for f in small])
        small.clear()
        held = 0

    for file in files:
        if small and small[0].input != file.input:
            yield from flush()
        if file.kind == "text" and file.size <= LARGE_FILE:
            small.append(file)
            held += file.size
            if held >= UNIT_BYTES:
                yield from flush()
            continue
        yield from flush()
        if file.kind == "text":
            yield from _segments(file, skips)
        elif file.kind == "parquet":
            yield from _parquet_units(file, field, skips, source_field)
        else:
            yield from _json_units(file, field, skips, source_field)
    yield from flush()


def _segments(file: SourceFile, skips: Skips) -> list[Unit]:
    """The segments of a large text file, after one pass over all of it: UTF-8, no NUL, not blank, its key."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    digest = blake2b(digest_size=8)
    blank = True
    start = offset = 0
    cuts: list[int] = []
    try:
        with Path(file.path).open("rb", buffering=0) as stream:
            while block := stream.read(READ_BYTES):
                if offset == 0 and (wide := wide_encoding(block)):
                    skips.add(f"{wide}, not UTF-8", file.path, named=file.explicit)
                    return []
                if offset == 0 and block.startswith(UTF8_BOM):
                    start = len(UTF8_BOM)
                    block = block[start:]
                    offset = start
                if b"\0" in block:
                    skips.add("binary (NUL bytes)", file.path, named=file.explicit)
                    return []
                decoder.decode(block)
                digest.update(block)
                blank = blank and not block.strip()
                if offset + len(block) - (cuts[-1] if cuts else start) >= LARGE_FILE:
                    match = UTF8_PIECE_START.search(block)
                    if match:
                        cuts.append(offset + match.start())
                    elif offset + len(block) - (cuts[-1] if cuts else start) > MAX_SEGMENT:
                        skips.add(f"no space or line end in {MAX_SEGMENT >> 20} MiB", file.path, named=file.explicit)
                        return []
                offset += len(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        skips.add("not UTF-8", file.path, named=file.explicit)
        return []
    except OSError as error:
        skips.add("cannot be read", file.path, note=error.strerror or "", named=file.explicit)
        return []
    if blank:
        skips.add("empty", file.path)
        return []
    key = int.from_bytes(digest.digest(), "little")
    edges = [start, *cuts, offset]
    return [SegmentUnit(file.input, b - a, file.path, a, b, key, a == start, file.source) for a, b in pairwise(edges)]


def _json_units(file: SourceFile, field: str, skips: Skips, source_field: str) -> Iterator[Unit]:
    line = 1
    counted = 0
    try:
        head, blocks = peek(read_blocks(Path(file.path)), 4, lambda block: False)
        if wide := wide_encoding(head):
            skips.add(f"{wide}, not UTF-8", file.path, named=file.explicit)
            return
        cut = line_blocks if file.kind == "lines" else record_blocks
        for data, lines, done in cut(blocks, UNIT_BYTES, MAX_RECORD):
            if data is None:
                skips.add(f"record above {MAX_RECORD >> 20} MiB", f"{file.path}:{line}", named=file.explicit)
            else:
                yield LinesUnit(file.input, done - counted, file.path, line, data, field, file.source, source_field)
                counted = done
            line += lines
    except OSError as error:
        skips.add("cannot be read", file.path, note=error.strerror or "", named=file.explicit)
    except DamagedFileError as error:
        place = f"{file.path}:{line}"
        skips.add("damaged from some place on", place, note=str(error), named=file.explicit)


def _parquet_units(file: SourceFile, field: str, skips: Skips, source_field: str) -> Iterator[Unit]:
    import pyarrow as pa
    from pyarrow import parquet

    def texts(column: pyarrow.Array) -> list[bytes | None]:
        values: list[bytes | None] = column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
        return values

    columns = list(dict.fromkeys(name for name in (field, source_field) if name))
    row = 0
    try:
        with parquet.ParquetFile(file.path, memory_map=False, buffer_size=READ_BYTES) as table:
            meta, schema = table.metadata, table.schema_arrow
            for name in columns:
                column = schema.get_field_index(name)
                kind = schema.field(column).type if column >= 0 else None
                if kind is not None and _is_text(kind):
                    continue
                found = f"is {kind}, expected a string" if kind else "is missing"
                if not file.explicit:
                    skips.add(f"no text in a column {name!r}", file.path, note=f"its columns: {listed(schema.names)}")
                    return
                raise InputError(
                    f"{as_text(file.path)}: the column {name!r} {found}; its columns are {listed(schema.names)};"
                    f" choose one with {'--field' if name == field else '--split-by field:NAME'}"
                )
            for group in range(meta.num_row_groups):
                batch_rows = _batch_rows(file, group, field)
                for batch in table.iter_batches(batch_rows, row_groups=[group], columns=columns, use_threads=False):
                    values = texts(batch.column(field))
                    sources: list[str | None] = [file.source] * len(values)
                    if source_field:
                        named = (value or b"" for value in texts(batch.column(source_field)))
                        sources = [value.decode("utf-8", "backslashreplace") or None for value in named]
                    done = file.size * len(values) // max(1, meta.num_rows)
                    yield ValuesUnit(file.input, done, file.path, row + 1, values, field, sources)
                    row += len(values)
    # pyarrow finds some damage only when it meets impossible names, sizes and numbers.
    except (
        OSError,
        pa.ArrowException,
        DamagedFileError,
        ValueError,
        LookupError,
        ArithmeticError,
        MemoryError,
    ) as error:
        why = str(error).partition("\n")[0]
        place = f"{file.path}:{row + 1}" if row else file.path
        skips.add("damaged from some place on", place, note=listed([why], longest=200), named=file.explicit)


def _batch_rows(file: SourceFile, group: int, field: str) -> int:
    """How many rows of a row group make about one unit of text.

    In a dictionary a long text is stored once for any number of rows, so its longest one counts, up to `MAX_RECORD` in
    all: the dictionary comes with the first row.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import parquet

    with parquet.ParquetFile(file.path, memory_map=False, buffer_size=READ_BYTES, read_dictionary=[field]) as table:
        meta = table.metadata.row_group(group)  # not .column(i), which ends the process if a file is damaged
        row_bytes = max(1, meta.total_byte_size // max(1, meta.num_rows))
        rows = max(1, min(8192, UNIT_BYTES // row_bytes))
        first = next(table.iter_batches(1, row_groups=[group], columns=[field], use_threads=False), None)
        if first is not None and pa.types.is_dictionary(first.column(0).type):
            longest = pc.max(pc.binary_length(first.column(0).dictionary)).as_py() or 1
            rows = max(1, min(rows, MAX_RECORD // longest))
    return rows


def _is_text(kind: pyarrow.DataType) -> bool:
    import pyarrow as pa

    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value))


def read_unit(unit: Unit) -> Iterator[Document | Skip]:
    """The documents of a unit in order, and what had to be left out.

    Raises:
        RunError: a file changed between `plan` and now.
    """
    if isinstance(unit, FilesUnit):
        for path, source in zip(unit.paths, unit.sources, strict=True):
            yield _of_source(_read_file(path), source)
    elif isinstance(unit, SegmentUnit):
        yield Document(_read_segment(unit), unit.end - unit.start, unit.key, unit.source)
    elif isinstance(unit, LinesUnit):
        for number, line in enumerate(unit.data.split(b"\n"), unit.line):
            if line and not line.isspace():
                yield _read_record(line, f"{unit.path}:{number}", unit)
    elif isinstance(unit, ValuesUnit):
        for number, (value, named) in enumerate(zip(unit.values, unit.sources, strict=True), unit.row):
            place = f"{unit.path}:{number}"
            if named is None:
                yield Skip("no source to split by", place, "its column is empty")
            else:
                yield _of_source(_read_value(value, place, unit.field), named)
    else:
        raise TypeError(f"{type(unit).__name__} is not a unit of work")


def _of_source(item: Document | Skip, source: str) -> Document | Skip:
    return item._replace(source=source) if source and isinstance(item, Document) else item


def _checked(text: str, utf8: bytes, place: str) -> Document | Skip:
    if len(utf8) > MAX_RECORD:
        return Skip(f"record above {MAX_RECORD >> 20} MiB", place)
    if len(text) > MAX_UNBROKEN:
        cuts = (match.start() for match in TEXT_PIECE_START.finditer(text))
        if any(b - a > MAX_UNBROKEN for a, b in pairwise(chain([0], cuts, [len(text)]))):
            return Skip(f"no space or line end in {MAX_UNBROKEN >> 20} MiB", place)
    return Document(text, len(utf8), text_key(utf8)) if text and not text.isspace() else Skip("empty", place)


def _read_segment(unit: SegmentUnit) -> str:
    try:
        with Path(unit.path).open("rb") as stream:
            stream.seek(unit.start)
            utf8 = stream.read(unit.end - unit.start)
        if len(utf8) == unit.end - unit.start:
            return utf8.decode()
    except (OSError, UnicodeDecodeError):
        pass
    raise RunError(f"{as_text(unit.path)}: {CHANGED}")


def _read_file(path: str) -> Document | Skip:
    try:
        with Path(path).open("rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            utf8 = stream.read(size) if size <= LARGE_FILE else b""
    except OSError as error:
        return Skip("cannot be read", path, error.strerror or "")
    if len(utf8) != size:
        raise RunError(f"{as_text(path)}: {CHANGED}")
    if wide := wide_encoding(utf8):
        return Skip(f"{wide}, not UTF-8", path)
    if b"\0" in utf8:
        return Skip("binary (NUL bytes)", path)
    utf8 = utf8.removeprefix(UTF8_BOM)
    try:
        return _checked(utf8.decode(), utf8, path)
    except UnicodeDecodeError:
        return Skip("not UTF-8", path)


def _read_record(line: bytes, place: str, unit: LinesUnit) -> Document | Skip:
    field = unit.field
    if len(line) > COMPLEX_RECORD and _values(line) > MAX_VALUES:
        return Skip(f"record of more than {MAX_VALUES:,} values", place)
    try:
        record = _load(line.decode().strip(JSON_SPACE))
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(record, dict) or not isinstance(text, str):
            return Skip(f"no text in field {field!r}", place, _fields(record))
        document = _checked(text, text.encode(), place)
        if not unit.source_field:
            return _of_source(document, unit.source)
        source = record.get(unit.source_field)
        if not isinstance(source, str | int) or source == "":
            return Skip("no source to split by", place, f"its field {unit.source_field!r} is missing or no text")
        return _of_source(document, str(source).encode("utf-8", "backslashreplace").decode())
    except UnicodeError:  # of the line, or a lone surrogate written as an escape
        return Skip("not UTF-8", place)
    except (ValueError, RecursionError):
        return Skip("not JSON", place)


def _values(line: bytes) -> int:
    """An upper bound on the number of values in a record; where that may be too many, strings do not count."""
    count = sum(map(line.count, (b",", b"[", b"{")))
    if count > MAX_VALUES:
        marks = (match for match in JSON_VALUES.finditer(line) if not match[0].startswith(b'"'))
        count = sum(1 for _ in islice(marks, MAX_VALUES + 1))
    return count


def _fields(record: object) -> str:
    """What a record has instead of the missing field."""
    if not isinstance(record, dict):
        return "it is not an object"
    text = [name for name, value in record.items() if isinstance(value, str)]
    return f"its fields with text: {listed(text)}" if text else f"its fields, none with text: {listed(record)}"


def _load(line: str) -> object:
    """`json.loads` without its search for whitespace on both sides, which takes a tenth of a short record's time."""
    record, end = DECODER.raw_decode(line)
    if end != len(line):
        raise ValueError("something follows the record")
    return record


def _read_value(value: bytes | None, place: str, field: str) -> Document | Skip:
    if value is None:
        return Skip(f"no text in field {field!r}", place)
    try:
        return _checked(value.decode(), value, place)
    except UnicodeDecodeError:
        return Skip("not UTF-8", place)
