"""The sandbox holds: each test runs a real program that tries something, in each sandbox that this machine has."""

import os
import re
import secrets
import socket
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_sfr.evaluation.code.sandbox import MIB, Isolation, Limits, Outcome, isolation_here, run_program
from megatron_sfr.evaluation.code.system_calls import CALLS, CLONE3, SHARED, seccomp_filter

LIMITS = Limits(wall=8, cpu=1, memory=256 * MIB, file_size=MIB, disk=4 * MIB, threads=8)
CAGES = ["audit", *(["namespaces"] if isolation_here() == "namespaces" else [])]


@pytest.fixture(params=CAGES)
def cage(request: pytest.FixtureRequest) -> Isolation:
    return request.param


def attempt(source: str, cage: Isolation, limits: Limits = LIMITS, **settings: object) -> Outcome:
    return run_program(source, limits=limits, isolation=cage, **settings)


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
    limits = replace(LIMITS, wall=2) if ending == "timeout" else LIMITS
    assert attempt(source, cage, limits).ending == ending


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


def test_a_program_stays_one_process_with_few_threads(cage: Isolation) -> None:
    """So RLIMIT_AS bounds the whole program; and nothing is left of it."""
    name = secrets.token_hex(8)  # an argument of all that the program starts, to find it by
    source = f"""
import os, subprocess, sys, threading
command = [sys.executable, '-c', 'import time; time.sleep(777)', {name!r}]
for start in (os.fork, lambda: subprocess.Popen(command), lambda: os.posix_spawn(command[0], command, {{}})):
    try:
        if start() == 0:
            os.execv(command[0], command)
        print('started')
    except OSError:
        print('refused')
def threads(count):
    done, stop = [], threading.Event()
    try:
        for _ in range(count):
            thread = threading.Thread(target=stop.wait)
            thread.start()
            done.append(thread)
    finally:
        stop.set()
        [thread.join() for thread in done]
threads(4)
print('threads')
threads(40)
"""
    outcome = attempt(source, cage)
    assert outcome.output == "refused\nrefused\nrefused\nthreads\n"
    if cage == "namespaces" or os.getuid() != 0:  # RLIMIT_NPROC does not bind root
        assert outcome.error == "RuntimeError: can't start new thread"
    time.sleep(0.2)
    assert named(name) == []


HOARD = """
import ctypes, mmap, os, sys, threading
libc, held, kept = ctypes.CDLL(None), 0, []
MIB = 1 << 20
def in_memory():
    kept.append(bytearray(8 * MIB))
def mapped():
    kept.append(mmap.mmap(-1, 8 * MIB))
    kept[-1].write(bytes(8 * MIB))
def unmapped():
    kept.append(os.memfd_create('held'))
    os.truncate(kept[-1], MIB)
def system_v():
    kept.append(libc.shmget(0, 8 * MIB, 0o1600))
    if kept[-1] < 0:
        raise OSError('shmget')
def message_queue():
    kept.append(libc.msgget(0, 0o1600))
    if kept[-1] < 0:
        raise OSError('msgget')
def files():
    with open(f'{len(kept)}', 'wb') as file:
        file.write(bytes(MIB))
    kept.append(None)
for way, size in ((unmapped, 1), (system_v, 8), (message_queue, 1), (files, 1), (mapped, 8), (in_memory, 8)):
    held = 0
    try:
        while held < 1024:
            way()
            held += size
    except (OSError, MemoryError):
        pass
    sys.stdout.write(f'{way.__name__} {held}\\n')
    if way is mapped:
        kept.clear()
"""


@pytest.mark.skipif("namespaces" not in CAGES, reason="this kernel grants no namespaces")
def test_memory_is_bounded_for_the_program_as_a_whole() -> None:
    """MiB that a program holds by each way to ask for them: its address space and its disk, nothing beside them."""
    outcome = attempt(HOARD, "namespaces")
    held = dict(line.split() for line in outcome.output.splitlines())
    assert [held[way] for way in ("unmapped", "system_v", "message_queue")] == ["0", "0", "0"]
    assert 0 < int(held["files"]) <= LIMITS.disk // MIB
    assert all(64 < int(held[way]) <= LIMITS.memory // MIB for way in ("mapped", "in_memory"))


def test_files_in_memory_are_refused_under_audit_too() -> None:
    outcome = attempt("import os\nos.memfd_create('held')", "audit")
    assert outcome.error == "PermissionError: [Errno 1] Operation not permitted"


@pytest.mark.skipif("namespaces" not in CAGES, reason="this kernel grants no namespaces")
def test_the_number_of_files_is_bounded() -> None:
    source = "try:\n    for i in range(10**6): open(str(i), 'w').close()\nexcept OSError: print(i)"
    assert 1000 < int(attempt(source, "namespaces").output) < 5000


@pytest.mark.parametrize(
    ("machine", "header"), [("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")]
)
def test_system_calls_have_the_numbers_of_the_kernels_headers(machine: str, header: str) -> None:
    path = Path("/usr/include") / header
    if not path.is_file():
        pytest.skip(f"{path} is not installed")
    known = dict(re.findall(r"#define __NR_(\w+) (\d+)", path.read_text()))
    numbers = CALLS[machine][1] | SHARED | {"clone3": CLONE3}
    assert {name: int(known[name]) for name in numbers} == numbers
    assert len(seccomp_filter(machine)) % 8 == 0


def test_machines_without_a_table_of_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="not of mips"):
        seccomp_filter("mips")


@pytest.mark.parametrize("name", ["__main__", "solution"])
def test_a_main_guard_runs_in_main_only(name: str, cage: Isolation) -> None:
    source = "print(__name__)\nif __name__ == '__main__': print('guarded')"
    expected = "__main__\nguarded\n" if name == "__main__" else "solution\n"
    assert attempt(source, cage, name=name).output == expected


def test_a_program_that_may_leave_early_ends_by_system_exit(cage: Isolation) -> None:
    assert attempt("print(1)\nraise SystemExit(3)", cage, to_the_end=False).ending == "ended"
    assert attempt("print(1)\nimport os; os._exit(3)", cage, to_the_end=False).ending == "failed"


def named(name: str) -> list[str]:
    """The processes that have this argument."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            found += [str(line)] if name.encode() in line.read_bytes() else []
    return found


@pytest.mark.skipif("namespaces" not in CAGES, reason="this kernel gives us no namespaces")
def test_in_namespaces_this_machine_is_invisible(tmp_path: Path) -> None:
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


def test_invalid_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="wall is 0"):
        Limits(wall=0)


def test_a_program_ends_with_the_process_that_runs_it(cage: Isolation) -> None:
    program = f"run_program('import time; time.sleep(1000)', limits=Limits(wall=1000), isolation={cage!r})"
    code = f"from megatron_sfr.evaluation.code.sandbox import Limits, run_program; {program}"
    caller = psutil.Popen([sys.executable, "-c", code])
    depth = {"namespaces": 3, "audit": 1}[cage]
    while len(started := caller.children(recursive=True)) < depth:
        time.sleep(0.02)
    caller.kill()
    caller.wait()
    assert not psutil.wait_procs(started, 10)[1]
