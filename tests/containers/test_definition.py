"""Definition, locks and what they are made of: that they agree, without building anything."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest
from definition_file import Definition, read_definition

from nanogpt.image.build import FLAVOURS, REGISTRY_BASES
from nanogpt.image.sources import SOURCES, build_arguments, find_source, locked_versions

ROOT = Path(__file__).parents[2]
CONTAINERS = ROOT / "containers"
PYTHONS = {"cuda": "3.13", "cpu": "3.11"}


def requirements(flavour: str) -> list[str]:
    """What the lock must fulfil: pyproject.toml with the extra `text`, and the flavour's own file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = (CONTAINERS / f"{flavour}.in").read_text().splitlines()
    wanted = [*project["dependencies"], *project["optional-dependencies"]["text"]]
    return wanted + [line for line in own if line and not line.startswith("#")]


def disagreements(wanted: list[str], locked: dict[str, str], python: str) -> list[str]:
    """Requirements that the locked versions do not fulfil."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    versions = {canonicalize_name(name): version for name, version in locked.items()}
    found = []
    for line in wanted:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        version = versions.get(canonicalize_name(requirement.name))
        if version is None:
            found.append(f"{line}: not in the lock; run `make lock`")
        elif not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{line}: the lock has {version}; run `make lock`")
    return found


@pytest.fixture(scope="module")
def definition(tmp_path_factory: pytest.TempPathFactory) -> Definition:
    return read_definition(CONTAINERS / "nanogpt.def", tmp_path_factory.mktemp("definition"))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_lock_fulfils_pyproject(flavour: str) -> None:
    locked = locked_versions((CONTAINERS / f"{flavour}.lock").read_text())
    assert disagreements(requirements(flavour), locked, PYTHONS[flavour]) == []


def test_a_disagreement_is_seen() -> None:
    locked = {"torch": "2.11.0", "huggingface-hub": "1.5.0"}
    assert disagreements(["torch>=2.11,<2.14", "huggingface_hub>=1.2"], locked, "3.13") == []
    assert disagreements(["torch>=2.12", "numpy>=2.0"], locked, "3.13") == [
        "torch>=2.12: the lock has 2.11.0; run `make lock`",
        "numpy>=2.0: not in the lock; run `make lock`",
    ]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_locked_package_has_hashes_and_one_version(flavour: str) -> None:
    text = (CONTAINERS / f"{flavour}.lock").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    names = [line.split("==")[0] for line in lines]
    assert len(names) > 50
    assert len(set(names)) == len(names)
    assert [line for line in lines if not re.match(r"[\w.-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", line)] == []


def test_the_cuda_lock_is_the_record_s_set() -> None:
    locked = locked_versions((CONTAINERS / "cuda.lock").read_text())
    assert (locked["torch"], locked["triton"], locked["flash-attn-4"]) == ("2.11.0", "3.6.0", "4.0.0b36")
    assert locked["nvidia-cublas"].startswith("13.")
    assert "nvidia-cutlass-dsl-libs-cu13" in locked
    for name in ("tiktoken", "huggingface-hub", "pydantic"):
        assert name in locked


def test_the_definition_takes_base_and_lock_as_arguments(definition: Definition, tmp_path: Path) -> None:
    assert (definition.bootstrap, definition.base) == ("docker", REGISTRY_BASES["cuda"])
    assert definition.arguments["LOCK"] == "containers/cuda.lock"
    local = read_definition(CONTAINERS / "nanogpt.def", tmp_path, {"BOOTSTRAP": "localimage", "BASE": "../tree"})
    assert (local.bootstrap, local.base) == ("localimage", "../tree")
    given = build_arguments(ROOT, "cuda", "debian:x", find_source(ROOT), "containers/cuda.lock", b"")
    assert set(given) == set(definition.arguments)  # Apptainer refuses a build argument that is not used


def test_the_definition_installs_by_hash_and_copies_what_is_there(definition: Definition) -> None:
    post = "\n".join(definition.post)
    assert "--require-hashes -r /opt/build/containers/cuda.lock" in post
    assert "--no-deps" in post
    assert sorted(source for source, _ in definition.files) == sorted(SOURCES)
    for source, target in definition.files:
        assert (ROOT / source).exists()
        assert target == f"/opt/build/{source}"


def test_the_definition_names_commit_versions_lock_and_date(tmp_path: Path) -> None:
    values = {
        "COMMIT": "c" * 40,
        "CLEAN": "true",
        "VERSIONS": "torch=2.11.0",
        "LOCK_SHA256": "f" * 64,
        "CREATED": "now",
        "SOURCE": "https://host.org/me/repo",
        "LICENSES": "MIT",
        "AUTHORS": "A, B",
        "BASE_NAME": "debian:x",
    }
    labels = read_definition(CONTAINERS / "nanogpt.def", tmp_path, values).labels
    assert labels["org.opencontainers.image.revision"] == "c" * 40
    assert labels["nanogpt.clean"] == "true"
    image = "org.opencontainers.image"
    assert [labels[f"{image}.{name}"] for name in ("source", "licenses", "authors", "base.name")] == [
        "https://host.org/me/repo",
        "MIT",
        "A, B",
        "debian:x",
    ]
    assert labels["nanogpt.versions"] == "torch=2.11.0"
    assert labels["nanogpt.lock.sha256"] == "f" * 64
    assert labels["org.opencontainers.image.created"] == labels["org.label-schema.build-date"] == "now"


def test_the_build_touches_nothing_of_the_host(definition: Definition) -> None:
    """While an image is built, Apptainer shows the host's /tmp and home in it."""
    removing = [line for line in definition.post if re.search(r"\brm\b|-delete", line)]
    assert removing
    for line in removing:
        assert not re.search(r"(^|[\s{,])(/tmp|/root|/home|/mnt|/var/tmp|\$HOME|~)", line), line
    assert any(line.startswith("export HOME=/opt/build/home TMPDIR=/opt/build/tmp") for line in definition.post)


