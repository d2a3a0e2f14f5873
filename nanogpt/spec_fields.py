"""The building blocks of a RunSpec: bounded numbers, a base that refuses unknown keys, marks on fields.

No torch here: a login node checks a recipe in a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from nanogpt.environment import MAX_NAME_BYTES, expanded

# A value beyond these is a typo, which must not exhaust the memory of the machine that checks the recipe.
MOST = 10**8  # steps, say
LARGEST = 1e12


def _file_pattern(text: str) -> str:
    if "/" in text or "**" in text or "\0" in text or text in (".", ".."):
        raise ValueError("must be a pattern of file names, with * and ?; data.directory names the directory")
    if len(text.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"is longer than {MAX_NAME_BYTES} bytes, the limit of a file name")
    return text


Count = Annotated[int, Field(ge=1, le=MOST)]
Index = Annotated[int, Field(ge=0, le=MOST)]
Few = Annotated[int, Field(ge=1, le=1024)]  # layers, processes
Padding = Annotated[int, Field(ge=0, le=1024)]
Size = Annotated[int, Field(ge=1, le=2**20)]  # of one side of a matrix
Tokens = Annotated[int, Field(ge=1, le=10**13)]
Vocabulary = Annotated[int, Field(ge=1, le=2**17)]  # shards have two bytes per token; some padding
Positive = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Finite = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=1e8, allow_inf_nan=False)]  # three years
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_BYTES)]
Names = Annotated[list[Name], Field(max_length=1024)]
Layers = Annotated[list[Index], Field(max_length=1024)]
Directory = Annotated[str, Field(min_length=1), AfterValidator(expanded)]
FilePattern = Annotated[Name, AfterValidator(_file_pattern)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# Not strict, since YAML has lists only; what is inside stays strict.
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]
Polynomial = Annotated[tuple[Finite, Finite, Finite], Field(strict=False)]

Problem = tuple[tuple[str | int, ...], str]  # path below a part of the spec, message


class Strict(BaseModel):
    """Base of every part of a spec: refuses unknown keys, takes neither "12" nor true for numbers, is immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), str_max_length=10_000)


@dataclass(frozen=True)
class Compiled:
    """A field's annotation: `part` of its value reaches compiled code; None: nothing of it does.

    A field without it counts as reaching compiled code, so that a forgotten one costs a compilation but
    never runs another run's code.
    """

    part: Callable[[Any], Any] | None


NOT_COMPILED = Compiled(None)


def compiled_values(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in a spec that reaches compiled code; see `Compiled`."""
    if isinstance(value, BaseModel):
        found = False
        for name, field in type(value).model_fields.items():
            mark = next((mark for mark in field.metadata if isinstance(mark, Compiled)), Compiled(_as_is))
            if mark.part is not None:
                found = True
                yield from compiled_values(mark.part(getattr(value, name)), f"{path}.{name}" if path else name)
        if not found:
            yield path, type(value).__name__  # that it exists at all
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from compiled_values(item, f"{path}.{name}")
    elif isinstance(value, list) and any(isinstance(item, BaseModel) for item in value):
        for index, item in enumerate(value):
            yield from compiled_values(item, f"{path}[{index}]")
    else:
        yield path, value


def _as_is(value: Any) -> Any:
    return value
