"""Schedule, trainer, warm-up, evaluation, checkpoints, sampling, losses by document."""
