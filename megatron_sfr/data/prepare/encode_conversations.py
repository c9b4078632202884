"""Chunks of records to samples, which a worker process encodes, and what each chunk adds to the prepared folder.

A chunk has the n tokens of S samples, one after another, and A anchors (each counted once for each horizon).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_sfr.data.chat.conversation import Conversation, Encoded, encode_conversations, parse_record
from megatron_sfr.data.chat.template_options import SampleOptions
from megatron_sfr.data.prepared.conversations import Anchors
from megatron_sfr.data.segments.anchors import ChunkSegment, ChunkTexts, Cut, Segment, futures
from megatron_sfr.data.segments.reference_anchors import AnchorRule, reference_futures, with_last_input
from megatron_sfr.storage.jsonl import BadRecord, Chunk, Position, Record, RecordError

TOO_LONG = ("error", "truncate")
SAMPLE_DIGESTS = "sample_digests.bin"
"""The file by which duplicates are counted; not published."""
COLUMNS = tuple(column.name for column in fields(Anchors))


@dataclass(frozen=True)
class EncodedChunk:
    """The samples of a chunk, and its bad records."""

    end: Position
    tokens: np.ndarray
    """int32 [n]."""
    loss_mask: np.ndarray
    """uint8 [n]."""
    lengths: np.ndarray
    """int64 [S]: tokens of each sample."""
    supervised: np.ndarray
    """int64 [S]: supervised tokens of each sample."""
    digests: np.ndarray
    """uint64 [S], of the token ids."""
    personas: list[str]
    """[S], "" for none."""
    anchors: np.ndarray
    """int32 [A, 6], the columns of Anchors, but `segment` counts within this chunk's segments."""
    anchor_counts: np.ndarray
    """int64 [S]."""
    segments: list[ChunkSegment]
    """The distinct texts of the chunk."""
    end_tokens: frozenset[int]
    """Ids that end the replies."""
    truncated: int
    conversations: int
    unlike_last: int
    """Counts of replies, as in `Supervised`."""
    unlike_inference: int
    bad: list[BadRecord]

    @property
    def samples(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class SampleEncoder:
    """Makes the samples of a chunk; it is pickled, with its tokenizer, once a worker."""

    tokenizer: Any
    formats: dict[str, str]
    """The format of each file."""
    persona_key: str
    seq_length: int
    too_long: str
    cut: Cut
    options: SampleOptions = field(default_factory=SampleOptions)
    anchor_rule: AnchorRule = "replies"

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        samples = _Samples(self.anchor_rule)
        records = list(chunk.records())
        parsed = [self._parsed(record) for record in records]
        encoded = encode_conversations(parsed, self.tokenizer, self.options)
        for record, conversation, made in zip(records, parsed, encoded, strict=True):
            try:
                if isinstance(conversation, RecordError):
                    raise conversation
                if isinstance(made, RecordError):
                    raise made
                kept = [self._kept(sample) for sample in made]  # a record gives all of its samples or none
            except RecordError as error:
                samples.bad.append(BadRecord(record, str(error)))
            else:
                samples.conversations += 1
                for sample, keep, found in kept:
                    samples.add(sample, keep, found, conversation.persona or "")
        return samples.chunk(chunk.end)

    def _parsed(self, record: Record) -> Conversation | RecordError:
        form, persona_as = self.formats[record.source], self.options.persona_as
        try:
            return parse_record(record, form, self.persona_key, persona_as=persona_as)
        except RecordError as error:
            return error

    def _kept(self, sample: Encoded) -> tuple[Encoded, int, list[tuple[Segment, str]]]:
        """A sample, how many of its tokens are kept, and the segments of their anchors."""
        keep = self._kept_tokens(sample)
        return sample, keep, list(self._futures(sample, keep))

    def _kept_tokens(self, encoded: Encoded) -> int:
        """How many tokens are kept from the start; RecordError where these are too few."""
        length, most = len(encoded.tokens), self.seq_length + 1  # inputs are tokens[:-1], labels tokens[1:]
        most -= self.anchor_rule == "reference"  # every token is an input
        if length > most and self.too_long == "error":
            raise RecordError(
                f"{length} tokens, which is over sequence length {self.seq_length}{' + 1' * (most > self.seq_length)}; "
                "shorten the conversation, raise --seq-length, or give --too-long truncate"
            )
        if not encoded.loss_mask[:most].any():
            raise RecordError(
                f"the first {most} of {length} tokens hold nothing of a reply; shorten the prompt or raise --seq-length"
            )
        return min(length, most)

    def _futures(self, encoded: Encoded, keep: int) -> Iterator[tuple[Segment, str]]:
        """Those of the anchors in the kept tokens. Ours are futures of the whole conversation, beyond the cut too."""
        if self.anchor_rule == "reference":
            kept = [(start, min(end, keep)) for start, end in encoded.replies if start < keep]
            yield from reference_futures(encoded.tokens, kept, self.tokenizer, self.cut)
            return
        for segment, text in futures(encoded.tokens, encoded.replies, self.tokenizer, self.cut):
            if segment.position + 1 >= keep:  # they come by position
                return
            yield segment, text


@dataclass
class _Samples:
    """A chunk's samples while they are made."""

    anchor_rule: AnchorRule
    tokens: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    personas: list[str] = field(default_factory=list)
    anchors: list[tuple[int, ...]] = field(default_factory=list)
    first_anchors: list[int] = field(default_factory=list)
    """[S]."""
    texts: ChunkTexts = field(default_factory=ChunkTexts)
    end_tokens: set[int] = field(default_factory=set)
    truncated: int = 0
    conversations: int = 0
    unlike_last: int = 0
    unlike_inference: int = 0
    bad: list[BadRecord] = field(default_factory=list)

    def add(self, encoded: Encoded, keep: int, found: Sequence[tuple[Segment, str]], persona: str) -> None:
        tokens, mask = encoded.tokens[:keep], encoded.loss_mask[:keep]
        if self.anchor_rule == "reference":
            tokens, mask = with_last_input(tokens, mask)
        self.tokens.append(tokens)
        self.masks.append(mask)
        self.personas.append(persona)
        self.first_anchors.append(len(self.anchors))
        self.truncated += keep < len(encoded.tokens)
        self.unlike_last += encoded.unlike_last
        self.unlike_inference += encoded.unlike_inference
        self.end_tokens.update(int(encoded.tokens[end - 1]) for _, end in encoded.replies)
        lengths = [min(end, keep) - start for start, end in encoded.replies]
        for s, text in found:
            segment = self.texts.number(text)
            length = s.length if self.anchor_rule == "reference" else lengths[s.response]
            self.anchors.append((s.position, segment, s.response, s.ordinal, length, s.horizon))

    def chunk(self, end: Position) -> EncodedChunk:
        return EncodedChunk(
            end=end,
            tokens=np.concatenate([*self.tokens, np.empty(0, np.int32)]),
            loss_mask=np.concatenate([*self.masks, np.empty(0, np.uint8)]),
            lengths=np.array([len(tokens) for tokens in self.tokens], np.int64),
            supervised=np.array([mask.sum(dtype=np.int64) for mask in self.masks], np.int64),
            digests=np.array([_token_digest(tokens) for tokens in self.tokens], np.uint64),
            personas=self.personas,
            anchors=np.array(self.anchors, np.int32).reshape(-1, len(COLUMNS)),
            anchor_counts=np.diff(np.array([*self.first_anchors, len(self.anchors)], np.int64)),
            segments=self.texts.segments(),
            end_tokens=frozenset(self.end_tokens),
            truncated=self.truncated,
            conversations=self.conversations,
            unlike_last=self.unlike_last,
            unlike_inference=self.unlike_inference,
            bad=self.bad,
        )


def _token_digest(tokens: np.ndarray) -> int:
    """64 bits: enough to count equal conversations by (two different ones among 10^8 agree with probability 3e-4)."""
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest())