def test_the_hosts_python_stays_out(definition: Definition) -> None:
    text = (CONTAINERS / "nanogpt.def").read_text()
    environment = text.partition("%environment")[2].partition("%runscript")[0]
    assert re.search(r"export PYTHONPATH= PYTHONHOME= ", environment)
    assert "PYTHONNOUSERSITE=1" in environment


def test_scripts_of_the_build_find_their_work(tmp_path: Path) -> None:
    """What the image leaves out goes, what it keeps stays."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("slim", CONTAINERS / "slim.py")
    assert spec and spec.loader
    slim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(slim)
    gone = (
        "sympy/core/tests/test_x.py",
        "torch/lib/libx.a",
        "torch/bin/protoc",
        "nvidia/cu13/lib/libcusolverMg.so.12",
        "nvidia/cu13/include/cuda.h",
        "triton/backends/nvidia/bin/ptxas-blackwell",
    )
    kept = (
        "torch/bin/torch_shm_manager",
        "torch/include/ATen/ATen.h",
        "numpy/_core/tests/_natype.py",
        "nvidia/cu13/lib/libcublasLt.so.13",
        "nvidia/cu13/lib/libnvrtc.so.13",
        "triton/backends/nvidia/bin/ptxas",
        "triton/backends/nvidia/include/cuda.h",
    )
    for name in (*gone, *kept):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 10)
    saved = sum(slim.remove(tmp_path, rule) for rule in slim.REMOVED)
    assert saved == 10 * len(gone)
    assert [name for name in gone if (tmp_path / name).exists()] == []
    assert [name for name in kept if not (tmp_path / name).exists()] == []


@pytest.mark.skipif(shutil.which("strip") is None, reason="needs binutils")
def test_a_library_that_strip_would_break_stays(tmp_path: Path) -> None:
    """Segments that are off by less than a page, as strip leaves them in a library that patchelf has rearranged."""
    import importlib.util
    import struct

    spec = importlib.util.spec_from_file_location("slim", CONTAINERS / "slim.py")
    assert spec and spec.loader
    slim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(slim)

    def library(offset: int) -> bytes:
        header = (
            b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
        )
        return header + struct.pack("<IIQQQQQQ", 1, 5, offset, 0x2000, 0, 0, 0, 0x1000)

    path = tmp_path / "lib.so"
    path.write_bytes(library(0x1000))
    assert slim.loadable(path)
    path.write_bytes(library(0x1008))
    assert not slim.loadable(path)
    path.write_text("no library")
    assert not slim.loadable(path)


def test_kernels_of_other_architectures_are_blanked_and_nothing_else(tmp_path: Path) -> None:
    import importlib.util
    import struct

    spec = importlib.util.spec_from_file_location("prune_kernels", CONTAINERS / "prune_kernels.py")
    assert spec and spec.loader
    prune_kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prune_kernels)

    def entry(kind: int, architecture: int, payload: bytes) -> bytes:
        header = struct.pack("<HHIQIIHHI", kind, 0x101, 64, len(payload), 0, 0, 0, 0, architecture)
        return header + bytes(64 - len(header)) + payload

    def fat(*entries: bytes) -> bytes:
        body = b"".join(entries)
        return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body

    def library(blank: bytes | None = None) -> bytes:
        code = {number: bytes([number]) * 24 for number in (75, 80, 86, 90, 100, 120)}
        entries = [
            entry(2, number, blank if blank and number in (75, 86, 100, 120) else text) for number, text in code.items()
        ]
        broken = fat(entry(2, 100, b"x" * 24), entry(7, 100, b"unknown!"))
        return (
            b"\x7fELF"
            + bytes(60)
            + fat(*entries, entry(1, 120, b"ptx ptx "))
            + b"between"
            + fat(entry(2, 80, b"8" * 8))
            + broken
        )

    path = tmp_path / "lib.so"
    path.write_bytes(library())
    assert prune_kernels.prune(path, {80, 90}) == 4 * 24
    assert path.read_bytes() == library(blank=bytes(24))
    assert prune_kernels.serves(80, {86})  # sm_80 runs on sm_86
    assert not prune_kernels.serves(86, {80})
    assert not prune_kernels.serves(80, {90})
