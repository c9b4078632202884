"""Sampling requests: an unconditional text, a completion of a prompt, or infill between two texts.

Shapes: B sequences, S positions.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_sfr.kl_flow.sampling.samplers import Canvas
from megatron_sfr.storage.jsonl import RowError, read_rows
from megatron_sfr.storage.user_files import parse_json, shown

KEYS = 1 << 48  # the noise counter has 48 bits for the sample


@dataclass(frozen=True)
class Request:
    """A sequence of tokens whose positions [start, stop) are free; the tokens there are ignored."""

    tokens: tuple[int, ...]
    start: int
    stop: int
    key: int = 0
    """Key of the noise of the first sample; sample s has key + s."""
    end: int | None = None
    """The token at which the generated text ends; None: it fills all free positions."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """Fields that are copied to the request's output records."""

    def found(self, tokens: Sequence[int]) -> tuple[list[int], bool]:
        """The generated tokens up to the end token, and whether it was found (True if the request has none)."""
        inside = list(tokens[self.start : self.stop])
        if self.end is None:
            return inside, True
        return (inside[: inside.index(self.end)], True) if self.end in inside else (inside, False)


def blank(length: int) -> Request:
    """An unconditional request: every position is free."""
    return Request((0,) * length, 0, length)


def reply(prompt: Sequence[int], positions: int, longest: int | None, end: int, key: int, told: Any) -> Request:
    """A completion of at most `longest` tokens after a prompt, in a sequence of all positions, as in training.

    Completions are padded with the end token, so the positions after the longest one are given as end tokens.
    """
    room = positions - len(prompt)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens and the model {positions} positions: none are left for the reply"
        )
    free = min(room, longest or room)
    return Request((*prompt, *(end,) * room), len(prompt), len(prompt) + free, key, end, told)


def gap(prefix: Sequence[int], length: int, suffix: Sequence[int], told: Any) -> Request:
    """Infill: `length` tokens between two texts."""
    tokens = (*prefix, *(0,) * length, *suffix)
    digest = hashlib.sha256(json.dumps([list(prefix), length, list(suffix)]).encode()).digest()
    return Request(tokens, len(prefix), len(prefix) + length, int.from_bytes(digest[:6]), told=told)


def read_gaps(path: Path, tokenizer: Any, positions: int) -> list[Request]:
    """Infill requests of a JSONL file: {"prefix": text, "suffix": text, "length": tokens between them}.

    Either text may be omitted. Raises ValueError `file:line: reason`.
    """
    requests = []
    for row in read_rows(path):
        try:
            requests.append(_gap_of(row.text, tokenizer, positions))
        except ValueError as error:
            raise ValueError(f"{row.source}:{row.line}: {error}") from error
    if not requests:
        raise ValueError(f'{path} has no records; write one {{"prefix": "...", "suffix": "...", "length": 8}} per line')
    return requests


def _gap_of(text: bytes, tokenizer: Any, positions: int) -> Request:
    fields = parse_json(text)
    if not isinstance(fields, dict) or "length" not in fields or fields.keys() - {"prefix", "suffix", "length"}:
        raise RowError('not an infill record; write {"prefix": "...", "suffix": "...", "length": 8}')
    length, texts = fields["length"], [fields.get(side, "") for side in ("prefix", "suffix")]
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise RowError(f"length is {shown(length)}; give the number of tokens between prefix and suffix, at least 1")
    if not all(isinstance(side, str) for side in texts) or not any(texts):
        raise RowError("prefix and suffix must be strings, and at least one must not be empty")
    prefix, suffix = (tokenizer(side, add_special_tokens=False)["input_ids"] if side else [] for side in texts)
    if (total := len(prefix) + length + len(suffix)) > positions:
        raise RowError(f"prefix, length and suffix have {total} tokens in all; the model has {positions} positions")
    return gap(prefix, length, suffix, {"prefix": texts[0], "suffix": texts[1]})


@dataclass(frozen=True)
class Wanted:
    """One sample of a request."""

    request: Request
    sample: int


def batches(requests: Sequence[Request], samples: int, size: int) -> list[list[Wanted]]:
    """Batches of all samples of all requests, short sequences first. The sequences of a batch have equal lengths."""
    result: list[list[Wanted]] = []
    for request in sorted(requests, key=lambda request: len(request.tokens)):
        for sample in range(samples):
            spec = Wanted(request, sample)
            if result and len(result[-1]) < size and len(result[-1][0].request.tokens) == len(request.tokens):
                result[-1].append(spec)
            else:
                result.append([spec])
    return result


def whole_batches(batches: Sequence[Sequence[Wanted]], lines: int) -> int:
    """How many of the first `lines` output lines belong to complete batches."""
    done = 0
    for size in _ends(batches):
        done = size if size <= lines else done
    return done


def _ends(batches: Sequence[Sequence[Wanted]]) -> Iterator[int]:
    total = 0
    for batch in batches:
        total += len(batch)
        yield total


def canvas(batch: Sequence[Wanted], device: torch.device) -> Canvas:
    """The sequences of one batch as tensors."""
    tokens_BS = torch.tensor([spec.request.tokens for spec in batch], device=device)
    position_S = torch.arange(tokens_BS.shape[1], device=device)
    start_B1, stop_B1 = (
        torch.tensor([[getattr(spec.request, name)] for spec in batch], device=device) for name in ("start", "stop")
    )
    numbers = [(spec.request.key + spec.sample) % KEYS for spec in batch]
    return Canvas(tokens_BS, (position_S >= start_B1) & (position_S < stop_B1), torch.tensor(numbers, device=device))
