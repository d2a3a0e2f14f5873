"""The Python file that goes with a record model, for transformers' `trust_remote_code`."""

from __future__ import annotations

import ast
import importlib.util
import zlib
from base64 import b85encode
from pathlib import Path

import numpy as np

from nanogpt import __version__
from nanogpt.data.token_classes import token_classes
from nanogpt.export.bundle import Bundle
from nanogpt.layers.rotary import Rotary
from nanogpt.models import MODELS
from nanogpt.models.model_spec import BaseModelSpec
from nanogpt.registry import built_class

FILE = "modeling_nanogpt.py"
WRAPPER = "nanogpt.export.wrapper"
CLASSES = {"AutoConfig": "NanogptConfig", "AutoModelForCausalLM": "NanogptForCausalLM"}


def modeling_code(spec: BaseModelSpec) -> str:
    """The code of the spec's model, whole: it needs torch, NumPy and transformers, and nothing of this package.

    Raises ValueError if the model's code names something that a single file cannot have; see `Bundle`.
    """
    kind, spec_class = built_class(MODELS, spec), type(spec)
    source = Path(importlib.util.find_spec(WRAPPER).origin).read_text("utf-8")  # type: ignore[union-attr, arg-type]
    body = ast.parse(source).body
    bundle = Bundle({"token_classes": _classes_code(used=spec.token_classes_field is not None)})
    wrapper, imports = [], []
    for node in body:
        text = ast.get_source_segment(source, node) or ""
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nanogpt."):
            for alias in node.names:
                bundle.add(node.module, alias.name)
        elif isinstance(node, ast.Import | ast.ImportFrom) and "__future__" not in text:
            imports.append(text)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            wrapper.append(text)
    bundle.add_methods(Rotary, ("forward", "_fill_tables"), base="nn.Module")
    bundle.add_class(kind, ("forward", "hidden"), base="nn.Module")
    bundle.add_class(spec_class, ("attention_layers", "batch_extras"))
    head = (
        f'"""{kind.__name__} of nanogpt-speedrun {__version__}, for Hugging Face transformers. MIT licence.\n\n'
        "Made by `nanogpt export` from that package's own definitions; edit those, not this file.\n"
        '"""\n\nfrom __future__ import annotations'
    )
    names = f"MODEL = {kind.__name__}\nSPEC = {spec_class.__name__}\nROTARY = Rotary"
    return "\n\n\n".join([head, bundle.text(imports).rstrip(), names, *wrapper]) + "\n"


def _classes_code(*, used: bool) -> str:
    """`token_classes` as a function that has the table packed, 60 kB; nothing in it for models that do not use it."""
    classes = token_classes()
    steps = classes - np.arange(classes.size, dtype=np.uint16)  # modulo 2^16; mostly 0, so that it packs well
    packed = b85encode(zlib.compress(steps.astype("<u2").tobytes() if used else b"", 9)).decode()
    return (
        "def token_classes():\n"
        '    """(65536,) the class of each of GPT-2\'s tokens."""\n'
        "    import base64, zlib\n\n"
        f'    steps = np.frombuffer(zlib.decompress(base64.b85decode("{packed}")), dtype="<u2")\n'
        "    return (steps + np.arange(steps.size)).astype(np.uint16)"
    )
