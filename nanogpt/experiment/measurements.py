"""What can be measured of a recipe, by name, and how `nanogpt` is called for it.

`fast` is the recipe's run, shortened; `plain` is that without fused kernels and 8-bit numbers. An idea is the fast run,
and the benchmarks, with settings of its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from nanogpt.errors import InputError
from nanogpt.hardware import Fill
from nanogpt.recipe import dump_spec, load_recipe

SHORT_STEPS = 40  # of runs that measure the start, or compare bits
DETERMINISTIC = ("runtime.deterministic=true",)
PLAIN = (
    "runtime.kernels=plain",
    "runtime.head_precision=bf16",
    "runtime.mlp_precision=bf16",
    "runtime.projection_precision=bf16",
)
TRAIN, ENDS = ("train",), ("experiment", "ends")
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


class Name(NamedTuple):
    """What `fast:1@100` says: which measurement, with which seed, ended by which evaluation."""

    base: str
    seed: int | None = None
    until: int | None = None  # a step

    @classmethod
    def parse(cls, text: str) -> Name:
        """Seed and step may be left out. Raises `InputError`."""
        match = re.fullmatch(rf"({NAME})(?::(\d+))?(?:@(\d+))?", text)
        if match is None:
            raise InputError(f"{text}: expected NAME, NAME:SEED, NAME@STEP or NAME:SEED@STEP, such as fast:1@100")
        base, seed, until = match.groups()
        return cls(base, None if seed is None else int(seed), None if until is None else int(until))

    @property
    def file(self) -> str:
        """fast-1 of `fast:1` and of `fast:1@100`."""
        return self.base if self.seed is None else f"{self.base}-{self.seed}"


@dataclass(frozen=True)
class Measurement:
    """A call of `nanogpt`: its command, the recipe with settings, `KEY=VALUE`, and further options."""

    command: tuple[str, ...]
    recipe: str | None = None
    settings: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    steps: int | None = None  # to which the schedule is shortened

    @property
    def trains(self) -> bool:
        """Whether it makes a run, in a directory of its own."""
        return self.command in (TRAIN, ENDS)

    def on(self, ranks: int, seed: int | None) -> Measurement:
        """The same on this many GPUs of one machine, with this seed if there is one."""
        if self.recipe is None:
            return self
        seeds = () if seed is None else (f"training.seed={seed}",)
        return replace(self, settings=(*on_one_node(ranks), *self.settings, *seeds))

    def arguments(self, runs: Path, traces: Path, data: Path | None) -> list[str]:
        """What follows `nanogpt`."""
        found = [*self.command]
        if self.recipe is not None:
            found.append(self.recipe)
        if self.steps is not None:
            found += ["--steps", str(self.steps)]
        if self.trains:
            found += ["--out", str(runs)]
            if data is not None:
                found += ["--data", str(data)]
        if self.command == ("bench", "profile"):
            found += ["--traces", str(traces)]
        for setting in self.settings:
            found += ["--set", setting]
        return [*found, *self.options]

    def fingerprint(self, data: Path | None) -> str:
        """Equal for calls that measure the same: sha256 of the call, its data, and the recipe as it stands now.

        Raises:
            InputError: the recipe or a setting is wrong.
        """
        resolved = "" if self.recipe is None else dump_spec(load_recipe(self.recipe, self.settings, self.steps))
        measured = (self.command, self.options, resolved, str(data) if self.trains else "")
        return hashlib.sha256(repr(measured).encode()).hexdigest()


def on_one_node(ranks: int) -> tuple[str, str]:
    """Settings for this many GPUs of one machine."""
    return f"hardware.gpus_per_node={ranks}", "hardware.nodes=1"


def measurements(
    recipes: Mapping[str, str],
    *,
    steps: int,
    settings: Sequence[str] = (),
    ideas: Mapping[str, Sequence[str]] | None = None,
    end_options: Sequence[str] = (),
    validations: Mapping[str, Path] | None = None,
    fill: Fill | None = None,
) -> dict[str, Measurement]:
    """All of them by name.

    Args:
        recipes: by the prefix of their measurements' names, "" among them.
        steps: of the runs that are compared.
        settings: of every recipe.
        ideas: settings by name; each belongs to the recipe with the longest prefix of its name.
        end_options: of `nanogpt experiment ends`.
        validations: directories by name, on which the runs that are compared are evaluated at their ends too.
        fill: names the GPU for a recipe that leaves it open.

    Raises:
        InputError: an idea has the name of a measurement.
    """
    found = {"kernels": Measurement(("bench", "kernels"))}
    sets = [part for name, directory in (validations or {}).items() for part in ("--validate", f"{name}={directory}")]
    command, validated = (ENDS if sets else TRAIN), tuple(sets)
    for prefix, recipe in recipes.items():
        gpu = load_recipe(recipe, (*settings, *on_one_node(1)), fill=fill).hardware.gpu
        base = (*settings, f"hardware.gpu={gpu}")
        plain = (*base, *PLAIN, f"runtime.attention={'plain' if gpu == 'cpu' else 'varlen'}")
        short = min(SHORT_STEPS, steps)
        of_recipe = {
            "fast": Measurement(command, recipe, base, validated, steps=steps),  # cold where it is the first
            "again": Measurement(command, recipe, base, validated, steps=steps),
            "plain": Measurement(command, recipe, plain, validated, steps=steps),
            "whole": Measurement(command, recipe, base, validated),
            "full": Measurement(ENDS, recipe, base, (*validated, *end_options)),
            "warm": Measurement(TRAIN, recipe, base, steps=short),
            "deterministic": Measurement(TRAIN, recipe, (*base, *DETERMINISTIC), steps=short),
            "deterministic-again": Measurement(TRAIN, recipe, (*base, *DETERMINISTIC), steps=short),
            "step": Measurement(("bench", "step"), recipe, base, ("--steps", "12", "--warmup", "4")),
            "profile": Measurement(("bench", "profile"), recipe, base, ("--rows", "60")),
            "communication": Measurement(("bench", "communication"), recipe, base),
        }
        found |= {f"{prefix}{name}": measurement for name, measurement in of_recipe.items()}
    for idea, more in (ideas or {}).items():
        prefix = prefix_of(idea, recipes)
        for end, like in (("", "fast"), ("-step", "step"), ("-profile", "profile")):
            if f"{idea}{end}" in found:
                raise InputError(f"--idea {idea}: {idea}{end} is a measurement already; give the idea another name")
            measurement = found[f"{prefix}{like}"]
            found[f"{idea}{end}"] = replace(measurement, settings=(*measurement.settings, *more))
    return found


def prefix_of(name: str, prefixes: Iterable[str]) -> str:
    """The longest of the prefixes that a measurement's or idea's name begins with; "" is one of them."""
    return max((prefix for prefix in prefixes if name.startswith(prefix)), key=len)
