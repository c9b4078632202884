"""The votes of a judge as a JSONL file that a killed run continues: one line per reply and criterion."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_sfr.evaluation.judge.judge_prompts import Item
from megatron_sfr.storage.provenance import differences, read_record, write_record
from megatron_sfr.storage.resumable import record_of
from megatron_sfr.storage.user_files import has_type, parse_json

VOTES = "votes.jsonl"
Votes = list[int | None]
"""The ratings of one item; None for an answer without one."""


class VoteFile:
    """The votes that are there, by the key of their item, and a file to append to."""

    def __init__(self, file: IO[bytes], known: dict[str, Votes]) -> None:
        self._file, self.known = file, known

    def add(self, item: Item, votes: Sequence[int | None]) -> None:
        """Appends all votes about an item as one line."""
        prompt = item.prompt
        line: dict[str, object] = {
            "key": item.key,
            "criterion": item.criterion,
            "persona": prompt.persona,
            "question": prompt.question,
        }
        line |= {"reply": item.reply, "votes": list(votes)}
        self._file.write((json.dumps(line, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))
        self._file.flush()
        self.known[item.key] = list(votes)


@contextmanager
def vote_file(path: Path, identity: Mapping[str, object]) -> Iterator[VoteFile]:
    """Opens a file of votes. A line that a kill has cut off is removed.

    Args:
        identity: everything that determines a vote besides the item.
    Raises:
        ValueError: the votes are another judge's, or a line is damaged.
    """
    known = read_record(record_of(path))
    if path.exists() and (known is None or (changed := differences(known["identity"], identity))):
        what = "something unknown" if known is None else ", ".join(changed)
        raise ValueError(
            f"{path} has votes that were given with other values of {what}: remove it, or choose another --output"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(record_of(path), identity, {})
    with open(path, "a+b") as file:
        file.seek(0)
        found, end = dict[str, Votes](), 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            key, votes = _parse(path, number, line)
            found[key] = votes
        file.truncate(end)
        yield VoteFile(file, found)
        os.fsync(file.fileno())


def _parse(path: Path, number: int, line: bytes) -> tuple[str, Votes]:
    try:
        fields = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{path}:{number}: {error}; remove this line, and its reply is rated again") from error
    key, votes = (fields.get("key"), fields.get("votes")) if isinstance(fields, dict) else (None, None)
    if not isinstance(key, str) or not has_type(votes, list[int | None]):
        raise ValueError(f"{path}:{number}: not the votes of a judge; remove this line, and its reply is rated again")
    return key, votes  # type: ignore[return-value]
