"""Fifty items in HellaSwag's form, written for tests: contexts and endings put together of short parts."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

ACTIVITIES = (
    (
        "Baking bread",
        "A man pours flour into a bowl.",
        "he",
        ("kneads the dough", "paints the bowl", "reads the flour"),
    ),
    (
        "Home and Garden",
        "[header] How to prune roses [title] Choose a dry day.",
        "",
        ("Cut above a bud", "Sing", "Dig"),
    ),
    (
        "Rowing",
        "Four people sit in a narrow boat.",
        "they",
        ("pull the oars together", "stand on the oars", "drive off"),
    ),
    (
        "Caf\u00e9 work",
        "The barista isn't looking; the milk \u2014 too hot \u2014 boils.",
        "she",
        ("lifts the jug", "naps", "hums"),
    ),
    ("Chess", "Two girls  play in a park.", "one of them", ("moves a knight", "eats a knight", "calls the knight")),
)
PLACES = ("", " It is raining.", " [step] Nobody else is there.", " A dog watches.", " Music plays [laughs] nearby.")
LATER = (" and smiles.", ", then waits for a while, as before.")


def hellaswag_items() -> list[dict[str, Any]]:
    """The items; the right ending is at each place in turn."""
    items = []
    for index, (place, later, activity) in enumerate(product(PLACES, LATER, ACTIVITIES)):
        label, context, who, endings = activity
        told = [endings[0] + later * (index % 3 > 0), *(ending + later for ending in endings[1:])]
        told.append(f"[substeps] goes home{later[:5]}, 12 o'clock. [title] Done.")
        items.append(
            {
                "ind": index,
                "activity_label": label,
                "ctx_a": context + place,
                "ctx_b": who,
                "endings": told[index % 4 :] + told[: index % 4],
                "label": str(-index % 4) if index % 2 else -index % 4,  # the hub's file has text, the authors' numbers
            }
        )
    return items


def write_items(path: Path) -> Path:
    """The items as a line of JSON each."""
    path.write_text("".join(json.dumps(item) + "\n" for item in hellaswag_items()), "utf-8")
    return path
