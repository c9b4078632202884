"""Runs an untrusted Python program in a separate process, in a sandbox (sandbox_child.py), within limits.

The verdict does not depend on the exit code: with `to_the_end`, a program passes only if it reaches its last line,
where it writes a random mark. So `sys.exit(0)` before the tests is a failure. A program written to forge the mark can
do so: scores are only as honest as the scored model.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO, Literal

from megatron_sfr.evaluation.code.system_calls import seccomp_filter

CHILD = Path(__file__).with_name("sandbox_child.py")
MIB = 1 << 20
Isolation = Literal["namespaces", "audit"]
Ending = Literal["ended", "failed", "left early", "timeout"]


@dataclass(frozen=True)
class Limits:
    """Limits of one program. Time in seconds, sizes in bytes.

    A program is one process (system_calls.py), so `memory` bounds all of it. Files in the working folder use additional
    memory, up to `disk`.
    """

    wall: float = 10.0
    cpu: int = 10
    memory: int = 1024 * MIB
    """Of address space."""
    file_size: int = 16 * MIB
    """Also of standard output."""
    disk: int = 64 * MIB
    """All files together; under `audit` only each file is limited."""
    threads: int = 32

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise ValueError(f"{name} is {value}; give a limit above 0")


@dataclass(frozen=True)
class Outcome:
    """How a program ended, what it printed (undecodable bytes replaced), and the last line of its errors."""

    ending: Ending
    output: str
    error: str


def run_program(
    source: str,
    *,
    stdin: str = "",
    name: str = "__main__",
    limits: Limits,
    isolation: Isolation | None = None,
    to_the_end: bool = True,
) -> Outcome:
    """Runs a program.

    Args:
        source: The program's text.
        stdin: What it reads from standard input.
        name: Its `__name__`; under another name than `__main__`, lines below a main guard do not run.
        limits: Of time, memory, files and threads.
        isolation: The kind of sandbox; None for the best one available on this machine.
        to_the_end: Whether the program must reach its last line. If not, it may exit early by SystemExit.

    Raises:
        ValueError: The sandbox cannot be built on this machine.
    """
    isolation = isolation or isolation_here()
    token = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="megatron-sfr-") as box,
        tempfile.TemporaryFile("w+") as spec,
        tempfile.TemporaryFile() as mark,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
    ):
        last = f"\n\n__import__('os').write({mark.fileno()}, b'{token}')\n" if to_the_end else ""
        settings = {"isolation": isolation, "box": box, "source": source + last, "name": name, "parent": os.getpid()}
        json.dump(asdict(limits) | settings | _machine() | {"may_exit": not to_the_end}, spec)
        spec.seek(0)
        given.write(stdin.encode(errors="surrogatepass"))
        given.seek(0)
        process = _start((spec.fileno(), mark.fileno()), given, output, errors, box)
        code = _wait(process, limits.wall)
        found, said = _read(mark), _read(errors).strip().rpartition("\n")[2]
        if code is not None and not found.startswith(isolation):
            raise ValueError(f"the sandbox ({isolation}) cannot start on this machine: {said}")
        ended = found == f"{isolation}\n{token if to_the_end else ''}"
        ending: Ending = "timeout" if code is None else "failed" if code != 0 else "ended" if ended else "left early"
        return Outcome(ending, _read(output), said)


@cache
def isolation_here() -> Isolation:
    """`namespaces` where the kernel permits them, else `audit`."""
    try:
        found = run_program("", limits=Limits(wall=60, cpu=60), isolation="namespaces")
    except ValueError:
        return "audit"
    return "namespaces" if found.ending == "ended" else "audit"


def _start(
    descriptors: tuple[int, int], given: IO[bytes], output: IO[bytes], errors: IO[bytes], box: str
) -> subprocess.Popen:
    """Starts sandbox_child.py in a new session with an empty environment, and descriptors for its settings and the
    mark."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(CHILD), *map(str, descriptors)],
        stdin=given,
        stdout=output,
        stderr=errors,
        pass_fds=descriptors,
        start_new_session=True,
        env={key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ},  # Python may need it
        cwd=box,
    )


def _machine() -> dict[str, object]:
    """This machine's settings for sandbox_child.py: Python, its library and packages, and the system-call filter."""
    python = (os.path.realpath(sys.executable), sys.base_prefix, sysconfig.get_path("purelib"))
    return {"python": python, "filter": seccomp_filter().hex()}


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    """The exit code, or None at the time limit. Ends all of the process group."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):  # the process group has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
