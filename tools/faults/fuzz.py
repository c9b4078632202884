"""Damaged and hostile inputs of every command. Right is: exit code 0, or one line that names the file and exit code 2.

Files that carry checksums must not be used damaged at all: exit code 0 is right only where the output is that of the
undamaged file.
"""

import collections
import hashlib
import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint
from megatron_sfr.hf.megatron.tracker import incomplete
from tools.faults import damage, hostile_text
from tools.faults.damage import Damage
from tools.faults.fork_server import Ended, run
from tools.faults.materials import COMMANDS, Program

LARGE = 1 << 18
LONGEST = 700
CHANGING = re.compile(r"(\.identity\.json|conversion\.json|\.lock|tensorboard/.*|logs/.*|\.distcp)$")
"""What differs between two runs of one command: times."""
ANSWERS_BY_CODE = ("plan", "plan, sweep")
"""Commands whose exit code 1 is an answer: the run does not fit."""


@dataclass(frozen=True)
class Target:
    """A file, what is done to it, and the commands that read it."""

    files: str
    kinds: list[Damage]
    commands: tuple[str, ...]
    weight: int = 1
    checked: bool = False
    """The command must notice every change that would change its output."""


PREPARES = ("prepare", "prepare, skipping")
READS_MODEL = ("generate", "import", "calibrate", "diagnose", "evaluate", "reference")
READS_TOKENIZER = (*PREPARES, "prepare-text", "generate", "flow prompts", "inspect", "export")
TARGETS = [
    Target("chats.jsonl", damage.RECORDS, (*PREPARES, *PREPARES, "evaluate"), 12),
    Target("sharegpt.jsonl", damage.RECORDS, ("prepare sharegpt",), 5),
    Target("alpaca.jsonl", damage.RECORDS, ("prepare alpaca",), 4),
    Target("texts.jsonl", damage.RECORDS, ("prepare-text",), 5),
    Target("prompts.jsonl", damage.RECORDS, ("generate", "flow prompts"), 6),
    Target("gaps.jsonl", damage.RECORDS, ("flow infill",), 4),
    Target("tasks.jsonl", damage.RECORDS, ("write prompts", "evaluate-code"), 6),
    Target("replies.jsonl", damage.RECORDS, ("evaluate-code",), 5),
    Target("recipe.yaml", hostile_text.RECIPES, ("dry run", "dry run", "rank"), 12),
    Target("recipe.yaml", hostile_text.RECIPES, ("plan", "plan, sweep"), 6),
    Target("prepared/manifest.json", damage.JSON, ("plan, sweep",), 2),
    Target("run/recipe.yaml", hostile_text.RECIPES, ("status", "watch"), 4),
    Target("run/metrics.jsonl", damage.RECORDS, ("status",), 3),
    Target("run/latest_checkpointed_iteration.txt", hostile_text.TRACKERS, ("status", "watch"), 2),
    Target("run/iter_0000002/metadata.json", damage.JSON, ("status", "watch"), 2),
    Target("run/iter_0000002/.metadata", damage.BYTES, ("watch",), 3),
    Target("prompts.jsonl", damage.RECORDS, ("watch",), 3),
    Target("model/config.json", damage.JSON, ("watch",), 2),
    Target("model/config.json", damage.JSON, ("recipe", "recipe", "import", "export", "generate", "calibrate"), 8),
    Target("model/generation_config.json", damage.JSON, ("generate", "export", "import"), 3),
    Target("model/tokenizer.json", damage.JSON, READS_TOKENIZER, 6),
    Target("model/tokenizer_config.json", damage.JSON, READS_TOKENIZER, 5),
    Target("model/chat_template.jinja", hostile_text.CHAT_TEMPLATES, (*PREPARES, "generate", "flow prompts"), 9),
    Target("model/model.safetensors", damage.SAFETENSORS, READS_MODEL, 6),
    Target("prepared/manifest.json", damage.JSON, ("inspect", "verify", "embed", "rank", "diagnose"), 5),
    Target("documents/manifest.json", damage.JSON, ("inspect documents", "verify documents"), 3),
    Target("prepared/*.[bj][is][no]*", damage.BYTES, ("verify", "verify", "rank", "embed"), 7, checked=True),
    Target("documents/*.[bij][ids][xno]*", damage.BYTES, ("verify documents",), 3, checked=True),
    Target("prepared/targets/[!cm]*.bin", damage.BYTES, ("verify", "verify", "rank"), 5, checked=True),
    Target("prepared/targets/checksums.bin", damage.BYTES, ("verify", "rank"), 2, checked=True),
    Target("prepared/targets/manifest.json", damage.JSON, ("verify", "rank", "diagnose head", "embed"), 3),
    Target("prepared/*.bin", damage.BYTES, ("inspect", "calibrate", "diagnose", "reference"), 3),
    Target("checkpoint/release/.metadata", damage.BYTES, ("export",), 5),
    Target("checkpoint/release/*.distcp", damage.BYTES, ("export",), 2),
    Target("checkpoint/*/metadata.json", damage.JSON, ("export",), 2),
    Target("checkpoint/latest_checkpointed_iteration.txt", hostile_text.TRACKERS, ("export",), 2),
    Target("run/latest_checkpointed_iteration.txt", hostile_text.TRACKERS, ("rank resumed", "export head"), 4),
    Target("run/iter_0000002/.metadata", damage.BYTES, ("rank resumed", "export head"), 4),
    Target("run/iter_0000002/metadata.json", damage.JSON, ("rank resumed", "export head"), 2),
    Target("run/metrics.jsonl", damage.RECORDS, ("rank resumed",), 2),
    Target("flow/iter_0000002/.metadata", damage.BYTES, ("flow infill",), 2),
    Target("flow/latest_checkpointed_iteration.txt", hostile_text.TRACKERS, ("flow infill",), 2),
    Target("headed/flow_head.json", damage.JSON, ("diagnose head",), 2),
    Target("headed/flow_head.safetensors", damage.SAFETENSORS, ("diagnose head",), 2),
]


