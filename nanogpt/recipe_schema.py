"""JSON Schema of recipes, for editors, and of resolved specs."""

from __future__ import annotations

import json
from typing import Any

from nanogpt.spec import RunSpec


def recipe_schema(*, resolved: bool = False) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file, for editors, or of a resolved `RunSpec`.

    In a recipe nothing is required, as it may inherit, except in the entries of a list, which replaces the base's list
    completely; and there is `base`. A part with several possible kinds need not say which: `oneOf` would refuse what
    fits several, so it becomes `anyOf`.
    """
    schema = RunSpec.model_json_schema()
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    if resolved:
        return {**dialect, **schema}
    required = {f"#/$defs/{name}": part.get("required", []) for name, part in schema["$defs"].items()}

    def relax(node: Any) -> None:
        if isinstance(node, list):
            for child in node:
                relax(child)
        if not isinstance(node, dict):
            return
        if isinstance(node.get("title"), str):
            del node["title"]
        if isinstance(node.get("required"), list):
            del node["required"]
        if isinstance(node.get("oneOf"), list):
            node["anyOf"] = node.pop("oneOf")
            node.pop("discriminator", None)
        for child in node.values():
            relax(child)
        items = node.get("items", {})
        if items.get("$ref") in required:
            items["required"] = required[items["$ref"]]

    relax(schema)
    schema["properties"] = {
        "base": {"type": "string", "description": "recipe to inherit from: a path relative to this file"},
        **schema["properties"],
    }
    return {**dialect, "title": "NanoGPT speedrun recipe", **schema}


def schema_text(*, resolved: bool = False) -> str:
    """`recipe_schema` as JSON text; without `resolved` that of recipes/schema.json."""
    return json.dumps(recipe_schema(resolved=resolved), indent=1) + "\n"
