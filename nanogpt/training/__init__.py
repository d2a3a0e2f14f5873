"""Schedule, trainer, warm-up, evaluation, checkpoints, sampling."""
