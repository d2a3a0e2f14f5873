"""`prep-fineweb`, also `nanogpt prep`: FineWeb's token shards, downloaded and verified."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from nanogpt.cli.entry import click_command, run_command


def prep_fineweb(
    chunks: Annotated[
        int,
        typer.Option(
            "--chunks", envvar="FINEWEB_CHUNKS", min=1, max=103, help="Training shards, 100 M tokens (200 MB) each."
        ),
    ] = 9,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", envvar="NANOGPT_DATA", help="Where to.", show_default="./data/fineweb10B"),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=32, help="Parallel connections.")] = 4,
    retries: Annotated[
        int, typer.Option("--retries", min=0, max=100, help="Repeats of a request that brought nothing, in a row.")
    ] = 6,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash the shards that are here, even if they look unchanged.")
    ] = False,
) -> None:
    """Download FineWeb's token shards and verify them.

    The validation shard and the first training shards of the hub data set kjj0/fineweb10B-gpt2. What is here and valid
    is kept, what is corrupt is fetched again, what was interrupted continues. Run it where there is internet: on most
    clusters, the login node. HF_ENDPOINT, HF_TOKEN, HTTPS_PROXY and SSL_CERT_FILE count.
    """
    from nanogpt.data import fineweb

    try:
        outcomes = fineweb.download(
            directory or fineweb.default_directory(), chunks=chunks, workers=workers, retries=retries, verify=verify
        )
    except fineweb.DownloadError as error:
        print(fineweb.table(error.outcomes), flush=True)
        raise
    print(fineweb.table(outcomes), flush=True)


def fineweb_main() -> NoReturn:
    """The console script `prep-fineweb`."""
    run_command("prep-fineweb", lambda: click_command(prep_fineweb, "prep-fineweb")(prog_name="prep-fineweb"))
