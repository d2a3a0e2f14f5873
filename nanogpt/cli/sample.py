"""`nanogpt sample`: write text with a run's model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nanogpt.threads import wait_briefly


def sample(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.", show_default=False)],
    prompt: Annotated[
        list[str], typer.Option("--prompt", metavar="TEXT", help="What a text starts with. May be repeated.")
    ],
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", help="At most this many tokens per text.")] = 100,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", help="0 takes the likeliest token each time.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", metavar="K", help="Draw among the K likeliest tokens.")] = 50,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="The same seed gives the same texts.")] = 0,
    stream: Annotated[bool, typer.Option("--stream", help="Show the text as it is written.")] = False,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="cpu|cuda", help="Where to compute.", show_default="a GPU if there is one"),
    ] = None,
) -> None:
    """Write text with a run's newest checkpoint; it ends where the model ends its document.

    Texts go to standard output, with an empty line between them, and tokens per second to standard error.
    """
    wait_briefly()
    from nanogpt.console import say
    from nanogpt.training.sampling import sample_texts

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    samples = sample_texts(
        run,
        prompt,
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        device=device,
        stream=show if stream else None,
    )
    if not stream:
        typer.echo("\n\n".join(samples.texts))
    rate = samples.tokens / samples.seconds
    say(f"{samples.tokens:,} tokens in {samples.seconds:.1f} s on {samples.device}, {rate:.1f} tokens/s")
