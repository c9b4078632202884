#!/usr/bin/env -S python3 -S -E
"""The interpreter that torchrun is given for its ranks (PYTHON_EXEC): a rank is a fork of the server of warm processes.

argv: what torchrun gives a Python interpreter. WARM_SOCKET: the server's socket. Signals reach the rank, and its exit
status is that of this process.
"""

import json
import os
import signal
import socket
import sys


def main(command: list[str]) -> int:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ["WARM_SOCKET"])
    request = {"command": command, "environments": [dict(os.environ)], "folder": os.getcwd()}
    socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [1, 2])
    with connection.makefile() as answers:
        (rank,) = json.loads(answers.readline())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: os.kill(rank, number))
        code, _ = json.loads(answers.readline())
    if code < 0:  # of a signal
        os.kill(os.getpid(), signal.SIGKILL)
    return code


if __name__ == "__main__":
    assert sys.argv[1] == "-u", "torchrun runs its ranks unbuffered"
    sys.exit(main(sys.argv[2:]))
