"""Lifetime of processes: children end with their parent, and a failing rank ends at once.

Linux kills a process when its parent dies for any reason, if the process requested it (PR_SET_PDEATHSIG). A fork clears
the request and an exec keeps it, so each process that the package starts makes the request here:

- `tied` for a command (torchrun), `end_with_parent` for the processes of a pool;
- `tie_rank` for a rank of torchrun and, through a hook, for every process that it forks or spawns: DataLoader workers,
  encoders, upstream's checkpoint writers and their manager.

A failing rank therefore only needs to exit (`run`). Interpreter shutdown would wait forever for DataLoader workers,
which ignore SIGTERM under --exit-signal-handler.

The request is bound to the thread that started the process: start processes from a thread that outlives them.
"""

import ctypes
import errno
import io
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_sfr.runtime.failures import reason

if TYPE_CHECKING:
    import psutil

PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None, use_errno=True)


def end_with_parent(parent: int | None = None) -> None:
    """Kills this process when its parent ends. parent: its pid, to detect a parent that ended before this call.

    Without a pid, a parent in another session is assumed to be the process that adopts orphans.
    """
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if parent is None and (spawned_by := multiprocessing.parent_process()) is not None:
        parent = spawned_by.pid
    if parent is not None:
        orphan = os.getppid() != parent
    else:  # a session leader is in another session than its parent
        orphan = os.getsid(0) not in (os.getpid(), os.getsid(os.getppid()))
    if orphan:
        os._exit(1)


def tied(command: Sequence[str]) -> list[str]:
    """The command, wrapped so that it ends with this process, which must start it."""
    return [sys.executable, "-m", __name__, str(os.getpid()), *command]


def tie_rank(module: str) -> None:
    """Ties a rank to torchrun, and the processes that the rank forks or spawns to the rank.

    The rank's main module calls it on import with its __name__, because multiprocessing imports that module, as
    __mp_main__, in each process that the rank spawns.
    """
    if module == "__mp_main__":
        _tie_child(None)
    elif module == "__main__" and "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    if module in ("__main__", "__mp_main__"):
        _tie_forks()


def _tie_child(parent: int | None) -> None:
    """Ends a process together with the rank that started it, and makes it ignore signals that stop a run.

    Only the rank handles these signals: it writes a checkpoint and needs upstream's manager process for that. torchrun
    signals the rank's process group, and Slurm each process of a job.
    """
    end_with_parent(parent)
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _tie_forks() -> None:
    forking = threading.local()

    def before() -> None:
        forking.pid, forking.is_main = os.getpid(), threading.get_native_id() == os.getpid()

    def in_child() -> None:
        if forking.is_main:  # another thread may end before its child
            _tie_child(forking.pid)

    os.register_at_fork(before=before, after_in_child=in_child)


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str], mark: str) -> NoReturn:
    """Runs a rank's program and ends the process. Code 2 and one line after the mark for ValueError, else a traceback.

    After a failure the process exits without interpreter shutdown, so nothing can delay it.
    """
    outlive_terminal()
    code = 1
    try:
        code = _exit_code(main, argv, mark)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        if code != 0:
            os._exit(code)
    for child in multiprocessing.active_children():
        if child.daemon:  # interpreter shutdown would send it SIGTERM, which it ignores, and wait
            child.kill()
    sys.exit(0)


def _exit_code(main: Callable[[Sequence[str]], int | None], argv: Sequence[str], mark: str) -> int:
    try:
        return main(argv) or 0
    except ValueError as error:
        print(f"{mark} {reason(error)}", file=sys.stderr)
        return 2
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1


def end_with_peers() -> None:
    """Ends this rank at SIGTERM if another rank of this machine is dead.

    torchrun sends SIGTERM to the other ranks when one has failed. They cannot write a checkpoint without it, and may
    wait for it inside a collective, where no Python handler runs: hence the thread.
    """
    import psutil

    if "TORCHELASTIC_RUN_ID" not in os.environ:  # the first process of a container has no parent to ask
        return
    ranks = [rank for rank in psutil.Process(os.getppid()).children() if os.getsid(rank.pid) == rank.pid]
    if len(ranks) != int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while True:
            (number,) = os.read(reader, 1)
            if number == signal.SIGTERM and any(_has_ended(rank) for rank in ranks):
                print("another rank of this machine has ended; this one ends too", file=sys.stderr, flush=True)
                os._exit(1)

    threading.Thread(target=watch, name="peers", daemon=True).start()


def _has_ended(process: "psutil.Process") -> bool:
    return not process.is_running() or process.status() == "zombie"


def stop_alike(number: int) -> None:
    """Gives SIGINT and SIGHUP this signal's handler."""
    handler = signal.getsignal(number)
    assert callable(handler), "upstream has installed it"
    for other in (signal.SIGINT, signal.SIGHUP):
        signal.signal(other, handler)


class _Terminal(io.FileIO):
    """Drops what is written once the terminal has been closed."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return memoryview(data).nbytes


def outlive_terminal() -> None:
    """Lets standard output and standard error outlive their terminal: the last checkpoint comes after SIGHUP."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream.isatty():
            raw = io.BufferedWriter(_Terminal(stream.fileno(), "w", closefd=False))
            text = io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True)
            setattr(sys, name, text)


if __name__ == "__main__":  # PARENT COMMAND ...: see `tied`
    end_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
