"""A small OpenAI-compatible server on the loopback interface, whose replies are a function of the request."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = int | str | None
"""What happens to a request: a status, `hang`, `cut` (the connection ends within the answer), `damaged` (not JSON) or
`moved`. None: a right answer."""


class ChatServer(ThreadingHTTPServer):
    """Records the requests. The next one suffers the first fault of `faults`, if there are any."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.faults: list[Fault] = []
        self.always: Fault = None
        """The fault of all requests when `faults` is empty."""
        self.most_choices = 100
        self.requests: list[tuple[str, dict[str, Any], str | None]] = []
        """(path, body, authorization) in order of arrival."""
        self.form: Callable[[str, str], str] = lambda asked, text: text
        """What is sent, of the last turn and the text that names the request."""
        self.offered = ["only/model"]
        self.ended = threading.Event()
        """Set: requests that hang are answered."""
        self.lock = threading.Lock()
        self.running = self.most_running = 0

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is part of the tests."""

    def bodies(self) -> list[dict[str, Any]]:
        return [body for _, body, _ in self.requests]


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.offered]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append((self.path, body, self.headers["Authorization"]))
            fault = server.faults.pop(0) if server.faults else server.always
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        try:
            self._answer(fault, body)
        finally:
            with server.lock:
                server.running -= 1

    def _answer(self, fault: Fault, body: dict[str, Any]) -> None:
        if fault == "hang":
            self.server.ended.wait()
        elif isinstance(fault, int):
            key = self.headers["Authorization"]
            return self._send(fault, {"error": {"message": f"not today, {key}"}}, {"Retry-After": "0"})
        elif fault == "moved":
            return self._send(307, {}, {"Location": f"{self.server.url}/elsewhere"})
        content = answer(self.path, body, self.server)
        if fault == "damaged":
            return self._send(200, content, keep=0.5)
        if fault == "cut":
            return self._send(200, content, keep=0.5, promise=1.0)
        return self._send(200, content)

    def _send(
        self,
        status: int,
        content: object,
        headers: dict[str, str] | None = None,
        keep: float = 1.0,
        promise: float | None = None,
    ) -> None:
        """Sends the first `keep` of the content; Content-Length says `promise`."""
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(int(len(data) * (keep if promise is None else promise))))
        self.end_headers()
        self.wfile.write(data[: int(len(data) * keep)])


def answer(path: str, body: dict[str, Any], server: ChatServer) -> dict[str, Any]:
    """Each choice names what it answers: model, last turn, temperature and seed."""
    asked = body["messages"][-1]["content"] if path.endswith("chat/completions") else body["prompt"]
    choices: list[dict[str, Any]] = []
    for i in range(min(body.get("n", 1), server.most_choices)):
        text = f"{body['model']}: {asked} {body.get('temperature')} {body.get('seed')}+{i}"
        text = server.form(asked, text)
        if path.endswith("chat/completions"):
            choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            if body.get("logprobs"):
                choice["logprobs"] = {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -0.25}]}
        else:
            choice = {"text": text, "finish_reason": "length"}
        choices.append({"index": i, **choice})
    return {"object": "list", "choices": choices, "usage": {"completion_tokens": 7 * len(choices)}}


@contextmanager
def running_server() -> Iterator[ChatServer]:
    """Runs a server in a thread of this process."""
    with ChatServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()
