"""Why a run failed, in one line: from the exception in the process itself, or from the log of all its processes.

Each rank that fails adds a line to a file in the run's folder, for runs whose log is elsewhere, as under Slurm.
"""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from megatron_sfr.storage.user_files import one_line, parse_json

_ENDS = {
    signal.SIGKILL: "out of memory is the usual reason (see the kernel's log: dmesg)",
    signal.SIGBUS: "a full /dev/shm is the usual reason",
    signal.SIGABRT: "a library aborted; its last lines in the log explain why",
}
_EARLY = "its last lines in the output say why, or it was killed, as when memory runs out (see the kernel's log: dmesg)"
_RANK, _KIND = r"(?:\[rank\d+\]: )?", r"(?:\w+\.)*\w*(?:Error|Exception)"
_RAISED = rf"^{_RANK}({_KIND}\b: .*)$"
_RAISED_BARE = rf"^{_RANK} +(\S.*)\n(?:{_RANK}[ ~^]+\n)?{_RANK}({_KIND})$"
"""An exception without a message, below the line of source that raised it."""
_NOT_FINITE = r"Unexpected result (-?nan|-?inf) on rank (\d+) at iteration #(\d+)[^\n]*?message='([^'\n]*)"
_LONGEST = 300
END_BYTES = 1 << 24
"""Of a log that are searched for a failure: its end, because the log of a long run may be larger than memory."""
_RECORD = "failures.jsonl"
_LOST = ("connection closed by peer", "connection reset by peer", "remote process exited")


def reason(error: BaseException) -> str:
    """An exception's message in one line; for one from a DataLoader worker its last line, without the traceback."""
    text = str(error)
    if "Original Traceback" in text:
        last = re.search(r"^(?:\w+\.)*(\w+)(?:: (.*))?", text.rpartition("\n  File ")[2], re.MULTILINE | re.DOTALL)
        name, text = (last[1], last[2] or "") if last else (type(error).__name__, text)
        text = text if name == "ValueError" else f"{name}: {text}"
    return one_line(text) or type(error).__name__


def failure(log: Path, mark: str, what: str = "training", returncode: int | None = None) -> str:
    """One line that says why a run failed, from its log.

    Args:
        log: the output of all its processes, and of torchrun.
        mark: what precedes the reason that a process gives itself.
        what: the subject of the sentence.
        returncode: of torchrun; negative if a signal ended it.
    """
    if (found := recorded_failure(log, mark, what)) is not None:
        return found
    if returncode is not None and returncode < 0:
        return f"{what} failed: torchrun was ended by {signal.Signals(-returncode).name}; see {log}"
    return f"{what} failed: no process said why; see {log}"


def recorded_failure(log: Path, mark: str, what: str = "training") -> str | None:
    """The failure that the end of a log records, in one line; None if it records none. Arguments as of `failure`."""
    with log.open("rb") as file, TextIOWrapper(file, "utf-8", "replace") as stream:
        file.seek(max(0, log.stat().st_size - END_BYTES))
        text = stream.read()
    # First what explains the rest: a rank that ends closes the connections of the others, who then say only that.
    if why := _killed(text) or _disk_full(text) or _not_finite(text):
        return f"{what} {why}; see {log}"
    if given := re.search(rf"^.*{re.escape(mark)} (.*)$", text, flags=re.MULTILINE):
        return _explained(given[1])
    raised = {m.end(): m[1] for m in re.finditer(_RAISED, text, flags=re.MULTILINE)}
    raised |= {m.end(): f"{m[2]}: {m[1]}" for m in re.finditer(_RAISED_BARE, text, flags=re.MULTILINE)}
    first = next((raised[end] for end in sorted(raised) if not _is_cause(text[end:])), None)
    return f"{what} failed: {_explained(first[:_LONGEST])}; see {log}" if first else None


@contextmanager
def recording(save: Path | None, *, first: bool, started: float) -> Iterator[None]:
    """Adds the exception that ends the block to SAVE/failures.jsonl, as one line, if the run has begun there.

    first: whether this is the rank that holds the run's lock. It also adds a line when it starts, and one when the run
    finishes or is stopped. started: when this rank started, by time.time().
    """
    if first:
        _add(save, {"began": started})
    try:
        yield
    finally:
        if (error := sys.exception()) is not None and not _is_stop(error):
            name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            text, rank = f"{name}{reason(error)}"[:_LONGEST], int(os.environ.get("RANK", "0"))
            times = {"time": time.time(), "started": started}
            _add(save, times | {"rank": rank, "host": socket.gethostname(), "error": text})
        elif first:
            record_end(save)


def record_end(save: Path | None) -> None:
    """Adds a line to SAVE/failures.jsonl that says that the run has finished or was stopped."""
    _add(save, {"ended": time.time()})


