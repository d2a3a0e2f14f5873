"""A headless Chromium, spoken to over a pipe: pages as a person would see them, and what they ask of the network."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LIMIT_S = 120.0
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="there is no chromium: apt-get install chromium")


class Page:
    """A page of the browser. `problems` has its errors and warnings, `requests` the addresses that it asked for."""

    def __init__(self, send: int, receive: int):
        self._send, self._receive = send, receive
        self._number, self._buffer = 0, b""
        self._session: str | None = None
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the browser answers; what it tells meanwhile is noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self._number:
                assert "error" not in told, told
                return told["result"]
            self._note(told)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._receive, 1 << 20)
            assert part, "the browser has gone away"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def _note(self, told: dict[str, Any]) -> None:
        parameters = told.get("params", {})
        match told["method"]:
            case "Runtime.exceptionThrown":
                self.problems.append(json.dumps(parameters["exceptionDetails"])[:600])
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                self.problems.append(json.dumps(parameters["args"])[:600])
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.problems.append(json.dumps(parameters["entry"])[:600])
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])

    def open(self, page: Path, width: int, scheme: str) -> None:
        """Show the file, `width` CSS pixels wide in the `scheme` light or dark, to where its charts are drawn."""
        self.problems.clear()
        self.requests.clear()
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=page.absolute().as_uri())
        drawn = "(!document.getElementById('figures') || !!document.documentElement.dataset.drawn)"
        self.wait_for(f"document.readyState === 'complete' && {drawn}")

    def wait_for(self, expression: str, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Until the JavaScript is true; `meanwhile` is called before each look.

        Raises AssertionError with what went wrong in the page.
        """
        until = time.monotonic() + LIMIT_S
        while True:
            meanwhile()
            if self.evaluate(expression):
                return
            assert time.monotonic() < until, (expression, self.problems)
            time.sleep(0.05)

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def chromium_page() -> Iterator[Page]:
    """A page of a browser of its own."""
    assert PROGRAM is not None
    to_browser, to_us = os.pipe(), os.pipe()
    ends = to_browser[0], to_us[1]  # 3 and 4 in the browser
    shell = ["bash", "-c", f'exec "$0" "$@" 3<&{ends[0]} 4>&{ends[1]}', PROGRAM]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, (Path(profile) / "log").open("w") as log:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-background-networking"]
        browser = subprocess.Popen([*shell, *options], pass_fds=ends, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        for end in ends:
            os.close(end)
        try:
            yield Page(to_browser[1], to_us[0])
        finally:
            os.close(to_browser[1])
            browser.kill()
            browser.wait()
            os.close(to_us[0])
