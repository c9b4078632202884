"""Kills of trainings through their real launcher, `megatron-sfr train --max-restarts`, up to a given number.

A rank, one of its processes, torchrun or the launcher is killed: while it starts, in a step, or while a checkpoint is
written. torchrun restarts ranks by itself; after its own end or the launcher's the same command is given again, once no
process of the run lives. Each training is killed several times before it may end. Then its tensors and its logged
losses must be those of an undisturbed training. One training in six has two ranks. The launcher, torchrun and ranks are
forks (forked_commands.py) that keep who starts whom.
"""

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from tqdm import tqdm

from megatron_sfr.cli import main
from megatron_sfr.hf.megatron.tracker import incomplete
from tools.faults.fork_server import Forked, Limits
from tools.faults.forked_commands import fork_commands
from tools.faults.fuzz import digest

VICTIMS = {"rank": 9, "process of a rank": 6, "torchrun": 2, "launcher": 3}
MOMENTS = {"step": 5, "save": 4, "start": 2}
OPTIONS = "--save out --max-restarts 1000 --num-workers 2 --save-interval 3"
KILLS = 10  # of one training, before it may end
PATIENCE_S = 3600


@dataclass
class Training:
    """What was done to one training, and what was wrong with it."""

    seed: str
    nproc: int
    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VICTIMS, 0))
    """How often which kind of process was killed."""
    starts: int = 0
    """How often the command was given."""
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Launched:
    """The launcher's program. What it starts are forks."""

    line: str

    def __call__(self) -> int:
        fork_commands()
        return main(self.line.split())


class Running:
    """A training's command, and the processes that it started."""

    def __init__(self, folder: Path, nproc: int, steps: int) -> None:
        self.folder, self.nproc, self.steps, self.starts = folder, nproc, steps, 0
        self.start()

    def start(self) -> None:
        line = f"train recipe.yaml --nproc {self.nproc} --train-iters {self.steps} {OPTIONS}"
        self.command = Forked(Launched(line), self.folder, Limits(cpu_s=PATIENCE_S, wall_s=PATIENCE_S))
        self.starts += 1

    def of_kind(self, kind: str) -> list[psutil.Process]:
        """The living processes of one of the kinds of VICTIMS."""
        if kind == "launcher":
            return [psutil.Process(self.command.pid)]
        agents = psutil.Process(self.command.pid).children()
        ranks = [child for agent in agents for child in agent.children()]
        if kind == "torchrun":
            return agents
        return ranks if kind == "rank" else [child for rank in ranks for child in rank.children(recursive=True)]

    def has_stepped_since(self, moment: float) -> bool:
        path = self.folder / "out/metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        try:
            return bool(lines) and json.loads(lines[-1])["time"] > moment
        except ValueError:  # a line that is being written
            return False

    def is_saving_since(self, moment: float) -> bool:
        """Whether a checkpoint that was begun since then is being written."""
        try:
            newest = max((self.folder / "out").glob("iter_*"), key=lambda path: path.name, default=None)
            return newest is not None and newest.stat().st_ctime > moment and bool(incomplete(newest))
        except FileNotFoundError:
            return False


