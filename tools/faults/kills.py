"""Kills of every command at random moments: the same command again must end with the output of an undisturbed one.

A moment is a number of system calls (a file opened, renamed, removed, a folder made) or a share of the command's time.
One kill in four hits a process that the command started, not the command. After each kill no process may be left, and
what has its final name must have its final bytes.
"""

import collections
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from tqdm import tqdm

from tools.faults.fork_server import POLL_S, Ended, Forked, Limits, run
from tools.faults.fuzz import digest
from tools.faults.materials import COMMANDS, TRAIN, Program

EVENTS = frozenset(
    [
        "open",
        "os.rename",
        "os.remove",
        "os.mkdir",
        "os.rmdir",
        "os.truncate",
        "os.link",
        "shutil.rmtree",
        "mmap.__new__",
    ]
)
MOST_KILLS = 3  # of one command, before it may end
PARTIAL = ("embed", "rank")
"""Commands that fill their output in place, and record in it how much there is."""
GROWING = ("watch.jsonl", "watch.html")
"""Files that are replaced with each step of a run: complete after a kill, though not what they will be."""
KILLED = {
    name: COMMANDS[name].replace("--workers 1", "--workers 2")
    for name in (
        *("prepare", "prepare, skipping", "prepare-text", "embed", "import", "export", "export head", "generate"),
        *("flow infill", "evaluate", "evaluate-code", "write prompts", "diagnose", "diagnose head", "calibrate"),
        *("inspect", "verify", "recipe", "watch"),
    )
} | {
    "export, shards": COMMANDS["export"] + " --max-shard-gb 0.00002 --workers 2",
    "embed, workers": COMMANDS["embed"] + " --workers 2 --batch-size 8",
    "generate, long": COMMANDS["generate"].replace("--samples 1", "--samples 12 --batch-size 3"),
    "page": "inspect --data prepared --seed 1 --html out.html",
    "rank": f"rank {TRAIN.replace('--train-iters 1', '--train-iters 8')} --save-interval 2 --load out --num-workers 2",
}
WEIGHTS = {"rank": 4, "prepare": 2, "embed, workers": 2, "export, shards": 2, "generate, long": 3}


@dataclass
class Series:
    """Kills of one command until it ended, and what was wrong."""

    command: str
    seed: str
    kills: int = 0
    late: int = 0
    """Kills that came after the end of the command."""
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Undisturbed:
    """A command that nothing stopped: its output, how many events it had and how long it took."""

    output: dict[str, str]
    events: int
    seconds: float


@dataclass(frozen=True)
class Counted:
    """A program that kills itself at an event, or writes how many there were to a file."""

    program: Callable[[], int]
    last: int | None = None
    total: Path | None = None

    def __call__(self) -> int:
        count = 0

        def hook(event: str, _: object) -> None:
            nonlocal count
            if event in EVENTS and os.getpid() == process:
                count += 1
                if count == self.last:
                    os.kill(process, signal.SIGKILL)

        process = os.getpid()
        sys.addaudithook(hook)
        try:
            return self.program()
        finally:
            if self.total is not None:
                self.total.write_text(str(count), encoding="utf-8")


