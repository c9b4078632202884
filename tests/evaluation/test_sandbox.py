"""The sandbox holds: each test runs a real program that tries something, in each cage that this machine has."""

import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_sfr.evaluation.sandbox import MIB, Isolation, Limits, Outcome, isolation_here, run_program

LIMITS = Limits(wall=8, cpu=2, memory=256 * MIB, file_size=MIB, disk=4 * MIB, processes=8)
CAGES = ["audit", *(["namespaces"] if isolation_here() == "namespaces" else [])]


@pytest.fixture(params=CAGES)
def cage(request: pytest.FixtureRequest) -> Isolation:
    return request.param


def attempt(source: str, cage: Isolation, **settings: object) -> Outcome:
    return run_program(source, limits=LIMITS, isolation=cage, **settings)


def test_a_right_program_ends_and_its_output_is_kept(cage: Isolation) -> None:
    echo = "import sys\nprint(sys.stdin.read().upper())\nopen('mine', 'w').write('allowed here')"
    assert attempt(echo, cage, stdin="grüße") == Outcome("ended", "GRÜSSE\n", "")


@pytest.mark.parametrize(
    ("source", "ending"),
    [
        ("import sys; sys.exit(0)", "left early"),
        ("import os; os._exit(0)", "left early"),
        ("raise SystemExit", "left early"),
        ("assert 1 == 2", "failed"),
        ("def broken(:", "failed"),
        ("x = '\ud800'", "failed"),  # half of a surrogate pair: no text at all
        ("x = '\0'", "failed"),
        ("import os, signal; os.abort()", "failed"),
        ("while True: pass", "failed"),  # the limit of CPU time, before that of the wall
        ("import time; time.sleep(60)", "timeout"),
        ("x = bytearray(1 << 30)", "failed"),
        ("x = []\nwhile True: x.append(bytearray(1 << 20))", "failed"),
        ("with open('large', 'wb') as file:\n    file.write(bytes(2 << 20))", "failed"),
        ("print('x' * (2 << 20))", "failed"),
    ],
)
def test_what_does_not_reach_its_end_is_a_failure(source: str, ending: str, cage: Isolation) -> None:
    assert attempt(source, cage).ending == ending


def test_no_socket_reaches_a_server_of_this_machine(cage: Isolation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)"
        assert attempt(source, cage).ending == "failed"
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_file_outside_is_written(cage: Isolation, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    there = tmp_path / "there"
    there.write_text("before")
    there.chmod(0o666)
    for source in (
        f"open({str(there)!r}, 'w').write('after')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.remove({str(there)!r})",
        f"import os; open('mine', 'w').close(); os.rename('mine', {str(tmp_path / 'new')!r})",
        f"import os; os.symlink('/', 'root'); open('root' + {str(there)!r}, 'a').write('after')",
    ):
        assert attempt(source, cage).ending == "failed"
    assert there.read_text() == "before"
    assert list(tmp_path.iterdir()) == [there]


def test_a_fork_bomb_is_bounded_and_nothing_of_it_is_left() -> None:
    """In namespaces by RLIMIT_NPROC, as root too; the audit cage lets nothing fork."""
    name = secrets.token_hex(8)  # an argument of all that the bombs start, to be found by
    bomb = f"""
import os, sys
made = 0
try:
    while True:
        if os.fork() == 0:
            os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(777)', {name!r}])
        made += 1
except OSError:
    print(made)
"""
    loop = "import os\nwhile True: os.fork()"
    endless = f"import os, sys\nos.execv(sys.executable, [sys.executable, '-c', {loop!r}, {name!r}])"
    for cage in CAGES:
        outcome = attempt(bomb, cage)
        assert int(outcome.output) <= LIMITS.processes
        assert (int(outcome.output) > 0) == (cage == "namespaces")
        assert attempt(endless, cage).ending in ("failed", "timeout")
        time.sleep(0.2)
        assert named(name) == []


def named(name: str) -> list[str]:
    """The processes that have this argument."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            found += [str(line)] if name.encode() in line.read_bytes() else []
    return found


@pytest.mark.skipif("namespaces" not in CAGES, reason="this kernel gives us no namespaces")
def test_in_namespaces_nothing_of_this_machine_is_seen(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    source = f"""
import os
print(os.path.exists({str(tmp_path)!r}), os.path.exists('/etc/passwd'), os.path.exists('/proc/1'), os.getpid() < 5)
try:
    os.chroot('.')
except PermissionError:
    print('no way out')
"""
    assert attempt(source, "namespaces").output == "False False False True\nno way out\n"
    assert os.environ["PATH"] not in attempt("import os; print(os.environ)", "namespaces").output


def test_limits_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="wall is 0"):
        Limits(wall=0)
