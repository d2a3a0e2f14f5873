"""All mutations, by subject: a file each."""

from __future__ import annotations

import anvil
import end_of_run
import gpt2
import record89
import record92
import sampling
import speedrun_model
import speedrun_training
from mutation import Mutation

MUTATIONS: list[Mutation] = [
    *speedrun_model.MUTATIONS,
    *speedrun_training.MUTATIONS,
    *gpt2.MUTATIONS,
    *record89.MUTATIONS,
    *record92.MUTATIONS,
    *sampling.MUTATIONS,
    *end_of_run.MUTATIONS,
    *anvil.MUTATIONS,
]
