"""If any process fails or dies, its run ends at once with all its processes; with Megatron's default DataLoaders.

The processes of a run are found by a mark in their environment, so none that has lost its parent is missed. Limits of
time count from the event, and leave out the time in which any process of this machine waited for a CPU: a run that
hangs waits for no CPU, and one that ends slowly on a busy machine does.
"""

import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from megatron_sfr.hf.megatron.megatron_checkpoint import find_checkpoint
from tests.warm import ROOT

from .launch import read_checkpoint, read_metrics
from .tiny import recipe, write_prepared

pytestmark = [pytest.mark.distributed, pytest.mark.recovery]
PP2 = ("--nproc", "2", "--pipeline-model-parallel-size", "2")
LIMIT_S = 10  # from the event until no process is left, on a machine with CPUs for all
STOP_S = 60  # for a stop, which finishes a step and writes a checkpoint first
LONGEST_S = 300  # the same on any machine
PRESSURE = Path("/proc/pressure/cpu")
MARK = "MEGATRON_SFR_TEST_RUN"
RAISE = """
import signal, torch
def raise_index_error(*_): raise IndexError("index 501 is out of range")
def raise_out_of_memory(*_): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
signal.signal(signal.SIGUSR1, raise_index_error)
signal.signal(signal.SIGUSR2, raise_out_of_memory)
"""  # a sitecustomize: by these signals a rank raises wherever it is in a step


@dataclass(frozen=True)
class Started:
    """A run of `megatron-sfr train`, or of torchrun without it."""

    process: subprocess.Popen
    save: Path
    mark: str

    def processes(self) -> list[psutil.Process]:
        """Those of the run that live, wherever they are in the tree."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        """In the order of their ranks."""
        found = [p for p in self.processes() if "megatron_sfr.train" in p.cmdline() and os.getsid(p.pid) == p.pid]
        return sorted(
            (p for p in found if "torch.distributed.run" not in p.cmdline()), key=lambda p: int(p.environ()["RANK"])
        )

    def agent(self) -> psutil.Process:
        return self.ranks()[0].parent()  # type: ignore[return-value]

    def steps(self) -> int:
        return len(read_metrics(self.save)) if (self.save / "metrics.jsonl").exists() else 0

    def wait_for(self, condition: Callable[[], bool], seconds: float = 1200) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < end, "the run did not get there"
            time.sleep(0.05)

    def output_at_the_end(self, code: int, seconds: float = LIMIT_S) -> str:
        """Asserts that all of it ends in time, and with the code."""
        start, waited = time.monotonic(), waited_for_cpu()
        while left := self.processes():
            elapsed = time.monotonic() - start
            if elapsed > LONGEST_S or elapsed - (waited_for_cpu() - waited) > seconds:
                break
            time.sleep(0.1)
        output = self.process.communicate(timeout=5)[0] if not left else ""
        assert not left, [(p.pid, p.ppid(), p.cmdline()[-3:]) for p in left]
        assert self.process.returncode == code, output
        return output


def waited_for_cpu() -> float:
    """Seconds in which some process waited for a CPU, since boot; where the kernel does not count them, the clock."""
    if not PRESSURE.exists():
        return time.monotonic()
    return int(PRESSURE.read_text().partition("\n")[0].rpartition("total=")[2]) / 1e6


Start = Callable[..., Started]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data with an empty target store, a recipe without num_workers, and the sitecustomize."""
    folder = tmp_path_factory.mktemp("failures")
    keys = recipe(write_prepared(folder / "data", later=True), train_iters=100_000, sfr=False)
    del keys["num_workers"]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    (folder / "sitecustomize.py").write_text(RAISE, encoding="utf-8")
    return folder


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a run whose environment has a mark; what is left of it at the end is killed."""
    started = []

    def start(*flags: str, command: tuple[str, ...] = ("megatron_sfr.cli", "train"), **how: Any) -> Started:
        paths = os.pathsep.join([str(ROOT), str(folder)])
        environment = {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", MARK: str(tmp_path)}
        given = [] if command[0] == "megatron_sfr.cli" else ["--recipe"]
        given += [str(folder / "tiny.yaml"), "--save", str(tmp_path / "run"), *flags]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | how
        process = subprocess.Popen(
            [sys.executable, "-m", *command, *given],
            env=os.environ | environment,
            text=True,
            **how,
        )
        started.append(Started(process, tmp_path / "run", str(tmp_path)))
        return started[-1]

    yield start
    for run in started:
        for process in run.processes():
            process.kill()
        run.process.wait()
        if run.process.stdout:  # or a later test fails of the warning that it is open
            run.process.stdout.close()


def last_line(output: str) -> str:
    return output.replace("\r", "\n").strip().splitlines()[-1]


def saved(run: Started) -> int:
    """The newest checkpoint's step, which is whole."""
    checkpoint = find_checkpoint(run.save)
    assert read_checkpoint(checkpoint)
    return int(checkpoint.name.removeprefix("iter_"))


