"""Runs a command many times in forks of this process, which has imported everything already: a tenth of a second each.

A fork has its own files for output, limits of time and memory, and this process as the parent that adopts what it
leaves behind. Nothing here may start a thread or compute with torch before a fork.
"""

import ctypes
import gc
import importlib
import multiprocessing.context
import os
import pkgutil
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import megatron_sfr
from megatron_sfr.runtime import backend

PR_SET_CHILD_SUBREAPER = 36
LEFT_ALIVE_S = 10  # from the end of a command until none of its processes may live
POLL_S = 0.01


@dataclass(frozen=True)
class Limits:
    """What a command may take before it counts as one that never ends."""

    cpu_s: int = 40
    wall_s: float = 240.0
    memory: int = 4 << 30  # address space, beyond what this process has


@dataclass
class Ended:
    """How a command ended: its exit code (negative for a signal) and its outputs."""

    code: int
    out: str
    error: str
    cpu_s: float
    seconds: float
    timed_out: bool = False
    left: list[str] = field(default_factory=list)
    """Processes that lived LEFT_ALIVE_S after it; they have been killed."""


def warm_up() -> None:
    """Imports all that the commands import, so that a fork has it."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    warnings.simplefilter("ignore")
    backend.prepare(["--sfr-backend", "cpu"])
    skipped = ("vllm_engine", "__main__", "agent", "sandbox_child")
    for module in pkgutil.walk_packages(megatron_sfr.__path__, "megatron_sfr."):
        if module.name.rpartition(".")[2] not in skipped:
            importlib.import_module(module.name)
    for name in (
        "megatron.training.training",
        "megatron.training.argument_utils",
        "sentence_transformers",
        "transformers.models.qwen3.modeling_qwen3",
        "transformers.models.bert.modeling_bert",
        "sklearn.linear_model",
        "torch._dynamo",
        "torch.distributed.run",
        "torch.utils.tensorboard",
        "megatron.core.models.mimo.optimizer",
        "megatron.core.tokenizers.text.models",
    ):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else the collector writes to every page that a fork shares


class Forked:
    """A running command."""

    def __init__(
        self, program: Callable[[], int], folder: Path, limits: Limits, variables: Mapping[str, str] | None = None
    ) -> None:
        self._out, self._error = folder.with_suffix(".out"), folder.with_suffix(".err")
        self._code: int | None = None
        self._limits, self.began, self.cpu_s = limits, time.monotonic(), 0.0
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                self._confine(folder, variables or {})
                code = _run(program)
            finally:
                os._exit(code)

    def _confine(self, folder: Path, variables: Mapping[str, str]) -> None:
        os.setsid()
        os.chdir(folder)
        os.environ.update(variables)
        for path, number in ((self._out, 1), (self._error, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        memory = psutil.Process().memory_info().vms + self._limits.memory
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (self._limits.cpu_s, self._limits.cpu_s + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def has_ended(self) -> bool:
        """Whether it has ended, also by itself."""
        if self._code is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            self.cpu_s = usage.ru_utime + usage.ru_stime
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code is not None

    def wait(self, seconds: float | None = None) -> Ended:
        """Waits for the end of the command and of all that it started."""
        timed_out, limit = False, self._limits.wall_s if seconds is None else seconds
        while not self.has_ended():
            if time.monotonic() - self.began > limit and not timed_out:
                timed_out = True
                self.kill()
            time.sleep(POLL_S)
        code = self._code
        assert code is not None
        timed_out |= code in (-signal.SIGXCPU, -signal.SIGKILL) and self.cpu_s >= self._limits.cpu_s
        texts = [path.read_text("utf-8", "replace") if path.exists() else "" for path in (self._out, self._error)]
        return Ended(code, texts[0], texts[1], self.cpu_s, time.monotonic() - self.began, timed_out, _left_alive())


def _left_alive() -> list[str]:
    """What descendants of this process live after LEFT_ALIVE_S; kills them."""
    end = time.monotonic() + LEFT_ALIVE_S
    while (left := _living()) and time.monotonic() < end:
        time.sleep(0.02)
    names = []
    for process in left:
        try:
            names.append(" ".join(process.cmdline())[:120])
            process.kill()
            process.wait(5)
        except psutil.NoSuchProcess:
            continue
    return names


def _living() -> list[psutil.Process]:
    living = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
            elif process.ppid() == os.getpid():
                os.waitpid(process.pid, os.WNOHANG)
        except (psutil.NoSuchProcess, ChildProcessError):
            continue
    return living


def run(program: Callable[[], int], folder: Path, limits: Limits | None = None) -> Ended:
    """Runs the program in a fork, in the folder; FOLDER.out and FOLDER.err have what it printed."""
    return Forked(program, folder, limits or Limits()).wait()


def _run(program: Callable[[], int]) -> int:
    contexts = multiprocessing.context._concrete_contexts  # type: ignore[attr-defined]
    contexts["spawn"] = contexts["fork"]  # a spawned process would import everything again
    for stream, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, stream, open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False))  # noqa: SIM115
    return run_here(program)


def run_here(program: Callable[[], int]) -> int:
    """The program's exit code, as of a command's process: an exception is a traceback and code 1."""
    try:
        code = program()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code
