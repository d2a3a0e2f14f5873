"""One Python file made of this package's own definitions: what is exported cannot differ from what was trained.

Starting from a few roots, everything that they name in the package is written once, in an order that Python can
execute. A class with bases keeps only those methods that something names. Kernels that `nanogpt.export.plain`
has under the same name are replaced by its version, and names that the caller gives by his text; torch and other
libraries stay imports.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from types import ModuleType
from typing import Any

PLAIN = "nanogpt.export.plain"
KERNELS = "nanogpt.kernels."


class _Module:
    """A module's source: what its names stand for."""

    def __init__(self, module: ModuleType):
        self.name = module.__name__
        self.source = inspect.getsource(module)
        self.definitions: dict[str, ast.stmt] = {}
        self.imports: dict[str, tuple[str, str | None]] = {}  # local name -> module, and the name in it
        for node in ast.parse(self.source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.definitions[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
                self.definitions |= dict.fromkeys(names, node)
            elif isinstance(node, ast.Import):
                self.imports |= {alias.asname or alias.name: (alias.name, None) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                self.imports |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}

    def text(self, node: ast.stmt) -> str:
        """The node's source as it is, with its decorators and without its imports from this package."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        lines = dict(enumerate(self.source.splitlines()[first - 1 : node.end_lineno], start=first))
        for line in own_imports(node):
            for number in range(line.lineno, (line.end_lineno or line.lineno) + 1):
                del lines[number]
        return "\n".join(lines.values())


@cache
def _module(name: str) -> _Module:
    return _Module(sys.modules.get(name) or importlib.import_module(name))


class Bundle:
    """Collects definitions; `text` is the file's body, imports first."""

    def __init__(self, given: Mapping[str, str] | None = None) -> None:
        """given: definitions to write instead of the package's, by name; they name nothing but builtins."""
        self._given = given or {}
        self._imports: set[str] = set()
        self._written: dict[str, str] = {}  # name -> module
        self._parts: list[str] = []
        self._attributes: set[str] = set()  # every one that is read anywhere
        self._types: set[str] = set()  # named in annotations

    def add(self, module: str, name: str) -> None:
        """Add what `name` of `module` stands for, after everything that it names itself.

        Raises ValueError for two definitions of one name, or for one that cannot leave the package.
        """
        if name in self._given:
            if name not in self._written:
                self._written[name] = module
                self._parts.append(self._given[name])
            return
        place = _module(PLAIN) if module.startswith(KERNELS) and name in _module(PLAIN).definitions else _module(module)
        if name not in place.definitions:
            source, original = place.imports.get(name, (None, None))
            if source is None:
                return  # a builtin, or a local variable
            if not source.startswith("nanogpt."):
                self._imports.add(_import_line(name, source, original))
            elif original == name:
                self.add(source, name)
            else:
                raise ValueError(f"{place.name}: imports {source} as {name}, which a bundle cannot follow")
            return
        if name in self._written:
            if self._written[name] != place.name:
                raise ValueError(f"{name} is defined in {self._written[name]} and in {place.name}")
            return
        self._written[name] = place.name
        node = place.definitions[name]
        for other, definition in place.definitions.items():  # one assignment may define several
            if definition is node:
                self._written[other] = place.name
        self._follow(place, node)
        self._parts.append(place.text(node))

    def add_class(self, kind: type[Any], roots: Iterable[str], *, base: str = "") -> None:
        """Add a class and its bases within the package, with the methods `roots` and those that are named elsewhere.

        base: that of the topmost class, as Python text. Fields, and everything else that is not a method, are left out.
        """
        line = [one for one in kind.__mro__ if one.__module__.startswith("nanogpt.models.")]
        taken: set[tuple[type[Any], str]] = set()
        wanted = set(roots)
        while True:
            new = [
                (one, node)
                for one in line
                for node in _methods(one)
                if node.name in wanted | self._attributes and (one, node.name) not in taken
            ]
            if not new:
                break
            for one, node in new:
                taken.add((one, node.name))
                self._follow(_module(one.__module__), node)
        above = base
        for one in reversed(line):
            place = _module(one.__module__)
            methods = [place.text(node) for node in _methods(one) if (one, node.name) in taken]
            if not methods and one is not kind:
                continue
            doc = (inspect.getdoc(one) or "").splitlines()[0]
            head = f"class {one.__name__}{f'({above})' if above else ''}:\n"
            self._parts.append("\n\n".join([f'{head}    """{doc}"""', *methods]))
            self._written[one.__name__] = one.__module__
            above = one.__name__

    def add_methods(self, kind: type[Any], methods: Iterable[str], *, base: str) -> None:
        """Add a layer's class with only these of its methods, on `base`, which is Python text."""
        place = _module(kind.__module__)
        chosen = [node for node in _methods(kind) if node.name in set(methods)]
        for node in chosen:
            self._follow(place, node)
        self._parts.append("\n\n".join([f"class {kind.__name__}({base}):", *map(place.text, chosen)]))
        self._written[kind.__name__] = kind.__module__

    def _follow(self, place: _Module, node: ast.stmt) -> None:
        for line in own_imports(node):
            for alias in line.names:
                self.add(str(line.module), alias.name)
        for part in _nodes(node, annotations=False):
            if isinstance(part, ast.Name):
                self.add(place.name, part.id)
            elif isinstance(part, ast.Attribute):
                self._attributes.add(part.attr)
        annotations = set(_nodes(node)) - set(_nodes(node, annotations=False))
        self._types |= {part.id for part in annotations if isinstance(part, ast.Name)}

    def text(self, imports: Iterable[str] = ()) -> str:
        """Imports, including those given, and definitions. Types that are named only in annotations are Any."""
        lines = sorted({*self._imports, *imports})
        plain = [line for line in lines if line.startswith("import ")]
        chosen = [line for line in lines if not line.startswith("import ")]
        known = {*self._written, *dir(builtins), *(word for line in lines for word in re.findall(r"\w+", line))}
        types = " = ".join([*sorted(self._types - known), "Any  # types of the training code"])
        return "\n\n\n".join(["\n".join([*plain, *chosen]), types, *self._parts]) + "\n"


def _import_line(name: str, source: str, original: str | None) -> str:
    if original is None:
        return f"import {source}" if name == source else f"import {source} as {name}"
    return f"from {source} import {original}" if name == original else f"from {source} import {original} as {name}"


def _methods(kind: type[Any]) -> list[ast.FunctionDef]:
    """The class's own methods and properties."""
    definition = _module(kind.__module__).definitions[kind.__name__]
    assert isinstance(definition, ast.ClassDef)
    return [node for node in definition.body if isinstance(node, ast.FunctionDef)]


def own_imports(node: ast.AST) -> list[ast.ImportFrom]:
    """The imports from this package inside a function."""
    found = [part for part in ast.walk(node) if isinstance(part, ast.ImportFrom)]
    return [part for part in found if str(part.module).startswith("nanogpt.")]


def _nodes(node: ast.AST, *, annotations: bool = True) -> Iterator[ast.AST]:
    """The node and those below it; annotations are only text, by `from __future__ import annotations`."""
    yield node
    for field, value in ast.iter_fields(node):
        if annotations or field not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _nodes(child, annotations=annotations)