def _is_stop(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and not error.code)


def _add(save: Path | None, line: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        if save is not None and (save / "recipe.yaml").is_file():  # a run that was refused leaves no folder
            with (save / _RECORD).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def last_end(save: Path) -> float:
    """When the run last finished or was stopped, by time.time(); 0 if that is not recorded.

    A rank that started earlier does not count as failed: it was ending, too. If the clock of its host is behind, one
    of the next start may be taken for it.
    """
    return _last(_lines(save), "ended")


def first_recorded(save: Path) -> tuple[str, float] | None:
    """The first failure that a rank recorded since the run was last started, in one line, and its time; else None."""
    lines = _lines(save)
    began, ended = _last(lines, "began"), _last(lines, "ended")
    records = [line for line in lines if _is_failure(line) and line["time"] >= began and line["started"] >= ended]
    if not records:
        return None
    # A rank that ends closes the connections of the others, who then say only that.
    record = next((each for each in records if not _is_lost(each["error"])), records[0])
    why = "lost its connection to a rank that had ended" if _is_lost(record["error"]) else _explained(record["error"])
    what = f"training failed: rank {record['rank']} on {record['host']}: {why}; see the log of the job"
    return what, record["time"]


def _lines(save: Path) -> list[dict[str, Any]]:
    """The lines of the record, without those that a kill cut, or a rank of another node overwrote, as on NFS."""
    lines = []
    with contextlib.suppress(OSError):
        for line in (save / _RECORD).read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                lines.append(parse_json(line))
    return [line for line in lines if isinstance(line, dict)]


def _last(lines: list[dict[str, Any]], name: str) -> float:
    return max((line[name] for line in lines if type(line.get(name)) is float), default=0.0)


def _is_failure(line: dict[str, Any]) -> bool:
    kinds = {"time": float, "started": float, "rank": int, "host": str, "error": str}
    return all(type(line.get(name)) is kind for name, kind in kinds.items())


def _is_lost(error: str) -> bool:
    """Whether an error of gloo or NCCL says that another rank has ended."""
    return any(said in error.lower() for said in _LOST)


@contextmanager
def killed_workers(hint: str) -> Iterator[None]:
    """For a block that waits for a process pool: ValueError, ending in the hint, where a process of it ended early.

    The pool does not say how it ended: it was killed, or failed before its work, for example while it was started.
    """
    try:
        yield
    except BrokenProcessPool as error:
        raise ValueError(f"a process of this command ended early; {_EARLY}: {hint}") from error


def marked(log: Path, mark: str) -> list[str]:
    """The texts that follow a mark in a log, without duplicates."""
    with log.open(encoding="utf-8", errors="replace") as lines:
        return list(dict.fromkeys(line.rpartition(f"{mark} ")[2].rstrip("\n") for line in lines if f"{mark} " in line))


def _is_cause(following: str) -> bool:
    """Whether an exception, from the text after it, was only the cause or the context of the one to report."""
    return bool(re.match(r"\n\n(?:\[rank\d+\]: *)?(The above exception was|During handling of)", following))


def _disk_full(text: str) -> str | None:
    if "No space left on device" not in text:
        return None
    path = re.search(r"No space left on device: '([^']+)'", text)
    return f"failed: the disk is full ({path[1] if path else 'No space left on device'})"


def _not_finite(text: str) -> str | None:
    """The first NaN or infinity that upstream's rerun state machine refused."""
    if (found := re.search(_NOT_FINITE, text)) is None:
        return None
    value, rank, step, message = found.groups()
    return f"failed at step {step}: {value} on rank {rank} ({message})"


def _explained(line: str) -> str:
    """Adds the usual reason to the message about a DataLoader worker that was killed, or that ended early."""
    line = line.rstrip()
    if "DataLoader worker" not in line:
        return line
    killed, early = "signal: Killed" in line, line.endswith("exited unexpectedly")
    return f"{line.removesuffix('.')}; {_ENDS[signal.SIGKILL] if killed else _EARLY}" if killed or early else line


def _killed(text: str) -> str | None:
    """The rank that a signal ended, from torchrun's summary.

    torchrun itself ends the other ranks with SIGTERM, so that signal counts only for the rank that failed first.
    """
    pattern = r"^ *rank +: (\d+) .*\n *exitcode +: -(\d+) "
    first = re.findall(pattern, text.rpartition("Root Cause (first observed failure):")[2], flags=re.MULTILINE)
    others = re.findall(pattern, text, flags=re.MULTILINE)
    ends = first + [(rank, number) for rank, number in others if int(number) != signal.SIGTERM]
    if not ends:
        return None
    rank, number = ends[0]
    name = signal.Signals(int(number))
    return f"failed: rank {rank} was ended by {name.name}" + (f": {_ENDS[name]}" if name in _ENDS else "")
