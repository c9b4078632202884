"""Sampling requests: an unconditional text, a completion of a prompt, or infill of the gaps between texts.

Shapes: B sequences, S positions.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from megatron_sfr.data.chat.conversation import check_text
from megatron_sfr.kl_flow.sampling.samplers import Canvas
from megatron_sfr.storage.jsonl import RecordError, read_records
from megatron_sfr.storage.user_files import parse_json, shown

KEYS = 1 << 48  # the noise counter has 48 bits for the sample


@dataclass(frozen=True)
class Gap:
    """Free positions [start, stop) of a sequence."""

    start: int
    stop: int
    end: int | None = None
    """The token at which the generated text ends; None: it fills all positions of the gap."""

    def found(self, tokens: Sequence[int]) -> tuple[list[int], bool]:
        """The generated tokens up to the end token, and whether it was found (True if the gap has none)."""
        inside = list(tokens[self.start : self.stop])
        if self.end is None:
            return inside, True
        return (inside[: inside.index(self.end)], True) if self.end in inside else (inside, False)


@dataclass(frozen=True)
class Request:
    """A sequence of tokens with one or several gaps; the tokens there are ignored."""

    tokens: tuple[int, ...]
    gaps: tuple[Gap, ...]
    """In order."""
    key: int = 0
    """Key of the noise of the first sample; sample s has key + s."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """Fields that are copied to the request's output records."""

    def found(self, tokens: Sequence[int]) -> tuple[list[int], bool]:
        """The generated tokens of all gaps, one after another, and whether every end token was found."""
        fills = [gap.found(tokens) for gap in self.gaps]
        return [token for fill, _ in fills for token in fill], all(finished for _, finished in fills)


def blank(length: int) -> Request:
    """An unconditional request: every position is free."""
    return Request((0,) * length, (Gap(0, length),))


def reply(prompt: Sequence[int], positions: int, longest: int | None, end: int, key: int, told: Any) -> Request:
    """A completion of at most `longest` tokens after a prompt, in a sequence of all positions, as in training.

    Completions are padded with the end token, so the positions after the longest one are given as end tokens.
    """
    room = positions - len(prompt)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens and the model {positions} positions: none are left for the reply"
        )
    gap = Gap(len(prompt), len(prompt) + min(room, longest or room), end)
    return Request((*prompt, *(end,) * room), (gap,), key, told)


def infill(parts: Sequence[Sequence[int] | Gap], told: Any) -> Request:
    """Infill of the gaps between texts.

    Args:
        parts: token ids of texts, and gaps, whose start is 0 and whose stop is their length; at least one gap.
    """
    tokens: list[int] = []
    gaps: list[Gap] = []
    about: list[Any] = []
    for part in parts:
        if isinstance(part, Gap):
            gaps.append(Gap(len(tokens), len(tokens) + part.stop, part.end))
            tokens += [0] * part.stop
            about.append(part.stop if part.end is None else [part.stop, part.end])
        elif part:
            tokens += part
            about.append(list(part))
    digest = hashlib.sha256(json.dumps(about).encode()).digest()
    return Request(tuple(tokens), tuple(gaps), int.from_bytes(digest[:6]), told)


def read_gaps(path: Path, tokenizer: Any, positions: int) -> list[Request]:
    """Infill requests of a JSONL file.

    {"prefix": text, "suffix": text, "length": tokens between them}, either text may be omitted; or
    {"parts": [text, gap, text, ...]}, where a gap is its length in tokens, or {"at_most": n} if it is not known: up to
    n tokens, filled up by end tokens. Raises ValueError `file:line: reason`.
    """
    requests = []
    for record in read_records(path):
        try:
            parts, told = _parts_of(parse_json(record.text))
            requests.append(infill([_part_of(part, tokenizer) for part in parts], told))
            if (total := len(requests[-1].tokens)) > positions:
                raise RecordError(f"texts and gaps have {total} tokens in all; the model has {positions} positions")
        except ValueError as error:
            raise ValueError(f"{record.source}:{record.line}: {error}") from error
    if not requests:
        raise ValueError(f'{path} has no records; write one {{"prefix": "...", "suffix": "...", "length": 8}} per line')
    return requests


def _parts_of(fields: Any) -> tuple[list[Any], dict[str, Any]]:
    """The texts and gaps of a record, and the fields that its output records repeat."""
    if isinstance(fields, dict) and fields.keys() == {"parts"}:
        parts = fields["parts"]
        if not isinstance(parts, list) or not any(isinstance(part, int | dict) for part in parts):
            raise RecordError('parts must be a list of texts and gaps, such as ["def f(x):", 12, "return y"]')
        return parts, fields
    if not isinstance(fields, dict) or "length" not in fields or fields.keys() - {"prefix", "suffix", "length"}:
        raise RecordError('not an infill record; write {"prefix": "...", "suffix": "...", "length": 8}')
    told = {side: fields.get(side, "") for side in ("prefix", "suffix")}
    if not all(isinstance(text, str) for text in told.values()) or not any(told.values()):
        raise RecordError("prefix and suffix must be strings, and at least one must not be empty")
    length = fields["length"]
    if type(length) is not int or length < 1:
        raise RecordError(f"length is {shown(length)}; give the number of tokens between prefix and suffix, at least 1")
    return [told["prefix"], length, told["suffix"]], told


def _part_of(part: Any, tokenizer: Any) -> Sequence[int] | Gap:
    """The tokens of a text, or a gap that starts at 0."""
    if isinstance(part, str):
        check_text(part, "a text")
        return tokenizer(part, add_special_tokens=False)["input_ids"] if part else []
    open_end = isinstance(part, dict) and part.keys() == {"at_most"}
    length = part["at_most"] if open_end else part
    if type(length) is not int or length < 1:
        raise RecordError(
            f'{shown(part)} is neither a text nor a gap; a gap is its number of tokens, or {{"at_most": 8}}'
        )
    if open_end and tokenizer.eos_token_id is None:
        raise RecordError("at_most needs an end token; set eos_token in the tokenizer's tokenizer_config.json")
    return Gap(0, length, tokenizer.eos_token_id if open_end else None)


@dataclass(frozen=True)
class SampleSpec:
    """One sample of a request."""

    request: Request
    sample: int


def batches(requests: Sequence[Request], samples: int, size: int) -> list[list[SampleSpec]]:
    """Batches of all samples of all requests, short sequences first. The sequences of a batch have equal lengths."""
    result: list[list[SampleSpec]] = []
    for request in sorted(requests, key=lambda request: len(request.tokens)):
        for sample in range(samples):
            spec = SampleSpec(request, sample)
            if result and len(result[-1]) < size and len(result[-1][0].request.tokens) == len(request.tokens):
                result[-1].append(spec)
            else:
                result.append([spec])
    return result


def whole_batches(batches: Sequence[Sequence[SampleSpec]], lines: int) -> int:
    """How many of the first `lines` output lines belong to complete batches."""
    return max((end for end in accumulate(map(len, batches)) if end <= lines), default=0)


def canvas(batch: Sequence[SampleSpec], device: torch.device) -> Canvas:
    """The sequences of one batch as tensors."""
    tokens_BS = torch.tensor([spec.request.tokens for spec in batch], device=device)
    free_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
    for row, spec in enumerate(batch):
        for gap in spec.request.gaps:
            free_BS[row, gap.start : gap.stop] = True
    numbers = [(spec.request.key + spec.sample) % KEYS for spec in batch]
    return Canvas(tokens_BS, free_BS, torch.tensor(numbers, device=device))
