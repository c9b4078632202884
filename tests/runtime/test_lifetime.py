"""What a process started ends with it, however it ends; a rank that fails ends at once; stopping leaves its helpers."""

import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_sfr.runtime import lifetime

ROOT = Path(__file__).parents[2]
RANK, AGENT = (Path(__file__).with_name(name) for name in ("rank_program.py", "agent_program.py"))
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def living(report: Path) -> list[int]:
    """The reported processes that live."""
    wait_for(report.exists)
    return [pid for pid in json.loads(report.read_text()) if is_alive(pid)]


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def run_rank(ending: str, report: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(RANK), ending, str(report)]
    return subprocess.run(command, env=ENVIRONMENT, start_new_session=True, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("ending", "code", "last_line"),
    [
        ("value", 2, "rank: error: two lines"),
        ("raise", 1, "IndexError: out of range"),
        ("leave", 1, "no more data"),
        ("manager", 0, ""),
    ],
)
def test_a_rank_ends_at_once_with_all_that_it_started(ending: str, code: int, last_line: str, tmp_path: Path) -> None:
    done = run_rank(ending, tmp_path / "report")
    assert done.returncode == code, done.stderr
    assert [*done.stderr.splitlines(), ""][-2 if done.stderr else -1] == last_line
    assert ("Traceback" in done.stderr) == (ending == "raise")
    wait_for(lambda: not living(tmp_path / "report"), 10)
    assert len(json.loads((tmp_path / "report").read_text())) >= 4, "rank, fork, spawn, command"


def start_agent(folder: Path) -> tuple[subprocess.Popen, list[psutil.Process]]:
    agent = subprocess.Popen([sys.executable, str(AGENT), str(RANK), str(folder)], env=ENVIRONMENT, stdout=-3)
    wait_for(lambda: len(list(folder.glob("watches-*"))) == 2)
    return agent, psutil.Process(agent.pid).children(recursive=True)


def test_a_rank_that_waits_for_a_dead_one_ends_at_sigterm(tmp_path: Path) -> None:
    agent, started = start_agent(tmp_path)
    psutil.Process(json.loads((tmp_path / "rank-0").read_text())[0]).kill()
    assert agent.wait(30) == 0
    assert not psutil.wait_procs(started, 10)[1]


def test_the_first_process_of_a_container_has_no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(os, "getppid", lambda: 0)
    lifetime.end_with_peers()


def test_ranks_end_with_their_agent(tmp_path: Path) -> None:
    agent, started = start_agent(tmp_path)
    assert len(started) >= 10, "two ranks, and of each: fork, spawn, manager, command"
    agent.kill()
    agent.wait()
    assert not psutil.wait_procs(started, 10)[1]


def test_an_orphan_that_asks_too_late_ends(tmp_path: Path) -> None:
    late = (
        "import os, sys; os.fork() and os._exit(0); from megatron_sfr.runtime import lifetime; import time; time.sleep"
    )
    code = f"{late}(1); lifetime.end_with_parent(int(sys.argv[1])); open(sys.argv[2], 'w')"
    mark = tmp_path / "went on"
    command = [sys.executable, "-c", code, str(os.getpid()), str(mark)]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    assert not mark.exists()


def test_output_outlives_the_terminal() -> None:
    terminal, its_end = pty.openpty()
    code = (
        "import sys; from megatron_sfr.runtime.lifetime import outlive_terminal\n"
        "outlive_terminal(); print('ready'); sys.stdin.read()\n"
        "print('lost'); print('lost', file=sys.stderr)\n"
    )
    streams = {"stdin": subprocess.PIPE, "stdout": its_end, "stderr": its_end}
    process = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, **streams)
    os.close(its_end)
    assert os.read(terminal, 100).startswith(b"ready")
    os.close(terminal)
    process.communicate(timeout=60)
    assert process.returncode == 0
