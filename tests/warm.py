"""Runs commands in real processes that are forks of one that has imported torch and Megatron (warm_server.py).

A fresh interpreter needs ten seconds of CPU for those imports, and the tests start hundreds of processes. What a start
itself does is not exercised here: tests that are about torchrun, launchers and signals start them for real. Nor do
changes of PYTHONPATH reach a fork.
"""

import fcntl
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import CompletedProcess
from types import TracebackType
from typing import IO, Any, Self

from filelock import FileLock

from tests.warm_server import USERS

ROOT = Path(__file__).parents[1]
START_S = 900  # for the imports, on a busy machine


class Warm:
    """A command's processes, one per environment, with what subprocess.Popen has; their output goes into two files."""

    def __init__(self, command: tuple[str, ...], environments: list[dict[str, str]]) -> None:
        self.args = command
        self.returncode: int | None = None
        self.cpu_s = 0.0
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(str(server()[0]))
        self.received = b""
        self.files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115, closed in __exit__
        request = {"command": command, "environments": environments, "folder": os.getcwd()}
        socket.send_fds(self.connection, [json.dumps(request).encode() + b"\n"], [file.fileno() for file in self.files])
        self.pids: list[int] = self._answer(None)

    def _answer(self, timeout: float | None) -> Any:
        """The supervisor's next line; TimeoutError if it does not come in time."""
        self.connection.settimeout(timeout)
        while b"\n" not in self.received:
            received = self.connection.recv(1 << 16)
            assert received, "the supervisor of these processes is gone"
            self.received += received
        line, _, self.received = self.received.partition(b"\n")
        return json.loads(line)

    @property
    def pid(self) -> int:
        (pid,) = self.pids
        return pid

    def poll(self) -> int | None:
        with suppress(TimeoutError):
            self.wait(0.001)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code: of several processes the first that failed."""
        if self.returncode is None:
            self.returncode, self.cpu_s = self._answer(timeout)
        return self.returncode  # type: ignore[return-value]

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        stdout, stderr = (os.pread(file.fileno(), 1 << 26, 0).decode(errors="replace") for file in self.files)
        return stdout, stderr

    def send_signal(self, number: int) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.returncode is None:
            if kind is not None:
                self.send_signal(signal.SIGKILL)
            self.wait()
        for resource in (self.connection, *self.files):
            resource.close()


@functools.cache  # one for all tests of this process
def server() -> tuple[Path, IO[bytes]]:
    """The socket of the server, which all processes of a test session share, and the file that keeps it alive."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    path = Path(tempfile.gettempdir(), f"warm-{session}", "socket")
    path.parent.mkdir(exist_ok=True)
    with FileLock(path.with_name("start")):
        users = path.with_name(USERS).open("wb")
        fcntl.flock(users, fcntl.LOCK_SH)
        if not path.exists():
            environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-W", "ignore", "-m", "tests.warm_server", str(path)]
            subprocess.run(command, env=environment, check=True, timeout=START_S)
    return path, users


def stop() -> None:
    """Lets the server end, once no process of the session uses it."""
    if server.cache_info().currsize:
        server()[1].close()
        server.cache_clear()


@contextmanager
def held_port() -> Iterator[int]:
    """A port of localhost that nobody else is given meanwhile: it is bound here, and rank 0 listens on it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("localhost", 0))
        yield held.getsockname()[1]


def environment(**changes: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | changes


def torchrun() -> dict[str, str]:
    """Environment variables with which torchrun's ranks are forks of the server."""
    return {"PYTHON_EXEC": str(Path(__file__).with_name("warm_rank.py")), "WARM_SOCKET": str(server()[0])}


def popen(*command: str) -> Warm:
    """Starts `python COMMAND`."""
    return Warm(command, [environment()])


def run(*command: str, ranks: int = 0, check: bool = False, timeout: float = 1200) -> CompletedProcess:
    """Runs `python COMMAND` and captures its output, with ranks as torchrun would run it.

    check: a failure is an AssertionError that shows the end of the output.
    """
    with held_port() as port:
        names = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        names |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        each = [environment(**names, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(ranks)]
        with Warm(command, each or [environment()]) as process:
            stdout, stderr = process.communicate(timeout)
    assert not check or process.returncode == 0, f"{' '.join(command)}: {process.returncode}\n{stderr[-6000:]}"
    return CompletedProcess(command, process.returncode, stdout, stderr)