class Killer:
    """Runs commands on copies of the inputs and kills them."""

    def __init__(self, inputs: Path, work: Path) -> None:
        self.inputs, self.work = inputs, work
        self._undisturbed: dict[str, Undisturbed] = {}

    def series(self, command: str, seed: str) -> Series:
        """Kills a command one to three times, then lets it end, and compares."""
        expected = self._once(command)
        rng, found = random.Random(seed), Series(command, seed)
        folder = self._copy()
        for _ in range(rng.choice([1, 1, 2, MOST_KILLS])):
            ended = self._killed(command, folder, expected, rng)
            if ended.left:
                found.wrong.append(f"left alive: {ended.left}")
            if ended.code == 0:
                found.late += 1
                break
            found.kills += 1
            found.wrong += self._half_written(command, folder, expected)
        ended = run(Program(KILLED[command]), folder)
        if ended.code != 0:
            found.wrong.append(f"exit {ended.code} again: {ended.error.strip()[-500:]}")
        elif (output := digest(folder)) != expected.output:
            differ = sorted(
                k for k in output.keys() | expected.output.keys() if output.get(k) != expected.output.get(k)
            )
            found.wrong.append(f"other output: {', '.join(differ[:8])}")
        return found

    def _once(self, command: str) -> Undisturbed:
        """The undisturbed command; all are deterministic."""
        if command not in self._undisturbed:
            folder, total = self._copy(), self.work / "events"
            total.unlink(missing_ok=True)
            ended = run(Counted(Program(KILLED[command]), total=total), folder)
            assert ended.code == 0, f"{command}: {ended.error}"
            # A rank leaves without its `finally`: then only shares of its time are drawn.
            events = int(total.read_text(encoding="utf-8")) if total.exists() else 0
            self._undisturbed[command] = Undisturbed(digest(folder), events, ended.seconds)
        return self._undisturbed[command]

    def _killed(self, command: str, folder: Path, expected: Undisturbed, rng: random.Random) -> Ended:
        program: Callable[[], int] = Program(KILLED[command])
        by_event = expected.events > 0 and rng.random() < 0.6
        if by_event:
            program = Counted(program, last=rng.randint(1, expected.events))
        running = Forked(program, folder, Limits())
        if not by_event:
            victim = rng.random() < 0.4
            moment = running.began + rng.random() * expected.seconds
            while time.monotonic() < moment and not running.has_ended():
                time.sleep(POLL_S)
            self._kill(running, rng if victim else None)
        return running.wait()

    def _kill(self, running: Forked, rng: random.Random | None) -> None:
        """Kills the command, or a process that it started where there is one."""
        if running.has_ended():
            return
        children = psutil.Process(running.pid).children(recursive=True) if rng is not None else []
        if rng is None or not children:
            running.kill()
        else:
            with suppress(psutil.NoSuchProcess):  # it has just ended by itself
                rng.choice(children).kill()

    def _half_written(self, command: str, folder: Path, expected: Undisturbed) -> list[str]:
        """Files under their final names that are not what they will be."""
        if command.split(",")[0] in PARTIAL:
            return []
        found = {name: sha for name, sha in digest(folder).items() if not any(p[0] == "." for p in Path(name).parts)}
        return [
            f"half written: {name}"
            for name, sha in found.items()
            if sha != expected.output.get(name) and Path(name).name not in GROWING
        ]

    def _copy(self) -> Path:
        folder = self.work / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.inputs, folder)
        return folder


def kill(inputs: Path, work: Path, kills: int, seed: int, commands: list[str]) -> list[Series]:
    """Series of kills over all commands, up to a given number. Each becomes a line of WORK/kills-SEED.jsonl; the series
    in it count and are not run again."""
    path, names = work / f"kills-{seed}.jsonl", commands or list(KILLED)
    made = [Series(**json.loads(line)) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    made = [series for series in made if series.command in names]
    killer, done, number = Killer(inputs, work), {series.seed for series in made}, 0
    with tqdm(total=kills, unit="kill", dynamic_ncols=True) as bar, path.open("a", encoding="utf-8") as file:
        bar.update(sum(series.kills for series in made))
        while sum(series.kills for series in made) < kills:
            name = f"{seed}/{number}"
            number += 1
            if name in done:
                continue
            command = random.Random(name).choices(names, [WEIGHTS.get(name, 1) for name in names])[0]
            series = killer.series(command, name)
            made.append(series)
            file.write(json.dumps(asdict(series)) + "\n")
            file.flush()
            for what in series.wrong:
                bar.write(f"{command} ({series.seed}): {what}")
            bar.update(series.kills)
            bar.set_postfix(wrong=sum(bool(x.wrong) for x in made))
    return made


def table(made: list[Series]) -> str:
    """Kills of each command, and how many series ended wrong."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for series in made:
        for name in (series.command, "all"):
            counts[name].update(series=1, kills=series.kills, late=series.late, wrong=bool(series.wrong))
    order = sorted(counts.keys() - {"all"}) + ["all"]
    rows = [f"{'command':<18}  kills  series  too late  wrong"]
    for name in order:
        c = counts[name]
        rows.append(f"{name:<18}  {c['kills']:>5}  {c['series']:>6}  {c['late']:>8}  {c['wrong']:>5}")
    return "\n".join(rows)
