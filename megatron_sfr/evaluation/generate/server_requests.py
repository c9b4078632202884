"""Requests to an HTTP server that answers in JSON: retries with backoff, one-line errors, several requests in order.

Standard library only. A key is sent to the given URL alone: redirects are not followed.
"""

import queue
import random
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException, InvalidURL
from itertools import islice
from json import dumps
from typing import Any
from urllib.parse import urlsplit

from megatron_sfr.storage.user_files import cut, parse_json

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds; the wait doubles with each attempt
RETRIED = (408, 425, 429)  # and all from 500: the request may be right, but not now
AHEAD = 4  # tasks per worker that may be done before their turn
LOCAL = ("localhost", "127.0.0.1", "::1")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """A redirect would take the key to another server."""


@dataclass(frozen=True)
class Connection:
    """How a server is reached.

    Example:
        >>> from megatron_sfr.evaluation.generate.server_requests import Connection
        >>> Connection("http://localhost:8000/v1/").url
        'http://localhost:8000/v1'
    """

    url: str
    """The part of the address that all requests share, such as http://localhost:8000/v1."""
    key: str | None = field(default=None, repr=False)
    """Sent as a bearer token. It is in no message and no file."""
    timeout: float = 600.0
    """Seconds to wait for an answer."""
    retries: int = 6
    """How often a request is repeated after 429, 5xx, a lost connection or a damaged answer."""
    stopped: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)
    """Set when the caller gives up, which ends all waiting."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", self.url.rstrip("/"))
        parts = urlsplit(self.url)
        try:
            port = parts.port
        except ValueError:
            port = 0
        if port == 0 or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--server {cut(self.url)} is not a URL; write it as http://localhost:8000/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                f"--server {parts.scheme}://{parts.hostname}...: give the address alone; a key belongs into an "
                "environment variable"
            )
        if not self.timeout > 0 or self.retries < 0:
            raise ValueError(f"timeout is {self.timeout:g}, retries is {self.retries}: above 0, and at least 0")
        if self.key and not (self.key.isascii() and self.key.isprintable()):
            raise ValueError("the server's key has characters that no header can hold; check the environment variable")

    def ask[T](self, path: str, body: object, parse: Callable[[Any], T]) -> T:
        """`parse` of the JSON that answers a request: POST with a body, GET for None.

        Raises:
            ValueError: `URL: status (what the server says); hint`, at once or after the last attempt. A ValueError of
                `parse` counts as a damaged answer.
        """
        url = f"{self.url}/{path}"
        for attempt in range(self.retries + 1):
            try:
                return parse(parse_json(self._send(url, body)))
            except urllib.error.HTTPError as error:
                found, asked_to_wait = self._status(error), error.headers.get("Retry-After", "")
                if error.code not in RETRIED and error.code < 500:
                    raise ValueError(f"{url}: {found}; {_hint(error.code)}") from error
            except (OSError, HTTPException, ValueError) as error:
                if _is_final(error):
                    raise ValueError(f"{url}: {self._reason(error)}; check --server") from error
                found, asked_to_wait = self._reason(error), ""
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.75, 1.25)
            if attempt < self.retries and self.stopped.wait(max(wait, _seconds(asked_to_wait))):
                break
        raise ValueError(
            f"{url}: {found}, after {attempt + 1} attempts; the same command resumes when the server is back"
        )

    def _send(self, url: str, body: object) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "megatron-sfr"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else dumps(body).encode()
        handlers: list[Any] = [_NoRedirect]
        if urlsplit(url).hostname in LOCAL:
            handlers.append(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(url, data, headers)
        with urllib.request.build_opener(*handlers).open(request, timeout=self.timeout) as response:
            return response.read()

    def _status(self, error: urllib.error.HTTPError) -> str:
        """The status with the message of the server, without the key."""
        try:
            text = error.read(1 << 16).decode(errors="replace")
        except (OSError, HTTPException):  # the connection ended within the message
            text = ""
        return f"{error.code} {error.reason}{self._message(text)}"

    def _message(self, text: str) -> str:
        try:
            content = parse_json(text)
        except ValueError:
            content = text
        for name in ("error", "message", "detail"):  # {"error": {"message": ...}}, {"error": ...}, {"detail": ...}
            content = content.get(name, content) if isinstance(content, dict) else content
        said = str(content).replace(self.key, "***") if self.key else str(content)
        return f" ({cut(said, 200)})" if said.strip() else ""

    def _reason(self, error: Exception) -> str:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            return f"no answer in {self.timeout:g} s"
        said = str(cause).replace(self.key, "***") if self.key else str(cause)
        return cut(said, 200) or type(cause).__name__


def ordered[T, R](tasks: Sequence[T], work: Callable[[T], R], workers: int) -> Iterator[R]:
    """Yields work(task) in the order of the tasks, of which `workers` run at a time.

    The threads are daemons: Ctrl-C and errors end the program without waiting for answers.
    """
    waiting: queue.SimpleQueue[tuple[Future[R], T] | None] = queue.SimpleQueue()

    def run() -> None:
        while (item := waiting.get()) is not None:
            future, task = item
            try:
                future.set_result(work(task))
            except BaseException as error:  # handed to the thread that waits for the result
                future.set_exception(error)

    pending: deque[Future[R]] = deque()
    rest = iter(tasks)

    def submit(count: int) -> None:
        for task in islice(rest, count):
            pending.append(Future())
            waiting.put((pending[-1], task))

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(workers, len(tasks)))]
    for thread in threads:
        thread.start()
    submit(workers * AHEAD)
    try:
        while pending:
            found = pending.popleft().result()
            submit(1)
            yield found
    finally:
        with suppress(queue.Empty):
            while True:  # tasks that have not begun
                waiting.get_nowait()
        for _ in threads:
            waiting.put(None)


def _is_final(error: Exception) -> bool:
    """Whether no repetition can help: an unknown host, a certificate that is not trusted."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return isinstance(cause, ssl.SSLCertVerificationError | InvalidURL) or (
        isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME
    )


def _seconds(retry_after: str) -> float:
    """The seconds of a Retry-After header, at most a minute; 0 for a date, whose clock may differ."""
    return min(LONGEST_WAIT, float(retry_after)) if retry_after.strip().isdecimal() else 0.0


def _hint(status: int) -> str:
    if status in (401, 403):
        return "set OPENAI_API_KEY, or name the variable that holds the key with --server-key-env"
    if status == 404:
        return "is the model's name right (--server-model), and does the URL end on /v1?"
    if 300 <= status < 400:
        return "redirects are not followed: give the final address"
    return "correct the option that the server names; --server-args '{\"seed\": null}' leaves a field out"
