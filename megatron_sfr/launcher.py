"""Starts torchrun on this machine and shows the training as one progress bar; Megatron's own output goes to a log."""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_sfr.recipe import read_recipe
from megatron_sfr.runtime.user_files import shown
from megatron_sfr.train import ERROR

SHUTDOWN_S = 600  # torchrun kills a worker that is still writing its last checkpoint after this long
POLL_S = 0.25
LOSSES = ("lm loss", "sfr loss", "kl-flow loss")


@dataclass(frozen=True)
class Run:
    """What the bar needs to know of a run."""

    save: Path
    train_iters: int
    tokens_per_step: int


def command(recipe: Path, nproc: int, flags: Sequence[str]) -> list[str]:
    """The torchrun command of a run on one machine."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)),
        *("--shutdown-timeout", str(SHUTDOWN_S), "-m", "megatron_sfr.train", "--recipe", str(recipe), *flags),
    ]


def read_run(recipe: Path, flags: Sequence[str]) -> Run:
    """The run's folder and size from recipe and flags, without importing Megatron. ValueError where one is missing."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", type=Path, action="append", default=[])  # more recipes; later ones win
    names = ("save", "train_iters", "micro_batch_size", "global_batch_size", "seq_length")
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}")
    given = vars(parser.parse_known_args(list(flags))[0])
    keys: dict[str, Any] = {}
    for path in (recipe, *given.pop("recipe")):
        keys |= {key.replace("-", "_"): value for key, value in read_recipe(path).items()}
    keys |= {key: value for key, value in given.items() if value is not None}
    keys.setdefault("global_batch_size", keys.get("micro_batch_size"))
    for name in names:
        if keys.get(name) is None:
            raise ValueError(
                f"{recipe}: {name} is missing; megatron-sfr train needs it (or --{name.replace('_', '-')})"
            )
    sizes = {name: _whole_number(recipe, name, keys[name]) for name in names if name != "save"}
    tokens = sizes["global_batch_size"] * sizes["seq_length"]
    return Run(Path(str(keys["save"])), sizes["train_iters"], tokens)


def _whole_number(recipe: Path, name: str, value: Any) -> int:
    try:
        return int(str(value))
    except ValueError as error:
        raise ValueError(f"{recipe}: {name} is {shown(str(value))}; give a whole number") from error


def train(recipe: Path, nproc: int, flags: Sequence[str] = (), *, verbose: bool = False, title: str = "train") -> None:
    """Runs a recipe on nproc processes of this machine until its end.

    Ctrl-C and SIGTERM are passed on once: the run finishes its step, writes a checkpoint, and KeyboardInterrupt rises
    here. Raises ValueError, in one line, if the training fails. verbose: no bar, Megatron's output as it comes.
    """
    run = read_run(recipe, flags)
    if _is_finished(run) and "--skip-train" not in flags:
        print(f"{title}: {run.save} has all {run.train_iters} steps already", flush=True)
        return
    logs = run.save / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / time.strftime("train-%Y%m%d-%H%M%S.log")
    threads = str(max(1, (os.cpu_count() or 1) // nproc))
    environment = {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"} | os.environ
    if not verbose:
        print(f"{title}: {run.train_iters} steps on {nproc} processes; Megatron's output: {log}", flush=True)
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command(recipe, nproc, flags),
            stdout=None if verbose else sink,
            stderr=None if verbose else subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # the terminal's Ctrl-C reaches the workers once, through us
        )
        stopped = _wait(process, None if verbose else _bar(run, title))
    if stopped:
        print(f"{title}: stopped; the same command goes on from the last checkpoint in {run.save}", flush=True)
        raise KeyboardInterrupt
    if process.returncode != 0:
        raise ValueError(f"training failed with exit code {process.returncode}" if verbose else failure(log))


def _is_finished(run: Run) -> bool:
    """Whether the last step's checkpoint is there: upstream, started again, would ask for samples beyond the last."""
    newest = run.save / "latest_checkpointed_iteration.txt"
    return newest.is_file() and newest.read_text(encoding="utf-8").strip() == str(run.train_iters)


def _wait(process: subprocess.Popen, bar: Iterator[None] | None) -> bool:
    """Waits for the process, moving the bar; passes a signal on and tells whether there was one."""
    received: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        if not received:
            print("\nstopping after this step ...", flush=True)
            process.send_signal(signal.SIGTERM)
        received.append(number)

    old = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while process.poll() is None:
            if bar is not None:
                next(bar)
            time.sleep(POLL_S)
        if bar is not None:
            next(bar)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        if bar is not None:
            bar.close()  # type: ignore[attr-defined]
    return bool(received)


def _bar(run: Run, title: str) -> Iterator[None]:
    """A generator that reads new lines of the run's metrics at each step and draws the bar."""
    metrics = run.save / "metrics.jsonl"
    offset = metrics.stat().st_size if metrics.exists() else 0
    last: dict[str, Any] | None = None
    with tqdm(total=run.train_iters, desc=title, unit="step", dynamic_ncols=True, smoothing=0.1) as bar:
        while True:
            text = b""
            if metrics.exists():
                with metrics.open("rb") as file:
                    file.seek(offset)
                    text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            offset += len(whole)
            for line in whole.splitlines():
                row = json.loads(line)
                if not row.keys() & {"lm loss", "kl-flow loss"}:
                    continue
                shown = {name: f"{row[name]:.3f}" for name in LOSSES if name in row}
                if last is not None and row["time"] > last["time"]:
                    rate = run.tokens_per_step * (row["step"] - last["step"]) / (row["time"] - last["time"])
                    shown["tokens/s"] = f"{rate:,.0f}"
                elif last is None:  # a resumed run starts where it stands
                    bar.initial = bar.n = row["step"] - 1
                bar.set_postfix(shown, refresh=False)
                bar.update(row["step"] - bar.n)
                last = row
            yield


def failure(log: Path, mark: str = ERROR, what: str = "training") -> str:
    """One line that says why a run failed, from its log: what follows the mark, or the first Python error."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if found := re.findall(rf"^.*{re.escape(mark)} (.*)$", text, flags=re.MULTILINE):
        return found[0]
    raised = re.findall(r"^(?:\[rank\d+\]: *)?(\w*(?:Error|Exception)\b: .*)$", text, flags=re.MULTILINE)
    reason = raised[0] if raised else "no Python error was printed (out of memory?)"
    return f"{what} failed: {reason[:300]}; see {log}"


def show(recipe: Path, nproc: int, flags: Sequence[str]) -> str:
    """The command, quoted for a shell."""
    return shlex.join(command(recipe, nproc, flags))
