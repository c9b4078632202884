"""A process that has imported what commands need, and forks itself for each of them: a start takes 0.1 s, not 10.

argv: the path of a Unix socket. The program ends when its fork, the server, accepts connections. The server ends when
no process holds a lock on the file USERS beside the socket. A client (warm.py) sends one request on a connection, with
files for output and errors. A supervisor, itself a fork, then starts the command's processes as torchrun starts ranks:
each leads a session, runs the command as __main__, and is killed when another one fails or when the supervisor ends.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

IMPORTED = """
    megatron.training.training megatron.core.models.mimo.optimizer megatron.core.tokenizers.text.models
    megatron_sfr.config.build megatron_sfr.config.resume megatron_sfr.runtime.durable megatron_sfr.runtime.resharding
    multiprocessing.managers torch.utils.tensorboard
""".split()
USERS = "users"
POLL_S = 1.0  # how often the server looks for users


def serve(path: Path) -> NoReturn:
    """Forks the server, which accepts connections for as long as there are users, and ends."""
    assert len(os.listdir("/proc/self/task")) == 1, "a fork of several threads may hang"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{path}.partial")
    listening.listen()
    os.rename(f"{path}.partial", path)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page
    if os.fork() == 0:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in range(3):  # they are a test process's
            os.dup2(nowhere, number)
        listening.settimeout(POLL_S)
        accept(listening, path.with_name(USERS))
    os._exit(0)


def accept(listening: socket.socket, users: Path) -> NoReturn:
    """Forks a supervisor for each connection."""
    from megatron_sfr.runtime.lifetime import end_with_parent

    server = os.getpid()
    while True:
        try:
            connection, _ = listening.accept()
        except TimeoutError:
            end_without_users(users)
            continue
        with contextlib.suppress(ChildProcessError):  # there are none
            while os.waitpid(-1, os.WNOHANG) != (0, 0):  # earlier supervisors: their CPU time counts as the server's
                pass
        if os.fork() == 0:
            end_with_parent(server)
            supervise(connection)
        connection.close()


def end_without_users(users: Path) -> None:
    """Ends the server if no process holds a lock on the file."""
    with users.open("rb") as file, contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(users.parent)
        os._exit(0)


def supervise(connection: socket.socket) -> NoReturn:
    """Starts one process per environment of the request, reports their ids, and later their exit codes and CPU time."""
    text, files, *_ = socket.recv_fds(connection, 1 << 16, 2)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 16)
    request = json.loads(text)
    processes = []
    for environment in request["environments"]:
        if (pid := os.fork()) == 0:
            connection.close()
            run(request["command"], request["folder"], environment, files)
        processes.append(pid)
    connection.sendall(json.dumps(processes).encode() + b"\n")
    code, cpu_s = 0, 0.0
    while processes:
        pid, status, usage = os.wait3(0)
        processes.remove(pid)
        cpu_s += usage.ru_utime + usage.ru_stime
        if status and code == 0:
            code = os.waitstatus_to_exitcode(status)
            for other in processes:
                os.kill(other, signal.SIGKILL)
    connection.sendall(json.dumps([code, cpu_s]).encode() + b"\n")
    os._exit(0)


def run(command: list[str], folder: str, environment: dict[str, str], files: list[int]) -> NoReturn:
    """What `python COMMAND` does: a program's path or -m MODULE, and arguments."""
    from megatron_sfr.runtime.lifetime import end_with_parent, tie_rank

    os.setsid()
    end_with_parent(os.getppid())
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), *files)):
        os.dup2(file, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if "RANK" in environment:
        tie_rank("__main__")  # what it starts ends with it
    code: Any = 1
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def import_megatron() -> None:
    """Imports what a training imports, on the CPU backend.

    Upstream reads the help texts of its flags from its own source for each parser, 0.4 s; here they are read once.
    """
    from megatron_sfr.runtime import backend

    backend.prepare(["--sfr-backend", "cpu"])
    for name in IMPORTED:
        importlib.import_module(name)
    from megatron.training.argument_utils import ArgumentGroupFactory

    from megatron_sfr.config.settings import flag_parser

    read = ArgumentGroupFactory._get_field_docstrings
    known: dict[type, dict[str, str]] = {}

    def docstrings(self: Any, part: type) -> dict[str, str]:
        if part not in known:
            known[part] = read(self, part)
        return known[part]

    ArgumentGroupFactory._get_field_docstrings = docstrings
    flag_parser()


if __name__ == "__main__":
    import_megatron()
    serve(Path(sys.argv[1]))
