"""Kills of one training through its real launcher, `megatron-sfr train --max-restarts`, up to a given number.

A rank, one of its processes, torchrun or the launcher is killed, in a step or while it starts. torchrun starts ranks
again by itself; after its own end or the launcher's the same command is given again, once nothing of it lives. In the
end tensors and logged losses must be those of an undisturbed run.
"""

import collections
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from tqdm import tqdm

from tools.faults.fork_server import LEFT_ALIVE_S, run
from tools.faults.fuzz import digest
from tools.faults.materials import Program

MARK = "MEGATRON_SFR_KILLED_RUN"
VICTIMS = {"rank": 9, "process of a rank": 6, "torchrun": 2, "launcher": 3}
STEPS = "--num-workers 2 --save-interval 4 --train-iters {steps}"
PATIENCE_S = 600


@dataclass
class Training:
    """What became of the run."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    starts: int = 0
    wrong: list[str] = field(default_factory=list)


class Killed:
    """The run, and who of it lives."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps, self.starts = folder, steps, 0
        self.log = open(folder.with_suffix(".log"), "ab")  # noqa: SIM115
        self.start()

    def start(self) -> None:
        flags = f"--save out --max-restarts 1000 {STEPS.format(steps=self.steps)}".split()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatron_sfr.cli", "train", "recipe.yaml", *flags],
            cwd=self.folder,
            env=os.environ | {MARK: str(self.folder)},
            stdout=self.log,
            stderr=self.log,
        )
        self.starts += 1

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def of_kind(self, kind: str) -> list[psutil.Process]:
        """The living processes of one of the kinds of VICTIMS."""
        if kind == "launcher":
            return [psutil.Process(self.process.pid)]
        agents = psutil.Process(self.process.pid).children()
        ranks = [child for agent in agents for child in agent.children()]
        if kind == "torchrun":
            return agents
        return ranks if kind == "rank" else [child for rank in ranks for child in rank.children(recursive=True)]

    def ended_within(self, seconds: float) -> list[str]:
        """Who lives after so long."""
        end = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < end:
            self.process.poll()
            time.sleep(0.1)
        return [" ".join(process.cmdline())[-120:] for process in left]

    def step_since(self, moment: float) -> bool:
        path = self.folder / "out/metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        try:
            return bool(lines) and json.loads(lines[-1])["time"] > moment
        except ValueError:  # a line that is being written
            return False


def kill_training(inputs: Path, work: Path, kills: int, seed: int, steps: int) -> Training:
    """Trains once undisturbed in a fork, then through the launcher under kills, and compares."""
    undisturbed, folder = work / "undisturbed", work / "training"
    for copy in (undisturbed, folder):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(inputs, copy)
    ended = run(Program(f"rank --recipe recipe.yaml --save out {STEPS.format(steps=steps)}"), undisturbed)
    assert ended.code == 0, ended.error
    rng, result, running = random.Random(seed), Training(), Killed(folder, steps)
    try:
        with tqdm(total=kills, unit="kill", dynamic_ncols=True) as bar:
            while result.kills.total() < kills and _kill_one(running, rng, result):
                bar.update()
        if running.process.wait(PATIENCE_S) != 0:
            result.wrong.append(f"exit {running.process.returncode} at the end")
        if left := running.ended_within(LEFT_ALIVE_S):
            result.wrong.append(f"left alive at the end: {left}")
    finally:
        for process in running.processes():
            process.kill()
        running.process.wait()
    result.starts = running.starts
    found, expected = (_result(folder, steps) for folder in (folder, undisturbed))
    result.wrong += [f"differs: {name}" for name in expected if found.get(name) != expected[name]]
    return result


def _result(folder: Path, steps: int) -> dict[str, str]:
    """The digests of the last checkpoint's tensors and of the log of losses."""
    names = (f"out/iter_{steps:07d}/.metadata", "out/metrics.jsonl")
    return {name: sha for name, sha in digest(folder).items() if name in names}


def _kill_one(running: Killed, rng: random.Random, result: Training) -> bool:
    """Kills a process of the run; False once the run has ended by itself."""
    kind = rng.choices(list(VICTIMS), list(VICTIMS.values()))[0]
    began, in_start = time.time(), rng.random() < 0.2
    delay = rng.random() * (10 if in_start else 1.5)
    while not (in_start or running.step_since(began)):
        if running.process.poll() is not None or time.time() - began > PATIENCE_S:
            return False
        time.sleep(0.05)
    time.sleep(delay)
    try:
        victims = running.of_kind(kind)
        if not victims:
            return running.process.poll() is None
        rng.choice(victims).kill()
    except psutil.NoSuchProcess:
        return running.process.poll() is None
    result.kills[kind] += 1
    if kind in ("torchrun", "launcher"):
        if left := running.ended_within(LEFT_ALIVE_S):
            result.wrong.append(f"left alive after the {kind} was killed: {left}")
        running.process.wait(PATIENCE_S)
        running.start()
    return True


def table(result: Training) -> str:
    """How many kills hit what."""
    rows = [f"{kind:<18}  {result.kills[kind]:>5}" for kind in VICTIMS]
    return "\n".join(
        [*rows, f"{'all':<18}  {result.kills.total():>5}  kills, {result.starts} starts by hand", *result.wrong]
    )