def test_an_exception_on_the_last_rank_ends_the_run(start: Start) -> None:
    run = start(*PP2)
    run.wait_for(lambda: run.steps() >= 2)
    run.ranks()[1].send_signal(signal.SIGUSR1)
    output = run.output_at_the_end(2)
    assert "training failed: IndexError: index 501 is out of range" in last_line(output)
    assert "Traceback" not in output


def test_out_of_memory_ends_the_run_with_its_encoder_and_data_workers(start: Start) -> None:
    run = start("--sfr", "--sfr-targets", "online", "--save-interval", "2")
    run.wait_for(lambda: run.steps() >= 3)
    assert len(run.processes()) >= 6, "launcher, torchrun, rank, two DataLoader workers, and the encoder or its tracker"
    run.ranks()[0].send_signal(signal.SIGUSR2)
    assert "OutOfMemoryError: CUDA out of memory. Tried" in last_line(run.output_at_the_end(2))


def test_a_save_that_fails_ends_the_run(start: Start, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "iter_0000002").touch()
    run = start("--save-interval", "2")
    assert "iter_0000002" in last_line(run.output_at_the_end(2, 120))  # starting takes time, too


def test_a_killed_data_loader_worker_ends_the_run(start: Start) -> None:
    run = start()
    run.wait_for(lambda: run.steps() >= 1)
    rank = run.ranks()[0]
    next(child for child in rank.children() if child.cmdline() == rank.cmdline()).kill()
    line = last_line(run.output_at_the_end(2))  # torch says one or the other, as it notices
    assert re.search(r"DataLoader worker \(pid.*(is killed by signal: Killed|exited unexpectedly)", line)
    assert re.search("out of memory is the usual reason|killed, as when memory runs out", line)


def test_a_killed_rank_takes_its_processes_along(start: Start) -> None:
    run = start(*PP2, "--save-interval", "1")
    run.wait_for(lambda: run.steps() >= 2)
    run.ranks()[0].kill()
    assert "training failed" in last_line(run.output_at_the_end(2))


def test_a_killed_torchrun_takes_its_ranks_along(start: Start) -> None:
    run = start("--save-interval", "1")
    run.wait_for(lambda: run.steps() >= 2)
    run.agent().kill()
    assert "training failed" in last_line(run.output_at_the_end(2))


def test_a_killed_launcher_takes_its_run_along(start: Start) -> None:
    run = start()
    run.wait_for(lambda: run.steps() >= 1)
    run.process.kill()
    run.output_at_the_end(-signal.SIGKILL)


def test_a_closed_terminal_is_a_stop(start: Start) -> None:
    terminal, its_end = pty.openpty()

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests themselves run under nohup
        fcntl.ioctl(0, termios.TIOCSCTTY)

    streams = dict.fromkeys(("stdin", "stdout", "stderr"), its_end)
    run = start("--verbose", start_new_session=True, preexec_fn=take_terminal, **streams)
    os.close(its_end)
    os.set_blocking(terminal, False)

    def reads_two_steps() -> bool:
        with suppress(BlockingIOError):
            os.read(terminal, 1 << 16)
        return run.steps() >= 2

    run.wait_for(reads_two_steps)
    os.close(terminal)
    run.output_at_the_end(130, STOP_S)
    assert saved(run) == read_metrics(run.save)[-1]["step"]


def test_sighup_to_torchrun_is_a_stop(start: Start) -> None:
    run = start(command=("torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "megatron_sfr.train"))
    run.wait_for(lambda: run.steps() >= 2)
    run.process.send_signal(signal.SIGHUP)
    run.output_at_the_end(1, STOP_S)
    assert saved(run) == read_metrics(run.save)[-1]["step"]


def test_a_second_ctrl_c_ends_the_run_at_once(start: Start) -> None:
    run = start()
    run.wait_for(lambda: run.steps() >= 1)
    rank = run.ranks()[0]
    rank.suspend()  # it would stop after its step
    run.process.send_signal(signal.SIGINT)
    time.sleep(1)
    run.process.send_signal(signal.SIGINT)
    run.output_at_the_end(130)
