"""A Slurm cluster of two nodes on this machine: its daemons, the jobs submitted to it, and the processes of a job."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

import psutil

ROOT = Path(__file__).resolve().parents[2]
NODES = ("127.0.0.1", "127.0.0.2")
PATH = f"{os.environ['PATH']}:/usr/sbin"  # Debian's place for daemons
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
PATIENCE_S = 600  # for one start of all processes on a busy machine
STATE_PAUSE_S = 1.0  # between questions to Slurm, each of which starts a process


def unavailable() -> str:
    """Why no cluster can be started here; empty if one can."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name, path=PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root"


def wait_for(condition: Callable[[], bool], what: str, seconds: float = PATIENCE_S, pause: float = 0.1) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} seconds for {what}"
        time.sleep(pause)


def tail(log: Path, lines: int) -> str:
    text = log.read_text(errors="replace") if log.exists() else "(does not exist)"
    return "\n".join([f"==> {log} <==", *text.splitlines()[-lines:]])


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("localhost", 0))
        return [one.getsockname()[1] for one in sockets]


@dataclass(frozen=True)
class Cluster:
    """A running cluster. Its processes, and those of its jobs, have SLURM_CONF = `conf` in their environment."""

    conf: Path
    jobs: list["Job"] = field(default_factory=list, repr=False)

    def call(self, *command: str, **variables: str) -> str:
        """Runs one of Slurm's commands and returns what it printed."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment() | variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return kept | {"SLURM_CONF": str(self.conf), "PATH": PATH}

    def idle_nodes(self) -> int:
        """How many nodes wait for a job; 0 as long as the controller does not answer."""
        command = ("sinfo", "--noheader", "--format=%D", "--states=idle")
        answer = subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=False).stdout
        return int(answer.strip() or 0)

    def submit(self, recipe: Path, log: Path, **variables: str) -> "Job":
        """Submits launch/slurm.sbatch with one process on each node; variables are those of its site block."""
        sizes = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1")
        ours = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "NPROC": "1", "OMP_NUM_THREADS": "1"}
        ours |= {"PORT": str(free_ports(1)[0]), "CUDA_VISIBLE_DEVICES": ""} | variables
        command = ("sbatch", "--parsable", *sizes, f"--output={log}", "launch/slurm.sbatch", str(recipe))
        self.jobs.append(Job(self, self.call(*command, **ours), log))
        return self.jobs[-1]

    def report(self) -> str:
        """What Slurm says of its nodes and of each job, and the ends of the logs of jobs and daemons."""
        parts = [self._answer("sinfo", "--Node", "--long")]
        for job in self.jobs:
            parts += [self._answer("scontrol", "show", "job", job.number), tail(job.log, 60)]
        parts += [tail(log, 20) for log in sorted(self.conf.parent.glob("*.log"))]
        return "\n\n".join(parts)

    def _answer(self, *command: str) -> str:
        """A command and all that it printed, also if it fails."""
        done = subprocess.run(
            command, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        return f"$ {' '.join(command)}\n{done.stdout.strip()}"

    def kill_all(self) -> None:
        """Kills the daemons and the processes of jobs: those that were started with this cluster's configuration."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == str(self.conf) or self._is_step_daemon(process):
                    process.kill()

    def _is_step_daemon(self, process: psutil.Process) -> bool:
        """slurmstepd overwrites its environment with its title, but has its node's log open."""
        logs = self.conf.parent
        return process.name().startswith("slurmstepd") and any(
            Path(file.path).is_relative_to(logs) for file in process.open_files()
        )


@dataclass(frozen=True)
class Job:
    """A submitted job: its log and its processes, by what they do."""

    cluster: Cluster
    number: str
    log: Path

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def steps(self) -> list[int]:
        """The steps that were logged, in the order of the log; those after a restart may be logged again."""
        return [int(step) for step in re.findall(r"iteration +(\d+)/", self.text())]

    def wait_for_text(self, text: str) -> None:
        """Waits until the log has it; fails when the job ends before."""
        self._wait(lambda: text in self.text(), repr(text))

    def wait_for_steps(self, more: int = 3) -> None:
        """Waits until this many more steps are logged."""
        before = len(self.steps())
        self._wait(lambda: len(self.steps()) >= before + more, f"step {before + more}")

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        asked = time.monotonic()

        def met() -> bool:
            nonlocal asked
            if not condition() and time.monotonic() > asked + STATE_PAUSE_S:
                asked = time.monotonic()
                assert self.state() not in ENDED or condition(), f"job {self.number} ended without {what}"
            return condition()

        wait_for(met, f"{what} in {self.log}")

    def wait_for_state(self, *states: str) -> None:
        """Waits until the job has ended in one of the states."""
        wait_for(lambda: self.state() in states, f"the end of job {self.number}", pause=STATE_PAUSE_S)

    def shown(self, name: str) -> str:
        """One field of `scontrol show job`."""
        fields = self.cluster.call("scontrol", "--oneliner", "show", "job", self.number).split()
        return next(field.partition("=")[2] for field in fields if field.startswith(f"{name}="))

    def state(self) -> str:
        return self.shown("JobState")

    def agent(self, node: str) -> psutil.Process:
        """The torchrun agent of a node, whose child is the node's rank."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                variables = process.environ()
                ours = variables.get("SLURM_CONF") == str(self.cluster.conf)
                here = variables.get("SLURM_JOB_ID") == self.number and variables.get("SLURMD_NODENAME") == node
                if ours and here and process.cmdline()[1:3] == ["-m", "megatron_sfr.agent"]:
                    return process
        raise AssertionError(f"job {self.number} has no agent on {node}")

    def rank(self, node: str) -> psutil.Process:
        (rank,) = self.agent(node).children()
        return rank

    def data_worker(self, node: str) -> psutil.Process:
        """One of the node's DataLoader workers, by the name that PyTorch gives them."""
        return next(child for child in self.rank(node).children() if child.name() == "pt_data_worker")


@contextlib.contextmanager
def running(root: Path) -> Iterator[Cluster]:
    """Starts the daemons, with all their files under root; at the end kills them and what jobs left behind."""
    conf = root / "slurm.conf"
    host, ports = socket.gethostname().partition(".")[0], free_ports(3)
    text = Template((Path(__file__).parent / "slurm.conf").read_text())
    named = dict(zip(("controller_port", "first_port", "second_port"), ports, strict=True))
    conf.write_text(text.substitute(named, root=root, host=host, cpus=os.cpu_count() or 1))
    (root / "state").mkdir()
    key = root / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munged.seed"}
    munged = ["munged", "--foreground", "--force", *(f"--{option}={root / name}" for option, name in files.items())]
    cluster = Cluster(conf)
    slurm = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    daemons = []
    with (root / "daemons.log").open("wb") as log:
        try:
            for command in (munged, *slurm):
                daemons.append(
                    subprocess.Popen(command, env=cluster.environment(), stdout=log, stderr=log, start_new_session=True)
                )
                if command is munged:
                    wait_for((root / "munge.socket").exists, "munged", 30)
            wait_for(lambda: cluster.idle_nodes() == len(NODES), "two idle nodes", 60)
            yield cluster
        except BaseException as error:  # a timeout of pytest, too
            error.add_note(cluster.report())
            raise
        finally:
            cluster.kill_all()
            for daemon in daemons:
                daemon.wait()
