"""`nanogpt export`: write a run's model for other people's software."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nanogpt.threads import wait_briefly


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The directory to make.")],
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="OWNER/NAME", help="Also upload it, with the token in HF_TOKEN."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push-to-hub: make the repository visible to its owners only.")
    ] = False,
) -> None:
    """Write RUN's newest checkpoint to DIR as Hugging Face transformers loads it, with tokenizer and model card.

    gpt2 becomes transformers' GPT2LMHeadModel. The other models come with their code: load them with
    trust_remote_code=True. Neither needs this package.
    """
    wait_briefly()
    from nanogpt.console import say
    from nanogpt.errors import InputError
    from nanogpt.export.export import export_run
    from nanogpt.export.hub import check_name, push

    if push_to_hub is not None:
        check_name(push_to_hub)
    elif private:
        raise InputError("--private: is for the repository of --push-to-hub, which is not given")
    made = export_run(run, out, name=push_to_hub)
    say(f"Step {made.step:,}, {made.parameters:,} parameters")
    if push_to_hub is not None:
        say(f"Uploading {out} as {push_to_hub}")
        typer.echo(push(out, push_to_hub, private=private))
    else:
        typer.echo(out)
