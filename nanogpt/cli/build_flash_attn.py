"""`build-flash-attn`: build FlashAttention 3 from source, to use it instead of the image's FlashAttention 4."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from nanogpt.cli.entry import click_command, run_command


def build_flash_attn(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Checkout or archive of flash-attention.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to put the wheel and its contents.")],
    arch: Annotated[str, typer.Option("--arch", help="GPU architecture: 90 for an H100 or H200.")] = "90",
    cuda: Annotated[
        Path | None, typer.Option("--cuda", metavar="DIR", help="CUDA toolkit.", show_default="CUDA_HOME, or nvcc's")
    ] = None,
    cutlass: Annotated[
        Path | None, typer.Option("--cutlass", metavar="DIR", help="CUTLASS.", show_default="SOURCE/csrc/cutlass")
    ] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="At most this many compilers at once.")] = None,
) -> None:
    """Build the kernels of FlashAttention 3 that a run needs, and no others: minutes, 6 GB of memory per compiler.

    NANOGPT_FLASH_ATTN=DIR then uses them in the image, with `runtime.attention: fa3` in the recipe.
    """
    from nanogpt.image.flash_attn_build import build

    with tempfile.TemporaryDirectory(prefix="build-flash-attn-") as scratch:
        build(source, out, architecture=arch, cuda=cuda, cutlass=cutlass, jobs=jobs, scratch=Path(scratch))


def main() -> NoReturn:
    """The command `build-flash-attn`."""
    run_command("", lambda: click_command(build_flash_attn, "build-flash-attn")(prog_name="build-flash-attn"))