@dataclass(frozen=True)
class Case:
    number: int
    file: str
    kind: str
    command: str
    checked: bool


@dataclass(frozen=True)
class Judged:
    case: Case
    verdict: str
    code: int
    cpu_s: float
    last: str

    @property
    def is_right(self) -> bool:
        return self.verdict in ("refused", "output")


def cases(seed: int, inputs: Path) -> Iterator[tuple[Case, bytes]]:
    """Endless; case i of a seed is always the same."""
    for number in itertools.count():
        rng = random.Random(f"{seed}/{number}")
        target = rng.choices(TARGETS, [target.weight for target in TARGETS])[0]
        found = sorted(path for path in inputs.glob(target.files) if path.is_file() and path.stat().st_size)
        path, kind = rng.choice(found), rng.choice(target.kinds)
        name = getattr(kind, "__name__", "odd").replace("<lambda>", "odd")
        file = str(path.relative_to(inputs))
        yield Case(number, file, name, rng.choice(target.commands), target.checked), kind(path.read_bytes(), rng)


def digest(folder: Path) -> dict[str, str]:
    """What a command wrote, as a SHA-256 of each file; of a checkpoint that of its tensors, and no times."""
    outputs = [folder / "out", folder / "out.jsonl", folder / "out.html", folder / "run"]
    files = [path for output in outputs for path in ([output] if output.is_file() else output.rglob("*"))]
    found = {}
    for path in files:
        name = str(path.relative_to(folder))
        if path.is_file() and not CHANGING.search(name):
            found[name] = hashlib.sha256(_content(path)).hexdigest()
    return found


