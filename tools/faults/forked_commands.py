"""`python -m MODULE` as a fork of the process that starts it: subprocess.Popen without ten seconds of imports.

Who starts whom stays as it is: the launcher starts torchrun, torchrun starts ranks, and each runs its module as
__main__ with its own session, environment, files and default signals. Not exercised are the imports, and the
interpreter's end.
"""

import os
import runpy
import signal
import subprocess
import sys
from typing import Any, NoReturn


def fork_commands() -> None:
    """Lets this process and those that it starts fork commands of this Python."""
    import torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler as handler

    subprocess.Popen = handler.Popen = ForkedPopen  # type: ignore[attr-defined, misc]
    os.execvp = lambda _, argv: _run(list(map(os.fsdecode, argv)))  # type: ignore[assignment]


class ForkedPopen(subprocess.Popen):
    """A command `python -m MODULE ...` in a fork; any other command as usual."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        if list(args[:1]) != [sys.executable] or "-m" not in args:
            return super()._execute_child(args, *rest)  # type: ignore[misc]
        _, _, _, _, cwd, env, _, _, _, *files, _, _, _, _, _, new_session, _ = rest
        read_in, _, _, write_out, _, write_error = files
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                if new_session:
                    os.setsid()
                if cwd is not None:
                    os.chdir(cwd)
                if env is not None:
                    os.environ.clear()
                    os.environ.update(env)
                _only_files(read_in, write_out, write_error)
                _default_signals()
                _run(list(args))
            finally:
                os._exit(1)
        self._child_created = True
        self._close_pipe_fds(*files)  # type: ignore[attr-defined]
        return None


def _only_files(*standard: int) -> None:
    """Makes these files the standard ones, -1 for what they are, and closes all others."""
    for number, file in enumerate(standard):
        if file not in (-1, number):
            os.dup2(file, number)
    os.closerange(3, 4096)
    for number, name in enumerate(("stdout", "stderr"), start=1):
        setattr(sys, name, open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False))  # noqa: SIM115


def _default_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


def _run(argv: list[str]) -> NoReturn:
    """Runs `python [-u] -m MODULE ...` in this process, and ends it."""
    from tools.faults.fork_server import run_here

    at = argv.index("-m")
    sys.argv = argv[at + 1 :]

    def program() -> int:
        runpy.run_module(argv[at + 1], run_name="__main__", alter_sys=True)
        return 0

    os._exit(run_here(program))
