"""`nanogpt sample`: text from a run's model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sample(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.", show_default=False)],
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="What the text starts with.")],
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", help="Tokens to write at most.")] = 100,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", help="0 takes the likeliest token each time.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", metavar="K", help="Draw among the K likeliest tokens.")] = 50,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="The same seed gives the same text.")] = 0,
) -> None:
    """Write text with a run's newest checkpoint, on the CPU; it ends where the model ends its document."""
    from nanogpt.training.sampling import sample_text

    typer.echo(sample_text(run, prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed))
