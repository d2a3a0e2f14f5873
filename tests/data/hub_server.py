"""A hub on loopback that serves the shards of kjj0/fineweb10B-gpt2, and misbehaves where a test asks it to.

As the real one: HEAD and GET of `/datasets/OWNER/NAME/resolve/REVISION/FILE` redirect to another origin (the "CDN",
here `localhost` instead of `127.0.0.1`) and carry X-Linked-Etag (the sha256), X-Linked-Size and X-Repo-Commit; the CDN
knows Range.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from nanogpt.data.shards import header_bytes, train_name, val_name

COMMIT = "c0ffee" * 6 + "c0ff"


def shard_bytes(seed: int, tokens: int = 50_000) -> bytes:
    """A whole shard of random tokens."""
    body = np.random.default_rng(seed).integers(0, 50257, tokens, dtype=np.uint16).astype("<u2")
    return header_bytes(tokens) + body.tobytes()


@dataclass
class Fault:
    """What one request gets instead of, or on top of, its answer.

    status: answer with this status and `headers`. drop_after: send so many bytes of the body and drop the connection
    (with `whole_length` off, Content-Length is cut too, so that the body looks complete). pause_after: send so many
    bytes, then wait for `Hub.release` before the rest. body: serve these bytes instead. ignore_range: answer 200 from
    the beginning. before: called before the answer.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    whole_length: bool = True
    pause_after: int | None = None
    body: bytes | None = None
    ignore_range: bool = False
    before: Callable[[], None] | None = None


@dataclass
class Seen:
    """One request as it arrived, and how many bytes of body it was sent."""

    method: str
    name: str
    revision: str  # empty for the CDN
    range: str | None
    authorization: str | None
    at: float
    sent: int = 0


class HubServer:
    """Starts on a free port; `endpoint` goes into HF_ENDPOINT. A context manager."""

    def __init__(
        self, shards: int = 3, tokens: int = 50_000, *, repository: str = "kjj0/fineweb10B-gpt2", stem: str = "fineweb"
    ) -> None:
        self.prefix = f"/datasets/{repository}/resolve/"
        self.files = {val_name(0, stem): shard_bytes(0, tokens)}
        self.files |= {train_name(index, stem): shard_bytes(index, tokens) for index in range(1, shards + 1)}
        self.sizes: dict[str, int] = {}  # announced instead of the true ones
        self.digests: dict[str, str] = {}
        self.seen: list[Seen] = []
        self.release = threading.Event()
        self._faults: dict[tuple[str, str], deque[Fault]] = defaultdict(deque)
        self._always: dict[tuple[str, str], Fault] = {}
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    def fault(self, method: str, name: str, *faults: Fault) -> None:
        """The next requests of this method for this file meet these faults, one each. GET means the CDN's."""
        self._faults[method, name].extend(faults)

    def always(self, method: str, name: str, fault: Fault) -> None:
        """Every request of this method for this file meets the fault."""
        self._always[method, name] = fault

    def next_fault(self, method: str, name: str) -> Fault:
        with self._lock:
            queue = self._faults[method, name]
            return queue.popleft() if queue else self._always.get((method, name), Fault())

    def gets(self, name: str) -> list[Seen]:
        """The CDN's GET requests for a file, in order."""
        return [one for one in self.seen if one.method == "GET" and one.name == name and not one.revision]

    def announced(self, name: str) -> tuple[str, int]:
        data = self.files[name]
        return self.digests.get(name, hashlib.sha256(data).hexdigest()), self.sizes.get(name, len(data))


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        on_cdn = self.path.startswith("/cdn/")
        if not on_cdn and not self.path.startswith(self.hub.prefix):
            return self._plain(404, {"X-Error-Code": "RepoNotFound"})
        revision, name = ("", self.path[5:]) if on_cdn else self.path[len(self.hub.prefix) :].split("/", 1)
        headers = self.headers
        seen = Seen(self.command, name, revision, headers["Range"], headers["Authorization"], time.monotonic())
        self.hub.seen.append(seen)
        fault = self.hub.next_fault(self.command, name) if on_cdn or self.command == "HEAD" else Fault()
        if fault.before:
            fault.before()
        if fault.status is not None:
            return self._plain(fault.status, fault.headers)
        if name not in self.hub.files:
            return self._plain(404, {"X-Error-Code": "EntryNotFound"})
        if on_cdn:
            return self._body(seen, fault)
        digest, size = self.hub.announced(name)
        return self._plain(
            302,
            {
                "Location": f"http://localhost:{self.hub.port}/cdn/{name}",
                "X-Linked-Etag": f'"{digest}"',
                "X-Linked-Size": str(size),
                "X-Repo-Commit": COMMIT,
                "X-Xet-Hash": "ab" * 32,
            },
        )

    def _plain(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _body(self, seen: Seen, fault: Fault) -> None:
        data = self.hub.files[seen.name] if fault.body is None else fault.body
        start = 0
        if seen.range and not fault.ignore_range:
            start = int(seen.range.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                return self._plain(416, {"Content-Range": f"bytes */{len(data)}"})
        rest = data[start:]
        cut = rest if fault.drop_after is None else rest[: fault.drop_after]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(rest if fault.whole_length else cut)))
        self.end_headers()
        try:
            pause = len(cut) if fault.pause_after is None else fault.pause_after
            self.wfile.write(cut[:pause])
            self.wfile.flush()
            seen.sent = min(pause, len(cut))
            if fault.pause_after is not None:
                self.hub.release.wait(60)
                self.wfile.write(cut[pause:])
                seen.sent = len(cut)
        except OSError:
            pass
        if fault.drop_after is not None:
            self.close_connection = True
        return None