class Killer:
    """Trains on copies of the inputs, and kills."""

    def __init__(self, inputs: Path, work: Path, steps: int, killed: Callable[[int], object]) -> None:
        self.inputs, self.work, self.steps, self.killed = inputs, work, steps, killed

    def training(self, seed: str, nproc: int) -> Training:
        """Kills one training KILLS times, lets it end and compares."""
        expected = self._undisturbed(nproc)
        rng, found = random.Random(seed), Training(seed, nproc)
        running = Running(self._copy("training"), nproc, self.steps)
        while (before := sum(found.kills.values())) < KILLS and _kill_one(running, rng, found):
            self.killed(sum(found.kills.values()) - before)
        ended = running.command.wait()
        if ended.code != 0:
            found.wrong.append(f"exit {ended.code} at the end: {ended.error[-500:]}")
        if ended.left:
            found.wrong.append(f"left alive at the end: {ended.left}")
        found.starts = running.starts
        output = self._result(running.folder)
        found.wrong += [f"differs: {name}" for name in expected if output.get(name) != expected[name]]
        if found.wrong:
            shutil.copytree(running.folder, self.work / f"wrong-{seed.replace('/', '-')}", dirs_exist_ok=True)
        return found

    def _undisturbed(self, nproc: int) -> dict[str, str]:
        path = self.work / f"undisturbed-{nproc}-{self.steps}.json"
        if not path.exists():
            running = Running(self._copy(path.stem), nproc, self.steps)
            ended, output = running.command.wait(), self._result(running.folder)
            if ended.code != 0 or len(output) != 2:
                raise RuntimeError(f"{running.folder}: exit {ended.code}, {output}: {ended.error}")
            path.write_text(json.dumps(output), encoding="utf-8")
        expected: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        return expected

    def _result(self, folder: Path) -> dict[str, str]:
        """The digests of the last checkpoint's tensors and of the log of losses."""
        names = (f"out/iter_{self.steps:07d}/.metadata", "out/metrics.jsonl")
        return {name: sha for name, sha in digest(folder).items() if name in names}

    def _copy(self, name: str) -> Path:
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.inputs, folder)
        return folder


def _kill_one(running: Running, rng: random.Random, found: Training) -> bool:
    """Kills a process of the training; False once it has ended by itself."""
    kind, moment = _drawn(VICTIMS, rng), _drawn(MOMENTS, rng)
    began = time.time()
    reached = {"start": lambda _: True, "step": running.has_stepped_since, "save": running.is_saving_since}[moment]
    delay = rng.random() * {"start": 10, "step": 1.5, "save": 0.1}[moment]
    while not reached(began):
        if running.command.has_ended() or time.time() - began > PATIENCE_S:
            return False
        time.sleep(0.002 if moment == "save" else 0.05)
    time.sleep(delay)
    try:
        if not (victims := running.of_kind(kind)):
            return not running.command.has_ended()
        rng.choice(victims).kill()
    except psutil.NoSuchProcess:
        return not running.command.has_ended()
    found.kills[kind] += 1
    if kind in ("torchrun", "launcher"):
        if left := running.command.wait().left:
            found.wrong.append(f"left alive after the {kind} was killed: {left}")
        running.start()
    return True


def _drawn(weights: dict[str, int], rng: random.Random) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def kill_training(inputs: Path, work: Path, kills: int, seed: int, steps: int) -> list[Training]:
    """Trainings, up to a given number of kills. Each becomes a line of WORK/trainings-SEED.jsonl; those in it count."""
    path = work / f"trainings-{seed}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    made = [Training(**json.loads(line)) for line in lines]
    with tqdm(total=kills, unit="kill", dynamic_ncols=True) as bar, path.open("a", encoding="utf-8") as file:
        bar.update(sum(sum(training.kills.values()) for training in made))
        killer = Killer(inputs, work, steps, killed=bar.update)
        while sum(sum(training.kills.values()) for training in made) < kills:
            number = len(made)
            made.append(killer.training(f"{seed}/{number}", 2 if number % 6 == 1 else 1))
            file.write(json.dumps(asdict(made[-1])) + "\n")
            file.flush()
            for what in made[-1].wrong:
                bar.write(f"{made[-1].seed}: {what}")
    return made


def table(made: list[Training]) -> str:
    """How many kills hit what."""
    kills = {kind: sum(training.kills[kind] for training in made) for kind in VICTIMS}
    starts, wrong = sum(training.starts for training in made), [what for training in made for what in training.wrong]
    rows = [f"{kind:<18}  {kills[kind]:>5}" for kind in VICTIMS]
    return "\n".join(
        [*rows, f"{'all':<18}  {sum(kills.values()):>5}  kills of {len(made)} trainings, {starts} starts", *wrong]
    )
