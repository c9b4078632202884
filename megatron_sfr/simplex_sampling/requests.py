"""What a sampler is asked to write: a whole text, a reply to a prompt, or a gap between two texts.

Letters: B rows, S positions.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_sfr.data.lines import RowError, read_rows
from megatron_sfr.runtime.user_files import parse_json, shown
from megatron_sfr.simplex_sampling.samplers import Canvas

KEYS = 1 << 48  # the generator's counter takes samples of 48 bits


@dataclass(frozen=True)
class Request:
    """A row of tokens whose positions [start, stop) are free; what stands there is not read."""

    tokens: tuple[int, ...]
    start: int
    stop: int
    key: int = 0
    """Names the noise of its first sample; the s-th one has the noise of key + s."""
    end: int | None = None
    """The token at which what was found is cut off; None: nothing is."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """What its records say of it."""

    def found(self, tokens: Sequence[int]) -> tuple[list[int], bool]:
        """The tokens of the free positions, up to the end token; whether there was one (True where none is due)."""
        inside = list(tokens[self.start : self.stop])
        if self.end is None:
            return inside, True
        return (inside[: inside.index(self.end)], True) if self.end in inside else (inside, False)


def blank(length: int) -> Request:
    """A text of which nothing is given."""
    return Request((0,) * length, 0, length)


def reply(prompt: Sequence[int], positions: int, longest: int | None, end: int, key: int, told: Any) -> Request:
    """A reply of at most `longest` tokens after a prompt, in a row of all positions, as in training.

    What follows a reply is the end token until the row ends: positions beyond the longest reply are given so.
    """
    room = positions - len(prompt)
    if room < 1:
        raise ValueError(f"the prompt has {len(prompt)} tokens and leaves no room: the model has {positions} positions")
    free = min(room, longest or room)
    return Request((*prompt, *(end,) * room), len(prompt), len(prompt) + free, key, end, told)


def gap(prefix: Sequence[int], length: int, suffix: Sequence[int], told: Any) -> Request:
    """So many tokens between two texts."""
    tokens = (*prefix, *(0,) * length, *suffix)
    digest = hashlib.sha256(json.dumps([list(prefix), length, list(suffix)]).encode()).digest()
    return Request(tokens, len(prefix), len(prefix) + length, int.from_bytes(digest[:6]), told=told)


def read_gaps(path: Path, tokenizer: Any, positions: int) -> list[Request]:
    """Of a JSONL file: {"prefix": text, "suffix": text, "length": tokens between them}; either text may be left out.

    ValueError `file:line: reason`.
    """
    found = []
    for row in read_rows(path):
        try:
            found.append(_gap_of(row.text, tokenizer, positions))
        except ValueError as error:
            raise ValueError(f"{row.source}:{row.line}: {error}") from error
    if not found:
        raise ValueError(f'{path} has no rows; write one {{"prefix": "...", "suffix": "...", "length": 8}} a line')
    return found


def _gap_of(text: bytes, tokenizer: Any, positions: int) -> Request:
    fields = parse_json(text)
    if not isinstance(fields, dict) or "length" not in fields or fields.keys() - {"prefix", "suffix", "length"}:
        raise RowError('not a gap; write {"prefix": "...", "suffix": "...", "length": 8}')
    length, texts = fields["length"], [fields.get(side, "") for side in ("prefix", "suffix")]
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise RowError(f"length is {shown(length)}; give the number of tokens between prefix and suffix, at least 1")
    if not all(isinstance(side, str) for side in texts) or not any(texts):
        raise RowError("prefix and suffix are texts, and one of them is not empty")
    prefix, suffix = (tokenizer(side, add_special_tokens=False)["input_ids"] if side else [] for side in texts)
    if (whole := len(prefix) + length + len(suffix)) > positions:
        raise RowError(f"prefix, length and suffix are {whole} tokens; the model has {positions} positions")
    return gap(prefix, length, suffix, {"prefix": texts[0], "suffix": texts[1]})


@dataclass(frozen=True)
class Wanted:
    """One sample of a request."""

    request: Request
    sample: int


def batches(requests: Sequence[Request], samples: int, size: int) -> list[list[Wanted]]:
    """All samples of all requests, short rows first; the rows of a batch have one length."""
    found: list[list[Wanted]] = []
    for request in sorted(requests, key=lambda request: len(request.tokens)):
        for sample in range(samples):
            wanted = Wanted(request, sample)
            if found and len(found[-1]) < size and len(found[-1][0].request.tokens) == len(request.tokens):
                found[-1].append(wanted)
            else:
                found.append([wanted])
    return found


def whole_batches(found: Sequence[Sequence[Wanted]], lines: int) -> int:
    """Of so many lines that were written, those of batches that are complete."""
    done = 0
    for size in _ends(found):
        done = size if size <= lines else done
    return done


def _ends(found: Sequence[Sequence[Wanted]]) -> Iterator[int]:
    total = 0
    for batch in found:
        total += len(batch)
        yield total


def canvas(batch: Sequence[Wanted], device: torch.device) -> Canvas:
    """The rows of one batch."""
    tokens_BS = torch.tensor([wanted.request.tokens for wanted in batch], device=device)
    place_S = torch.arange(tokens_BS.shape[1], device=device)
    start_B1, stop_B1 = (
        torch.tensor([[getattr(wanted.request, name)] for wanted in batch], device=device) for name in ("start", "stop")
    )
    numbers = [(wanted.request.key + wanted.sample) % KEYS for wanted in batch]
    return Canvas(tokens_BS, (place_S >= start_B1) & (place_S < stop_B1), torch.tensor(numbers, device=device))
