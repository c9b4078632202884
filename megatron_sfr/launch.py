"""Starts torchrun on this machine and shows one progress bar. Megatron's own output goes to a log file."""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_sfr.config.recipe import check_recipes, naming, read_recipe, split_recipes
from megatron_sfr.hf.megatron.tracker import newest
from megatron_sfr.runtime import lifetime
from megatron_sfr.runtime.failures import failure, marked, record_end
from megatron_sfr.storage.lock import hold
from megatron_sfr.storage.user_files import has_type, parse_json, positive_integer
from megatron_sfr.train import ERROR, LOCK_WAIT_S, LOG, WARNING

SHUTDOWN_S = 600  # torchrun kills a worker that is still writing its last checkpoint after this long
POLL_S = 0.25
LOSSES = ("lm loss", "sfr loss", "kl-flow loss")
SPEED = {"speed/tokens per second": ("tokens/s", ",.0f"), "speed/MFU": ("MFU", ".0%")}
"""Other metrics on the bar: their labels and formats."""


@dataclass(frozen=True)
class Run:
    """The properties of a run that the progress bar needs."""

    save: Path
    train_iters: int
    any_format: bool = False
    """Whether checkpoints have another format than torch_dist, the only one that shows whether it is complete."""
    skips_training: bool = False


def command(recipe: Path, nproc: int, flags: Sequence[str], max_restarts: int = 0) -> list[str]:
    """The torchrun command of a run on one machine."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)),
        *("--max-restarts", str(max_restarts), "-m", "megatron_sfr.train", "--recipe", str(recipe), *flags),
    ]


def variables(max_restarts: int) -> dict[str, str]:
    """Environment variables for torchrun. Versions of torch that do not know a variable ignore it."""
    # The same as --shutdown-timeout, which torch has had since 2.12: torch 2.11 refuses the flag and waits 30 seconds.
    read = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_S)}
    if max_restarts:
        # By default torchrun keeps one store for all attempts, in which new ranks find the addresses of dead ones:
        # "Connection refused" (pytorch/pytorch#135712, #167288; seen with torch 2.13). So rank 0 makes a new store.
        read["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return read


def read_run(recipe: Path, flags: Sequence[str]) -> Run:
    """Reads a run's folder and size from recipe and flags, without importing Megatron.

    Raises:
        ValueError: one of them is missing, or an option is unknown or has a value of another type.
    """
    more, flags = split_recipes(flags)
    recipes = [recipe, *more]
    check_recipes(recipes, flags)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names = ("save", "train_iters", "micro_batch_size", "global_batch_size", "seq_length")
    for name in (*names, "ckpt_format", "train_epochs", "sfr_packing", "context_parallel_size", "split"):
        parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}")
    parser.add_argument("--skip-train", "--skip_train", action="store_true", default=None)
    for name in ("train_data_path", "data_path"):
        parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", nargs="*")
    given = vars(parser.parse_known_args(flags)[0])
    keys: dict[str, Any] = {}
    for path in recipes:  # later ones take precedence
        keys |= {key.replace("-", "_"): value for key, value in read_recipe(path).items()}
    keys |= {key: value for key, value in given.items() if value is not None}
    if keys.get("train_epochs") is not None:
        from megatron_sfr.training.data.epochs import train_iters_of

        keys["train_iters"] = train_iters_of(keys)
    keys.setdefault("global_batch_size", keys.get("micro_batch_size"))
    for name in names:
        if keys.get(name) is None:
            raise ValueError(
                f"{recipe}: {name} is missing; megatron-sfr train needs it (or --{name.replace('_', '-')})"
            )
    with naming([recipe]):
        sizes = {name: positive_integer(name, keys[name]) for name in names if name != "save"}
    any_format = keys.get("ckpt_format", "torch_dist") != "torch_dist"
    return Run(Path(str(keys["save"])), sizes["train_iters"], any_format, keys.get("skip_train") is True)


def train(
    recipe: Path,
    nproc: int,
    flags: Sequence[str] = (),
    *,
    max_restarts: int = 0,
    verbose: bool = False,
    title: str = "train",
) -> None:
    """Runs a recipe on nproc processes of this machine until its end.

    Ctrl-C, SIGTERM and SIGHUP are passed on: the run finishes its step and writes a checkpoint. A second Ctrl-C or
    SIGTERM kills the run.

    Args:
        max_restarts: how often all processes restart from the last checkpoint after one of them has failed.
        verbose: whether to show Megatron's output instead of the progress bar.
        title: the first word of each printed line.
    Raises:
        ValueError: the training fails. The message has one line.
        KeyboardInterrupt: the run was stopped by a signal.
    """
    lifetime.outlive_terminal()
    run = read_run(recipe, flags)
    with hold(run.save, inside=True, wait=LOCK_WAIT_S):
        pass  # fails here, before anything is started; the run's first rank then holds the lock
    if _is_finished(run, title) and not run.skips_training:
        return
    log = run.save / "logs" / time.strftime(LOG)
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // nproc))
    if not verbose:
        print(f"{title}: {run.train_iters} steps on {nproc} processes; Megatron's output: {log}", flush=True)
    tell = _warnings(log, title)
    with log.open("wb") as sink:
        process = subprocess.Popen(
            lifetime.tied(command(recipe, nproc, flags, max_restarts)),
            stdout=None if verbose else sink,
            stderr=None if verbose else subprocess.STDOUT,
            env={"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"} | variables(max_restarts) | os.environ,
            start_new_session=True,  # the terminal's Ctrl-C reaches the workers once, through us
        )
        stopped = _wait(process, None if verbose else _bar(run, title, tell))
    if not verbose:
        tell()
    if stopped:
        record_end(run.save)  # the first rank may have been killed, or stopped before it could
        print(f"{title}: stopped; the same command resumes from the last checkpoint in {run.save}", flush=True)
        raise KeyboardInterrupt
    if code := process.returncode:
        raise ValueError(f"training failed with exit code {code}" if verbose else failure(log, ERROR, returncode=code))


def _warnings(log: Path, title: str) -> Callable[[], None]:
    """A function that prints the warnings in the log of a run, each once."""
    told: set[str] = set()

    def tell() -> None:
        for warning in marked(log, WARNING):
            if warning not in told:
                told.add(warning)
                tqdm.write(f"{title}: warning: {warning}")

    return tell


def _is_finished(run: Run, title: str) -> bool:
    """Whether the run has the checkpoint of its last step. Upstream, if restarted, would request further samples."""
    found = newest(run.save, any_format=run.any_format)
    if found is not None and found.note is not None:
        print(f"{title}: {found.note}", flush=True)
    if found is None or found.step < run.train_iters:
        return False
    had = f" (it has {found.step})" if found.step > run.train_iters else ""
    print(f"{title}: {run.save} has all {run.train_iters} steps already{had}", flush=True)
    return True


def _wait(process: subprocess.Popen, bar: Iterator[None] | None) -> bool:
    """Waits for the process and updates the bar. Passes signals on; returns whether there was one."""
    received: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        received.append(number)
        if len(received) == 1:
            process.send_signal(signal.SIGTERM)
            print("\nstopping after this step ... (a second Ctrl-C or SIGTERM kills the run)", flush=True)
        elif number != signal.SIGHUP:  # a shell sends it a second time
            process.kill()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup
        numbers.append(signal.SIGHUP)
    old = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        while process.poll() is None:
            if bar is not None:
                next(bar)
            time.sleep(POLL_S)
        if bar is not None:
            next(bar)
    finally:
        process.kill()  # after an error here; else it has ended
        for number, handler in old.items():
            signal.signal(number, handler)
        if bar is not None:
            bar.close()  # type: ignore[attr-defined]
    return bool(received)


def _bar(run: Run, title: str, begun: Callable[[], None] = lambda: None) -> Iterator[None]:
    """A generator that reads new lines of the run's metrics each time, and draws the bar.

    begun: called at the first step.
    """
    speed: dict[str, str] = {}
    with tqdm(total=run.train_iters, desc=title, unit="step", dynamic_ncols=True, smoothing=0.1) as bar:
        started = False
        for rows in new_rows(run.save / "metrics.jsonl"):
            for row in rows:
                if not row.keys() & {"lm loss", "kl-flow loss"}:
                    continue
                if not started:  # a resumed run starts at its current step
                    bar.initial = bar.n = row["step"] - 1
                    started = True
                    begun()
                losses = {name: f"{row[name]:.3f}" for name in LOSSES if name in row}
                speed |= {label: f"{row[name]:{form}}" for name, (label, form) in SPEED.items() if name in row}
                bar.set_postfix(losses | speed, refresh=False)
                bar.update(row["step"] - bar.n)
            yield


def new_rows(metrics: Path) -> Iterator[list[dict[str, Any]]]:
    """Yields the records that were added since the last time, starting at the current end of the file.

    A resumed run replaces the file by its beginning (training/metrics_log.py). Records from before that are not new.
    """
    began = time.time()
    old = metrics.stat() if metrics.exists() else None
    inode, offset, replaced = (old.st_ino, old.st_size, False) if old else (None, 0, False)
    while True:
        text = b""
        if metrics.exists():
            with metrics.open("rb") as file:
                now = os.fstat(file.fileno()).st_ino
                if inode is not None and now != inode:
                    offset, replaced = 0, True
                inode = now
                file.seek(offset)
                text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        offset += len(whole)
        rows = [row for line in whole.splitlines() if (row := _metrics(line)) is not None]
        yield [row for row in rows if not replaced or row["time"] >= began]


def _metrics(line: bytes) -> dict[str, Any] | None:
    """The metrics of a step; None for a line that no run has written, which must not end the one that is running."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    known = isinstance(row, dict) and has_type(row.get("step"), int) and has_type(row.get("time"), float)
    return row if known else None


def show(recipe: Path, nproc: int, flags: Sequence[str], max_restarts: int = 0) -> str:
    """The command with its environment variables, quoted for a shell."""
    settings = [f"{name}={value}" for name, value in variables(max_restarts).items()]
    return shlex.join([*settings, *command(recipe, nproc, flags, max_restarts)])
