"""Record 92's steps without compiled code, on as many GPUs as torchrun starts processes, and what waits for them.

The argument: what PyTorch does about an operation that makes the host wait for the GPU, error or warn.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch

from nanogpt.data.made_up import write_made_up_shards
from nanogpt.launch.world import join_world
from nanogpt.recipe import load_recipe
from nanogpt.training.trainer import Trainer

SETTINGS = (
    "model.ngram_rows=65536",
    "runtime.compile=off",
    "data.epochs=null",
    "evaluation.tokens=131072",
    "evaluation.micro_batch_tokens=16384",
)


def run(mode: str) -> None:
    """Warm up as a run does, then make every step of a schedule of 30."""
    size = os.environ.get("WORLD_SIZE", "1")
    spec = load_recipe("record92", [*SETTINGS, "hardware.gpu=h200", f"hardware.gpus_per_node={size}"], steps=30)
    with tempfile.TemporaryDirectory() as scratch, join_world(spec) as world:
        write_made_up_shards(Path(scratch), train_tokens=8_000_000, val_tokens=131_073, bos=spec.data.bos)
        with Trainer(spec, world, run=None, data_directory=Path(scratch)) as trainer:
            trainer.warm_up()
            world.synchronize()
            torch.cuda.set_sync_debug_mode(mode)
            for step in range(spec.training.total_steps):
                settings = trainer.schedule.at(step)
                trainer.enter(settings)
                trainer.train_step(settings)
                trainer.end_of_run.after_step(step)
            torch.cuda.set_sync_debug_mode("default")
            world.synchronize()


if __name__ == "__main__":
    run(sys.argv[1])
