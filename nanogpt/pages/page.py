"""Pages made from templates: everything that comes from a run is escaped, and a page cannot use the network.

The content security policy of a page names its scripts by their hash and allows nothing from elsewhere: even what
an escape might have missed cannot run or be fetched.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from nanogpt import __version__
from nanogpt.errors import RunError
from nanogpt.terminal import printable

PLOTLY_NAME = "plotly.min.js"


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("nanogpt.pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable("" if value is None else str(value)),
    )


def render(template: str, *, figures: Any = None, plotly: str | None = None, **values: Any) -> str:
    """The page of `template`, a file of nanogpt/pages/templates, with `values` in it, escaped.

    Args:
        template: for example report.html.
        figures: what charts.js draws, as data that JSON can hold; None: there are no charts.
        plotly: address of plotly.min.js, relative to the page; None puts it into the page.
        values: names that the template knows.

    Raises RunError if plotly is not installed.
    """
    scripts = [] if figures is None else [_text("charts.js")]
    if figures is not None and plotly is None:
        scripts.insert(0, plotly_source())
    allowed = [f"'sha256-{_sha256_base64(script)}'" for script in scripts]
    if plotly is not None:
        allowed.append("'self'")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    if scripts:
        policy += f"; script-src {' '.join(allowed)}"
    return (
        _environment()
        .get_template(template)
        .render(
            policy=policy,
            style=Markup(_text("style.css")),
            scripts=[Markup(script) for script in scripts],
            plotly=plotly,
            figures=Markup(script_json(figures)),
            version=__version__,
            **values,
        )
    )


def _sha256_base64(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def script_json(data: Any) -> str:
    """JSON that is safe in a <script> element: nothing in it ends the element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@functools.cache
def plotly_source() -> str:
    """plotly.js from the package plotly. Raises RunError if that is not installed."""
    try:
        path = Path(str(metadata.distribution("plotly").locate_file(f"plotly/package_data/{PLOTLY_NAME}")))
        return path.read_text("utf-8")
    except (metadata.PackageNotFoundError, OSError) as error:
        raise RunError(
            f"the package plotly, which draws the curves, is not installed here ({error}); install what pyproject.toml"
            " names, or use an image built from this commit"
        ) from error


def _text(name: str) -> str:
    return (resources.files("nanogpt.pages") / "templates" / name).read_text("utf-8")
