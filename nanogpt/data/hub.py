"""Files of a hub data set over HTTP: their size and checksum, and downloads that survive interruption.

huggingface_hub handles names, addresses, tokens, redirects and the hub's headers (HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE, HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT work as usual). The transfer is our own, because
`hf_hub_download` starts from zero after an interruption: since 1.18 it writes to a file that only one process knows
and removes it on failure. Its xet transfer fills a file in no fixed order, so a partial one cannot be continued either,
and has its own retries, which take minutes. The same hub serves the same files over plain HTTP with Range.
"""

from __future__ import annotations

import importlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from nanogpt import __version__
from nanogpt.console import human_bytes, say
from nanogpt.data.manifest import SHA256
from nanogpt.data.surroundings import check_surroundings, check_token, is_private_way
from nanogpt.data.workers import FatalError, Stop, Stopped
from nanogpt.errors import InputError, RunError

RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})
LONGEST_WAIT_S = 300  # the hub counts requests in windows of five minutes
LONGEST_BACKOFF_S = 30

Report = Callable[[int], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file of a data set as the hub describes it."""

    name: str
    bytes: int
    sha256: str
    revision: str


class Hub:
    """The files of one hub data set.

    Args:
        repository: `owner/name` of the data set.
        retries: how many times in a row a request that brought nothing is repeated.
        stop: ends waits and transfers early.
        advice: what to do without a network; the last sentence of that error.

    Raises:
        InputError: an environment variable that no download can work with, or a token that would be open to
            others on its way.
    """

    def __init__(self, repository: str, *, retries: int, stop: Stop, advice: str) -> None:
        check_surroundings()
        endpoint = os.environ.get("HF_ENDPOINT")
        # Imported here and not above: the help text and a complete directory need no HTTP client.
        try:
            import huggingface_hub
            from huggingface_hub import constants, errors, utils

            session = utils.get_session()
        except (ImportError, ValueError, OSError) as error:
            raise InputError(
                f"the HTTP client cannot be set up: {type(error).__name__}: {error}. Look at the variables HF_*,"
                " *_PROXY and SSL_CERT_*, and unset what you do not need"
            ) from error

        self.repository = repository
        self.retries = retries
        self.stop = stop
        self.advice = advice
        self.endpoint: str = endpoint.rstrip("/") if endpoint else constants.ENDPOINT
        self._constants = constants
        self._hub = huggingface_hub
        self._utils = utils
        self._status_error: type[Exception] = errors.HfHubHTTPError
        # None: the library's choice, which was checked above; False: none, where others could read it.
        check_token(constants.HF_TOKEN_PATH, self.endpoint, implicit=not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN)
        self._token = None if is_private_way(self.endpoint) else False
        # huggingface_hub 1.x is built on httpx, 2.x on httpx2: the session shows which.
        http = importlib.import_module(type(session).__module__.partition(".")[0])
        self._transport_errors: tuple[type[Exception], ...] = (http.RequestError, http.InvalidURL)
        self._passing_errors = (self._status_error, *self._transport_errors)

    def first_contact(self, name: str, revision: str) -> RemoteFile:
        """`describe`, but a hub that cannot be reached is an error within seconds, without retries.

        The thread bounds what the client's timeouts do not: the name look-up, and one connection attempt after the
        other where the hub has many addresses and a firewall swallows packets to all of them.

        Raises:
            RunError: no network, HF_HUB_OFFLINE is set, or the hub refuses.
        """
        if self._constants.HF_HUB_OFFLINE:
            raise RunError(f"HF_HUB_OFFLINE is set, so {self.endpoint} is not asked. {self.advice}")
        limit = float(self._constants.HF_HUB_ETAG_TIMEOUT)
        failures = 0
        while True:
            box: SimpleQueue[RemoteFile | Exception] = SimpleQueue()

            def ask(box: SimpleQueue[RemoteFile | Exception] = box) -> None:
                try:
                    box.put(self._ask(name, revision))
                except Exception as error:
                    box.put(error)

            threading.Thread(target=ask, daemon=True).start()
            deadline = time.monotonic() + limit + 0.5
            answer: RemoteFile | Exception | None = None
            while answer is None and time.monotonic() < deadline:
                self.stop.raise_if_signalled()
                with suppress(Empty):
                    answer = box.get(timeout=0.1)
            if isinstance(answer, RemoteFile):
                return answer
            if answer is None or isinstance(answer, self._transport_errors):
                problem = answer or f"no answer within {limit:.0f} s"
                raise RunError(f"cannot reach {self.endpoint}: {problem}. {self.advice}")
            if not isinstance(answer, self._status_error):
                raise answer
            failures += 1
            try:
                self._pause(name, answer, failures)
            except Stopped:
                self.stop.raise_if_signalled()
                raise

    def describe(self, name: str, revision: str) -> RemoteFile:
        """Size and sha256 of a file at `revision`, by one HEAD request (tried again after transient errors)."""
        failures = 0
        while True:
            self.stop.check()
            try:
                return self._ask(name, revision)
            except self._passing_errors as error:
                failures += 1
                self._pause(name, error, failures)

    def fetch(self, file: RemoteFile, partial: Path, report: Report) -> None:
        """Complete `partial`, from the bytes it has, to the file's length; nothing is verified here.

        Bytes are written at their own offset, and a useless partial file is replaced by a new one, never
        shortened: where a file system's locks do not work between nodes, two processes may write to one partial file,
        and both write the same bytes to the same place.

        Args:
            file: what to fetch.
            partial: where to; kept on every error.
            report: called with the number of bytes that `partial` has; may go down.

        Raises:
            RunError: the hub refuses, or `retries` attempts in a row brought nothing.
            FatalError: the disk is full or the partial file cannot be written, or HF_TOKEN is not accepted.
        """
        failures = 0
        while True:
            have = _length(partial)
            if have > file.bytes:
                _discard(partial)
                have = 0
            report(have)
            if have == file.bytes:
                return
            problem: Exception
            try:
                if self._transfer(file, partial, have, report) == file.bytes:
                    return
                problem = ConnectionError("the connection ended before the file did")
            except self._passing_errors as error:
                problem = error
                if have and _status(error) == 416:
                    _discard(partial)
            now = _length(partial)
            failures = 1 if now > have else failures + 1
            kept = f" ({human_bytes(now)} of {human_bytes(file.bytes)} are kept)" if now else ""
            self._pause(file.name, problem, failures, kept)

    def _ask(self, name: str, revision: str) -> RemoteFile:
        """One HEAD request. The hub answers with the LFS object's sha256 and size in X-Linked-Etag and -Size."""
        found = self._hub.get_hf_file_metadata(
            self._address(name, revision),
            timeout=self._constants.HF_HUB_ETAG_TIMEOUT,
            endpoint=self.endpoint,
            token=self._token,
            library_name="nanogpt-speedrun",
            library_version=__version__,
        )
        if found.size is None or found.etag is None or not SHA256.fullmatch(found.etag):
            raise RunError(
                f"{name}: {self.endpoint} gave no size and sha256 for this file (found size {found.size}, "
                f"checksum {found.etag!r}): is HF_ENDPOINT a full mirror of the hub?"
            )
        return RemoteFile(name, found.size, found.etag, found.commit_hash or revision)

    def _transfer(self, file: RemoteFile, partial: Path, have: int, report: Report) -> int:
        """One GET request from byte `have` on, written to `partial` as it arrives; the byte it ended before."""
        headers = self._utils.build_hf_headers(
            token=self._token, library_name="nanogpt-speedrun", library_version=__version__
        )
        headers["Accept-Encoding"] = "identity"
        if have:
            headers["Range"] = f"bytes={have}-"
        # The hub's own address every time, not the redirect's target, which is signed and expires.
        with self._utils.get_session().stream(
            "GET",
            self._address(file.name, file.revision),
            headers=headers,
            timeout=self._constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects=True,
        ) as response:
            self._utils.hf_raise_for_status(response)
            if have and not _continues(response, have):
                _discard(partial)
                have = 0
                report(0)
            with disk_errors(partial):
                descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                for received in response.iter_raw():
                    self.stop.check()
                    block = received[: file.bytes - have]
                    with disk_errors(partial):
                        _write(descriptor, block, have)
                    have += len(block)
                    report(have)
                    if have == file.bytes:
                        break
            finally:
                # Network file systems report a full disk or quota only now.
                with disk_errors(partial):
                    try:
                        if have == file.bytes:
                            os.fsync(descriptor)
                    finally:
                        os.close(descriptor)
        return have

    def _address(self, name: str, revision: str) -> str:
        return self._hub.hf_hub_url(
            self.repository, name, repo_type="dataset", revision=revision, endpoint=self.endpoint
        )

    def _pause(self, name: str, error: Exception, failures: int, kept: str = "") -> None:
        """Wait before the next attempt after `failures` in a row, or raise if there are no more."""
        status = _status(error)
        if status is not None and status not in RETRIED_STATUS and status != 416:
            raise self._refusal(name, status, error) from error
        what = f"the hub answered {status}" if status is not None else str(error) or type(error).__name__
        if failures > self.retries:
            raise RunError(
                f"{name}: {what}, {failures} times in a row{kept}. Run the same command again later; "
                "it continues from there"
            ) from error
        asked = _retry_after(error)
        if asked is not None and asked > LONGEST_WAIT_S:
            raise RunError(
                f"{name}: {what} and asks to wait {asked:.0f} s{kept}. Run the same command again after that; "
                "a token in HF_TOKEN raises the hub's limits"
            ) from error
        seconds = min(0.5 * 2.0 ** (failures - 1), LONGEST_BACKOFF_S) if asked is None else asked
        say(f"{name}: {what}{kept}; next attempt in {seconds:.3g} s ({failures} of {self.retries} retries)")
        self.stop.wait(seconds)

    def _refusal(self, name: str, status: int, error: Exception) -> RunError:
        where = f"the hub data set {self.repository} at {self.endpoint}"
        if status == 404:
            what = "there is no such data set" if "Repository" in type(error).__name__ else "no such file"
            return RunError(f"{name}: not found in {where}: {what} (404). Is HF_ENDPOINT the hub or a full mirror?")
        if status in (401, 403):
            return FatalError(
                f"{name}: {where} refuses access ({status}). The data set is public: unset HF_TOKEN if it has expired "
                "(or `hf auth logout`), or set it to a valid token if your mirror needs one"
            )
        return RunError(f"{name}: {where} answered {status}: {error}")


def _continues(response: Any, have: int) -> bool:
    """Whether the body begins at byte `have` (a server may ignore Range and send the file from its beginning)."""
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return response.status_code == 206 and found is not None and int(found.group(1)) == have


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _retry_after(error: Exception) -> float | None:
    """Seconds that the answer asks us to wait: Retry-After (seconds or a date), or the hub's RateLimit header."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    if value:
        with suppress(ValueError):
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    limit = re.search(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("RateLimit", ""))
    return float(limit.group(1)) if limit else None


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _discard(partial: Path) -> None:
    with disk_errors(partial):
        partial.unlink(missing_ok=True)


def _write(descriptor: int, block: bytes, offset: int) -> None:
    view = memoryview(block)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a file system's error into one that ends the download and says what to do."""
    try:
        yield
    except OSError as error:
        raise FatalError(
            f"{path}: cannot be written: {error.strerror}. What has arrived is kept; free some space or quota and run "
            "the same command again, or point elsewhere with --dir or NANOGPT_DATA"
        ) from error
