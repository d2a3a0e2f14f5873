"""What every part of a RunSpec is made of: bounded numbers, a base that refuses unknown keys, marks on fields.

No torch here: a recipe is checked on a login node in a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# Not strict, since YAML has lists only; what is inside stays strict.
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]
Polynomial = Annotated[tuple[Finite, Finite, Finite], Field(strict=False)]

Problem = tuple[tuple[str | int, ...], str]  # path below a part of the spec, message


class Strict(BaseModel):
    """Base of every part of a spec: unknown keys are refused, "12" and true are no numbers, nothing can be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


@dataclass(frozen=True)
class Compiled:
    """Stands in a field's annotation: `part` of its value reaches compiled code; None: nothing of it does.

    A field without it reaches compiled code as it is, so that one that nobody has thought about costs a compilation and
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
            yield path, type(value).__name__  # that it is there at all
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
