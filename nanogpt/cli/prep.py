"""`prep-fineweb`, also `nanogpt prep`: download FineWeb's token shards and verify them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from nanogpt.cli.entry import click_command, run_command


def prep_fineweb(
    chunks: Annotated[
        int,
        typer.Option(
            "--chunks", envvar="FINEWEB_CHUNKS", min=1, max=1030, help="Training shards, 100 M tokens (200 MB) each."
        ),
    ] = 9,
    dataset: Annotated[
        str,
        typer.Option("--dataset", metavar="NAME", help="fineweb10B (the leaderboard's), fineweb100B or finewebedu10B."),
    ] = "fineweb10B",
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            envvar="NANOGPT_DATA",
            help="Directory for the shards.",
            show_default="./data/fineweb10B, or as --dataset says",
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=32, help="Parallel connections.")] = 4,
    retries: Annotated[
        int, typer.Option("--retries", min=0, max=100, help="Retries in a row for a failing request.")
    ] = 6,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash the shards that are here, even if they look unchanged.")
    ] = False,
) -> None:
    """Download FineWeb's token shards and verify them.

    Gets the validation shard and the first training shards of the hub data set kjj0/NAME-gpt2. Valid
    shards are kept, corrupt ones fetched again, interrupted downloads resumed. Run it where there is internet: on most
    clusters, the login node. HF_ENDPOINT, HF_TOKEN, HTTPS_PROXY and SSL_CERT_FILE are used if set.
    """
    from nanogpt.console import print_table
    from nanogpt.data import fineweb
    from nanogpt.errors import InputError

    if dataset not in fineweb.DATA_SETS:
        raise InputError(f"--dataset: found {dataset!r}, expected {', '.join(fineweb.DATA_SETS)}")
    try:
        outcomes = fineweb.download(
            directory or fineweb.default_directory(dataset),
            data_set=fineweb.DATA_SETS[dataset],
            chunks=chunks,
            workers=workers,
            retries=retries,
            verify=verify,
        )
    except fineweb.DownloadError as error:
        print_table(fineweb.outcomes_table(error.outcomes))
        raise
    print_table(fineweb.outcomes_table(outcomes))


def fineweb_main() -> NoReturn:
    """The console script `prep-fineweb`."""
    run_command("prep-fineweb", lambda: click_command(prep_fineweb, "prep-fineweb")(prog_name="prep-fineweb"))
