"""Compiling the model's graphs by all ranks of a node at once, each graph by one of them, where nothing is kept yet.

The ranks of a node look for compiled code in one directory (`nanogpt.cache`). So before the warm-up each takes its
share of the graphs, calls them once without any communication, and finds the others' in the directory when the warm-up
comes to them. It would be the same work for every rank otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanogpt.training.schedule import StepSettings
    from nanogpt.training.trainer import Trainer


def compile_ahead(trainer: Trainer) -> None:
    """Divide the graphs among this node's ranks, where there are several and no file of compiled code was found.

    Every rank calls it; they wait for one another. Parameters, gradients and data stay as they were.
    """
    if trainer.cache.root is None or trainer.cache.found or trainer.world.size == 1:
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", trainer.world.size))
    for job in graph_jobs(trainer)[trainer.world.local_rank :: ranks]:
        job()
    trainer.world.synchronize()
    trainer.world.communicator.barrier()


def graph_jobs(trainer: Trainer) -> list[Callable[[], None]]:
    """A call for each graph of the model, alike in number and order on all ranks, the dearest first."""

    def training(settings: StepSettings) -> None:
        batches = trainer.train_batches.next_step(
            settings.batch_tokens, settings.max_document_tokens, settings.max_documents
        )
        trainer.micro_step.compute(batches[0], trainer.loss_arguments(settings))
        for parameter in trainer.model.parameters():
            parameter.grad = None
        trainer.train_batches.restart()

    def evaluation() -> None:
        trainer.evaluation_loss(next(iter(trainer.val_batches)), trainer.as_numbers(trainer.schedule.final_windows))

    by_graph = {}
    for first in trainer.schedule.first_steps:
        settings = trainer.schedule.at(first)
        constants = None if trainer.run_time_windows else settings.windows
        limits = settings.max_document_tokens, settings.max_documents
        terms = len(settings.token_weights), settings.prefix_weight is not None
        by_graph[settings.batch_tokens, limits, terms, constants] = settings
    largest_first = sorted(by_graph.values(), key=lambda settings: -settings.batch_tokens)
    jobs: list[Callable[[], None]] = [lambda settings=settings: training(settings) for settings in largest_first]  # type: ignore[misc]
    return [*jobs, evaluation]