def _content(path: Path) -> bytes:
    if path.name in ("metrics.jsonl", "watch.jsonl"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(re.sub(r', "(time|saved_at|speed/[^"]*)": [-+0-9.e]+', "", line) for line in lines).encode()
    if path.name == "watch.html":
        return re.sub(rb"\d{4}-\d\d-\d\d \d\d:\d\d UTC", b"", path.read_bytes())
    if path.name == ".metadata" and not incomplete(path.parent):
        return b"".join(_tensors(path.parent))
    return path.read_bytes()


def _tensors(folder: Path) -> Iterator[bytes]:
    """The bytes of all tensors of a checkpoint in the order of their names; of a damaged one those of its files."""
    try:
        checkpoint = Checkpoint(folder)
        for name, entry in sorted(checkpoint.tensors.items()):
            yield name.encode()
            yield checkpoint.read(name, [0] * len(entry.size), entry.size).flatten().view(torch.uint8).numpy().tobytes()
    except ValueError:
        yield from (path.read_bytes() for path in sorted(folder.iterdir()))


def judge(case: Case, ended: Ended, has_right_output: Callable[[], bool]) -> Judged:
    lines = [line for line in ended.error.replace("\r", "\n").splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    name = Path(case.file)
    said = "the chat template" if name.name == "chat_template.jinja" else name.name  # a command has one template
    named = said in last or name.parent.name in last.split("error:")[-1]
    if ended.timed_out:
        verdict = "never ends"
    elif ended.left:
        verdict = "leaves processes"
    elif ended.code == 0 or (case.command in ANSWERS_BY_CODE and ended.code == 1 and not ended.error.strip()):
        verdict = "output" if not case.checked or has_right_output() else "SILENT DAMAGE"
    elif "Traceback (most recent call last)" in ended.error:
        verdict = "traceback"
    elif ended.code != 2 or " error: " not in last:
        verdict = "no line"
    elif len(last) > LONGEST:
        verdict = "long line"
    else:
        verdict = "refused" if named else "names no file"
    return Judged(case, verdict, ended.code, ended.cpu_s, last[-1500:])


class Fuzzer:
    """Runs cases on copies of the inputs."""

    def __init__(self, inputs: Path, work: Path) -> None:
        self.inputs, self.work = inputs, work
        self._right: dict[str, dict[str, str]] = {}

    def run(self, case: Case, damaged: bytes) -> Judged:
        folder = self._copy()
        (folder / case.file).unlink()
        (folder / case.file).write_bytes(damaged)
        ended = run(Program(COMMANDS[case.command]), folder)
        after = digest(folder)
        return judge(case, ended, lambda: after == self._right_output(case.command))

    def _copy(self) -> Path:
        folder = self.work / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.inputs, folder, copy_function=_link_large)
        return folder

    def _right_output(self, command: str) -> dict[str, str]:
        if command not in self._right:
            folder = self._copy()
            ended = run(Program(COMMANDS[command]), folder)
            assert ended.code == 0, ended.error
            self._right[command] = digest(folder)
        return self._right[command]


def _link_large(source: str, to: str) -> None:
    """Copies a file; large ones are linked, which no command writes in place."""
    if os.path.getsize(source) > LARGE:
        os.link(source, to)
    else:
        shutil.copyfile(source, to)


def fuzz(
    inputs: Path, work: Path, numbers: range | list[int], seed: int, commands: list[str], again: bool = False
) -> list[Judged]:
    """Runs the cases with these numbers. Each becomes a line of WORK/cases-SEED.jsonl.

    again: Whether to repeat cases that the file has already; the last line of a case counts.
    """
    path = work / f"cases-{seed}.jsonl"
    judged = {} if again else {found.case.number: found for found in _read(path)}
    fuzzer, chosen = Fuzzer(inputs, work), set(numbers)
    drawn = [
        (case, damaged)
        for case, damaged in itertools.islice(cases(seed, inputs), max(chosen) + 1)
        if case.number in chosen and case.command in commands
    ]
    todo = [pair for pair in drawn if pair[0].number not in judged]
    with tqdm(todo, unit="case", dynamic_ncols=True) as bar, path.open("a", encoding="utf-8") as file:
        for case, damaged in bar:
            judged[case.number] = found = fuzzer.run(case, damaged)
            file.write(json.dumps(asdict(found)) + "\n")
            file.flush()
            bar.set_postfix(wrong=sum(not x.is_right for x in judged.values()))
    return [judged[case.number] for case, _ in drawn]


def _read(path: Path) -> Iterator[Judged]:
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        record = json.loads(line)
        yield Judged(Case(**record.pop("case")), **record)


def table(judged: list[Judged]) -> str:
    """Cases of each command by how they ended."""
    verdicts = ["output", "refused", *sorted({x.verdict for x in judged} - {"output", "refused"})]
    counts = collections.Counter((x.case.command, x.verdict) for x in judged)
    rows = [["command", "cases", *verdicts]]
    for command in [name for name in COMMANDS if any(x.case.command == name for x in judged)]:
        row = [counts[command, verdict] for verdict in verdicts]
        rows.append([command, *map(str, [sum(row), *row])])
    totals = [sum(x.verdict == verdict for x in judged) for verdict in verdicts]
    rows.append(["all", *map(str, [len(judged), *totals])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
