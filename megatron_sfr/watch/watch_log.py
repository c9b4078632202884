"""What `watch` writes: a record for each step, the replies of each step, and TensorBoard's event files.

The training writes none of these files. Each is replaced as a whole, so that a kill leaves nothing half-written.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_sfr.evaluation.generate.prompts import Asked
from megatron_sfr.evaluation.generate.sampling import Sampled, SamplingOptions, reply_line
from megatron_sfr.storage.atomic import replacing
from megatron_sfr.storage.jsonl import read_records
from megatron_sfr.storage.provenance import differences, read_record, write_record
from megatron_sfr.storage.resumable import record_of
from megatron_sfr.storage.user_files import check_fields, parse_json

RECORDS, REPLIES, PAGE = "watch.jsonl", "replies", "watch.html"
SUFFIX = ".watch"
_FORM = "remove this line, and its step is scored again"


@dataclass(frozen=True)
class StepScores:
    """The record of a step: one line of watch.jsonl."""

    step: int
    """The training step of the checkpoint."""
    saved_at: int
    """When the checkpoint was completed, in nanoseconds since 1970: tells it from a later one of the same step."""
    time: float
    """When it was scored, in seconds since 1970."""
    replies: int
    """Number of replies."""
    scores: dict[str, float]
    """Means over prompts."""
    intervals: dict[str, list[float]]
    """95 % bootstrap intervals of the scores, over prompts."""

    @property
    def name(self) -> str:
        """The name of the step, which is also the model's in the records of its replies."""
        return f"step {self.step}"


class WatchLog:
    """The folder that `watch` writes.

    A step counts as done once it is in watch.jsonl and its replies are there.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object]) -> None:
        """identity: everything that determines the scores of a checkpoint.

        Raises:
            ValueError: the folder has scores of another identity, or a record is damaged.
        """
        self.folder, self._records = folder, folder / RECORDS
        self.steps: dict[int, StepScores] = {}
        if not self._records.exists():
            write_record(record_of(self._records), identity, {})
            return
        known = read_record(record_of(self._records))
        changed = ["something unknown"] if known is None else differences(known["identity"], identity)
        if changed:
            raise ValueError(
                f"{self._records} was written with other values of {', '.join(changed)}, and scores of different "
                "kinds cannot be compared: choose another --output, or remove this folder"
            )
        for line in read_records(self._records):
            try:
                scores = _parse(line.text)
            except ValueError as error:
                raise ValueError(f"{line.source}:{line.line}: {error}; {_FORM}") from error
            if self.replies_of(scores.step).is_file():
                self.steps[scores.step] = scores

    @property
    def known(self) -> dict[int, int]:
        """{step: when its checkpoint was completed}."""
        return {step: scores.saved_at for step, scores in self.steps.items()}

    def replies_of(self, step: int) -> Path:
        """The file of a step's replies, in the form of `generate`."""
        return self.folder / REPLIES / f"step_{step:07d}.jsonl"

    def write_replies(
        self, step: int, asked: Sequence[Asked], replies: Sequence[Sequence[Sampled]], options: SamplingOptions
    ) -> None:
        with replacing(self.replies_of(step)) as file:
            for entry, row in zip(asked, replies, strict=True):
                file.writelines(reply_line(f"step {step}", entry.prompt, options, reply) for reply in row)

    def read_replies(self, step: int, each: int) -> list[list[str]]:
        """The texts of a step's replies, `each` of them to a prompt.

        Raises:
            ValueError: the file is damaged.
        """
        path, texts = self.replies_of(step), list[str]()
        for line in read_records(path):
            fields = parse_json(line.text)
            if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
                raise ValueError(f"{path}:{line.line}: not a reply; remove this file, and its step is scored again")
            texts.append(fields["text"])
        return [texts[i : i + each] for i in range(0, len(texts), each)]

    def write_page(self, text: str) -> None:
        with replacing(self.folder / PAGE) as file:
            file.write(text)

    def with_step(self, scores: StepScores) -> dict[int, StepScores]:
        """The records in the order of steps, with another one, in place of an earlier one of its step.

        Without later steps whose checkpoints were saved before it: the run was started again from an earlier step.
        """
        kept = {x.step: x for x in self.steps.values() if x.step < scores.step or x.saved_at > scores.saved_at}
        return dict(sorted((kept | {scores.step: scores}).items()))

    def add(self, scores: StepScores) -> None:
        """Adds the record of a step, which is written last of its files."""
        before, self.steps = self.steps, self.with_step(scores)
        with replacing(self._records) as file:
            file.writelines(json.dumps(asdict(x), ensure_ascii=False) + "\n" for x in self.steps.values())
        for step in before.keys() - self.steps.keys():
            self.replies_of(step).unlink(missing_ok=True)


class EventFile:
    """The scores as TensorBoard's scalars `watch/NAME`, in a folder with no other event files.

    TensorBoard follows only the newest file of a folder. Beside the trainer's file it would hide the trainer's scalars.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open()

    def _open(self) -> None:
        """Begins an empty file in place of earlier ones."""
        from torch.utils.tensorboard import SummaryWriter

        for old in self._folder.glob(f"events.out.tfevents.*{SUFFIX}"):
            old.unlink()
        self._writer: Any = SummaryWriter(str(self._folder), filename_suffix=SUFFIX)
        self._written: dict[int, StepScores] = {}

    def update(self, steps: Mapping[int, StepScores]) -> None:
        """Writes what is new. If a step has changed or disappeared, all are written again: the file has each once."""
        if any(steps.get(step) != scores for step, scores in self._written.items()):
            self._writer.close()
            self._open()
        for step, scores in steps.items():
            if step not in self._written:
                for name, value in scores.scores.items():
                    self._writer.add_scalar(f"watch/{name}", value, step, walltime=scores.time)
        self._written = dict(steps)
        self._writer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.close()


def _parse(text: bytes) -> StepScores:
    fields = parse_json(text)
    if not isinstance(fields, dict) or fields.keys() != StepScores.__dataclass_fields__.keys():
        raise ValueError("not a record of watch")
    check_fields(fields, StepScores)
    return StepScores(**fields)
