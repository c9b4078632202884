"""Chunks of a pretraining corpus to documents with anchors: what a worker process does.

Shapes: n tokens of S documents, one after another, with A anchors (each counted once for each horizon).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_sfr.data.chat.chat_template import control_tokens, encode_text
from megatron_sfr.data.chat.conversation import check_text
from megatron_sfr.data.chat.formats import load_fields
from megatron_sfr.data.prepared.corpus_files import open_corpus
from megatron_sfr.data.prepared.documents import COLUMNS, CORPUS
from megatron_sfr.data.segments.anchors import ChunkSegment, ChunkTexts, Cut, Segment, futures
from megatron_sfr.storage.jsonl import BadRecord, Chunk, Position, Record, RecordError

TOKENS, LENGTHS = f"{CORPUS}.bin", "lengths.bin"

Document = tuple[np.ndarray, list[tuple[Segment, str]]]
"""Tokens [n], and the segments of the anchors with their texts."""


@dataclass(frozen=True)
class Span:
    """Documents first ... last - 1 of an indexed corpus."""

    first: int
    last: int
    end: Position


@dataclass(frozen=True)
class EncodedDocuments:
    """The documents of a chunk, and its bad records."""

    end: Position
    lengths: np.ndarray
    """int32 [S], in tokens."""
    max_token_id: int
    """-1 if there are no tokens."""
    anchors: np.ndarray
    """int32 [A, 3], but `segment` counts within this chunk's segments."""
    anchor_counts: np.ndarray
    """int64 [S]."""
    segments: list[ChunkSegment]
    """The distinct texts of the chunk."""
    bad: list[BadRecord]
    columns: Mapping[str, np.ndarray]
    """By file: tokens [n] and lengths, unless the tokens are on disk already."""


@dataclass(frozen=True)
class TextEncoder:
    """Makes the documents of a chunk of records. Pickled once for each worker, with its tokenizer."""

    tokenizer: Any
    eod: int
    text_key: str
    cut: Cut

    def __call__(self, chunk: Chunk) -> EncodedDocuments:
        records = list(chunk.records())
        texts = [self._text(record) for record in records]
        # All texts are encoded before the segments are cut: by turns the same takes longer (encode_conversations).
        encoded = [text if isinstance(text, RecordError) else self._tokens(text) for text in texts]
        documents, bad = list[Document](), list[BadRecord]()
        for record, tokens in zip(records, encoded, strict=True):
            try:
                if isinstance(tokens, RecordError):
                    raise tokens
                documents.append(_document(tokens, self.tokenizer, self.cut))
            except RecordError as error:
                bad.append(BadRecord(record, str(error)))
        columns = {
            TOKENS: np.concatenate([*(tokens for tokens, _ in documents), np.empty(0, np.int32)]),
            LENGTHS: np.array([len(tokens) for tokens, _ in documents], np.int32),
        }
        return _encoded(documents, chunk.end, bad, columns)

    def _text(self, record: Record) -> str | RecordError:
        """The text of a record, or what is wrong with it."""
        try:
            text = load_fields(record).get(self.text_key)
            if text is None:
                raise RecordError(f"no field {self.text_key!r}; name the field that has the text with --text-key")
            check_text(text, f"the field {self.text_key!r}")
            if not text.strip():
                raise RecordError("an empty text; remove the record")
            if found := control_tokens(self.tokenizer)[0].search(text):
                raise RecordError(f"the text has the control token {found[0]!r}; remove it")
        except RecordError as error:
            return error
        return str(text)

    def _tokens(self, text: str) -> np.ndarray:
        """int32 [n], the end-of-document token last."""
        return np.array([*encode_text(self.tokenizer, text), self.eod], np.int32)


@dataclass(frozen=True)
class CorpusEncoder:
    """Finds the anchors of documents of an indexed corpus. Pickled once for each worker, with its tokenizer."""

    tokenizer: Any
    prefix: str
    cut: Cut

    def __call__(self, span: Span) -> EncodedDocuments:
        documents = [_document(tokens, self.tokenizer, self.cut) for tokens in self._documents(span)]
        return _encoded(documents, span.end, [], {})

    def _documents(self, span: Span) -> Iterator[np.ndarray]:
        corpus, vocabulary = open_corpus(self.prefix), len(self.tokenizer)
        for i in range(span.first, span.last):
            tokens = np.asarray(corpus[i], np.int32)
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocabulary:
                raise ValueError(
                    f"{self.prefix}.bin: document {i} has token ids from {tokens.min()} to {tokens.max()}, the "
                    f"tokenizer has {vocabulary} tokens; name the tokenizer that the corpus was made with"
                )
            yield tokens


def _document(tokens: np.ndarray, tokenizer: Any, cut: Cut) -> Document:
    return tokens, list(futures(tokens, [(1, len(tokens))], tokenizer, cut))


def _encoded(
    documents: list[Document], end: Position, bad: list[BadRecord], columns: Mapping[str, np.ndarray]
) -> EncodedDocuments:
    """The chunk of these documents, their segments numbered."""
    texts, anchors = ChunkTexts(), list[tuple[int, int, int]]()
    for _, segments in documents:
        anchors += [(segment.position, texts.number(text), segment.horizon) for segment, text in segments]
    counts = [len(segments) for _, segments in documents]
    return EncodedDocuments(
        end=end,
        lengths=np.array([len(tokens) for tokens, _ in documents], np.int32),
        max_token_id=max((int(tokens.max(initial=-1)) for tokens, _ in documents), default=-1),
        anchors=np.array(anchors, np.int32).reshape(-1, COLUMNS),
        anchor_counts=np.array(counts, np.int64),
        segments=texts.segments(),
        bad=bad,
        columns=columns,
    )


@dataclass
class DocumentTotals:
    """What the files of a folder hold up to `position`. The names are the manifest's."""

    position: Position = field(default_factory=Position)
    documents: int = 0
    tokens: int = 0
    anchors: int = 0
    max_token_id: int = -1
    rejected: int = 0
    first_bad: str = ""

    @property
    def samples(self) -> int:
        return self.documents

    def columns(self, chunk: EncodedDocuments) -> Mapping[str, ArrayLike]:
        return chunk.columns

    def add(self, chunk: EncodedDocuments) -> None:
        self.documents += len(chunk.lengths)
        self.tokens += int(chunk.lengths.sum(dtype=np.int64))
        self.max_token_id = max(self.max_token_id, chunk.max_token_id)