@dataclass
class ChatTotals:
    """What the files of a folder hold up to `position`. The names are the manifest's."""

    position: Position = field(default_factory=Position)
    samples: int = 0
    conversations: int = 0
    unlike_last: int = 0
    unlike_inference: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    max_response_tokens: int = 0
    anchors: int = 0
    max_anchors: int = 0
    truncated: int = 0
    rejected: int = 0
    max_token_id: int = -1
    reply_end_tokens: list[int] = field(default_factory=list)
    personas: dict[str, int] = field(default_factory=dict)
    first_bad: str = ""

    def columns(self, chunk: EncodedChunk) -> Mapping[str, ArrayLike]:
        rows = {persona: row for row, persona in enumerate(self.personas)}
        return {
            "tokens.bin": chunk.tokens,
            "mask.bin": chunk.loss_mask,
            "offsets.bin": self.tokens + np.cumsum(chunk.lengths),
            "personas.bin": [rows.setdefault(persona, len(rows)) for persona in chunk.personas],
            SAMPLE_DIGESTS: chunk.digests,
        }

    def add(self, chunk: EncodedChunk) -> None:
        for persona in chunk.personas:
            self.personas[persona] = self.personas.get(persona, 0) + 1
        self.samples += chunk.samples
        self.tokens += len(chunk.tokens)
        self.supervised_tokens += int(chunk.supervised.sum())
        self.max_response_tokens = max(self.max_response_tokens, int(chunk.supervised.max(initial=0)))
        self.max_anchors = max(self.max_anchors, int(chunk.anchor_counts.max(initial=0)))
        self.max_token_id = max(self.max_token_id, int(chunk.tokens.max(initial=-1)))
        self.reply_end_tokens = sorted(chunk.end_tokens.union(self.reply_end_tokens))
        self.truncated += chunk.truncated
        self.conversations += chunk.conversations
        self.unlike_last += chunk.unlike_last
        self.unlike_inference += chunk.unlike_inference
