"""Chunks of a pretraining corpus to documents with anchors: what a worker process does.

n tokens of S documents stand one after another, with A anchors (each once a horizon).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_sfr.data.chat.conversation import check_text
from megatron_sfr.data.chat.formats import load_fields
from megatron_sfr.data.chat.loss_mask import control_tokens
from megatron_sfr.data.prepare.write_segments import ChunkSegment, ChunkTexts
from megatron_sfr.data.prepared.documents import COLUMNS
from megatron_sfr.data.segments.anchors import Cut, futures
from megatron_sfr.storage.jsonl import BadRow, Chunk, Place, Row, RowError


class Corpus(Protocol):
    """An indexed dataset that is there already: its documents' tokens."""

    @property
    def sequence_lengths(self) -> np.ndarray: ...
    def __getitem__(self, document: int) -> np.ndarray: ...


OpenCorpus = Callable[[str], Corpus]


@dataclass(frozen=True)
class Span:
    """Documents of an indexed dataset; a place there counts tokens as bytes, and documents as lines."""

    prefix: str
    first: int
    last: int  # behind the last one
    end: Place


@dataclass(frozen=True)
class EncodedDocuments:
    """The documents of a chunk, and its bad rows."""

    end: Place
    tokens: np.ndarray  # [n]; none where the corpus is there already
    lengths: np.ndarray  # int32 [S], in tokens
    max_token_id: int  # -1 for none
    anchors: np.ndarray  # int32 [A, 3], but `segment` counts within this chunk's segments
    anchor_counts: np.ndarray  # int64 [S]
    segments: list[ChunkSegment]  # each once
    bad: list[BadRow]


@dataclass(frozen=True)
class DocumentEncoder:
    """Makes the documents of a chunk; it is pickled, with its tokenizer, once a worker."""

    tokenizer: Any
    eod: int
    text_key: str
    cut: Cut
    open_corpus: OpenCorpus

    def __call__(self, chunk: Chunk | Span) -> EncodedDocuments:
        texts, bad, kept = ChunkTexts(), list[BadRow](), list[np.ndarray]()
        anchors, counts, lengths = list[tuple[int, int, int]](), list[int](), list[int]()
        max_token_id = -1
        for found in self._documents(chunk):
            if isinstance(found, BadRow):
                bad.append(found)
                continue
            before = len(anchors)
            for segment, text in futures(found, [(1, len(found))], self.tokenizer, self.cut):
                anchors.append((segment.position, texts.number(text), segment.horizon))
            counts.append(len(anchors) - before)
            lengths.append(len(found))
            max_token_id = max(max_token_id, int(found.max(initial=-1)))
            if isinstance(chunk, Chunk):
                kept.append(found)
        return EncodedDocuments(
            end=chunk.end,
            tokens=np.concatenate([*kept, np.empty(0, np.int32)]),
            lengths=np.array(lengths, np.int32),
            max_token_id=max_token_id,
            anchors=np.array(anchors, np.int32).reshape(-1, COLUMNS),
            anchor_counts=np.array(counts, np.int64),
            segments=texts.segments(),
            bad=bad,
        )

    def _documents(self, chunk: Chunk | Span) -> Iterator[np.ndarray | BadRow]:
        """Tokens [n] of each document, int32."""
        if isinstance(chunk, Span):
            corpus, known = self.open_corpus(chunk.prefix), len(self.tokenizer)
            for i in range(chunk.first, chunk.last):
                tokens = np.asarray(corpus[i], np.int32)
                if len(tokens) and not 0 <= tokens.min() <= tokens.max() < known:
                    raise ValueError(
                        f"{chunk.prefix}.bin: document {i} has token ids from {tokens.min()} to {tokens.max()}, the "
                        f"tokenizer has {known} tokens; name the tokenizer that the corpus was made with"
                    )
                yield tokens
            return
        for row in chunk.rows():
            try:
                yield self._tokens(row)
            except RowError as error:
                yield BadRow(row, str(error))

    def _tokens(self, row: Row) -> np.ndarray:
        text = load_fields(row).get(self.text_key)
        if text is None:
            raise RowError(f"no field {self.text_key!r}; name the field that has the text with --text-key")
        check_text(text, f"the field {self.text_key!r}")
        if not text.strip():
            raise RowError("an empty text; drop the row")
        if found := control_tokens(self.tokenizer)[0].search(text):
            raise RowError(f"the text has the control token {found[0]!r}; remove it")
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.array([*ids, self.eod], np.int32)
