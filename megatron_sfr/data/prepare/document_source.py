"""Documents as sources of `prepare`: texts in records, and indexed corpora of Megatron, which stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sfr.data.chat.tokenizer import tokenizer_sha256
from megatron_sfr.data.prepare.encode_documents import (
    LENGTHS,
    TOKENS,
    CorpusEncoder,
    DocumentTotals,
    Span,
    TextEncoder,
)
from megatron_sfr.data.prepared.corpus_files import open_corpus, token_dtype, write_index
from megatron_sfr.data.prepared.documents import ANCHOR_DTYPES, CORPUS, DocumentsManifest, PreparedDocuments
from megatron_sfr.data.prepared.segment_texts import DTYPES as TEXT_DTYPES
from megatron_sfr.data.segments.anchors import Cut
from megatron_sfr.data.segments.segmenters import SEGMENTERS, Horizon, Segmenter, check_horizons, is_whole_reply
from megatron_sfr.storage.input_files import DatasetOptions, record_files
from megatron_sfr.storage.integrity import FileRecord, file_record, sha256_of
from megatron_sfr.storage.jsonl import Chunk, Position, read_chunks
from megatron_sfr.storage.manifest import InputRecord
from megatron_sfr.storage.user_files import check_choice

INDEXED = "indexed dataset"
INDEX = f"{CORPUS}.idx"


@dataclass(frozen=True)
class DocumentOptions:
    """How documents are read and cut into segments. Lengths count tokens, horizons units of the segmenter.

    Example:
        >>> import megatron_sfr as sfr
        >>> sfr.DocumentOptions(segmenter="statement", horizons=((1, 1),)).text_key
        'text'
    """

    stride: int = 32
    """Distance of the anchors in a document."""
    horizons: tuple[Horizon, ...] = ((1, 256),)
    """(offset, length) of each target of an anchor. Offset 1 starts at the token to predict."""
    min_segment_length: int = 16
    """Targets that the end of the document cuts to fewer tokens are dropped."""
    segmenter: Segmenter = "window"
    """What horizons count: tokens (window), sentences or statements."""
    text_key: str = "text"
    """The field that holds the text."""
    eod_token: str | None = None
    """The token that ends each document. None: the tokenizer's eos_token."""
    skip_bad_rows: bool = False
    """Whether to write bad records to rejected.jsonl and continue, instead of stopping at the first one."""
    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    """Which part to read of inputs that are datasets."""

    def __post_init__(self) -> None:
        for name in ("stride", "min_segment_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        check_horizons(self.horizons)
        if any(map(is_whole_reply, self.horizons)):
            raise ValueError("horizon reply is for conversations; give documents horizons such as 1:256")
        check_choice("segmenter", self.segmenter, tuple(SEGMENTERS))

    def source(self, inputs: Sequence[Path]) -> TextRecords | IndexedCorpus:
        """Files of records, or the one prefix of a .bin and .idx. Raises ValueError where an input is neither."""
        if not inputs:
            raise ValueError("no input; give files of records, or the prefix of a .bin and .idx")
        prefixes = [path for path in inputs if not path.exists() and Path(f"{path}.idx").is_file()]
        if prefixes and len(inputs) > 1:
            raise ValueError(f"{prefixes[0]} is an indexed corpus; prepare it alone")
        if prefixes:
            return IndexedCorpus(self, str(prefixes[0].resolve()))
        return TextRecords(self, record_files(inputs, self.dataset))


@dataclass(frozen=True)
class DocumentOrigin:
    """What decides every byte of a folder of documents. Its names are the manifest's."""

    stride: int
    horizons: list[list[int]]
    min_segment_length: int
    segmenter: Segmenter
    text_key: str
    eod: int
    vocab_size: int
    tokenizer_sha256: str
    corpus: str
    inputs: list[InputRecord]


@dataclass(frozen=True)
class _Documents:
    """What both sources of documents have in common."""

    options: DocumentOptions

    version = DocumentsManifest.version
    is_chat = False

    def totals(self) -> DocumentTotals:
        return DocumentTotals()

    def read_manifest(self, folder: Path) -> DocumentsManifest:
        return PreparedDocuments.open(folder).manifest

    def report(self, manifest: DocumentsManifest, tokenizer: Any, say: Callable[[str], None]) -> None:
        """Documents need no remark."""


@dataclass(frozen=True)
class TextRecords(_Documents):
    """Texts in files of records; their tokens become an indexed dataset in the prepared folder."""

    inputs: tuple[Path, ...]

    @property
    def total(self) -> int:
        return sum(path.stat().st_size for path in self.inputs)

    def origin(self, tokenizer: Any, say: Callable[[str], None]) -> DocumentOrigin:
        return _origin(self.options, tokenizer, CORPUS, [(path, "text") for path in self.inputs])

    def chunks(self, start: Position, size: int) -> Iterator[Chunk]:
        return read_chunks(self.inputs, start, size)

    def encoder(self, tokenizer: Any, origin: DocumentOrigin) -> TextEncoder:
        return TextEncoder(tokenizer, origin.eod, self.options.text_key, _cut(origin))

    def dtypes(self, origin: DocumentOrigin) -> Mapping[str, type[np.generic]]:
        return ANCHOR_DTYPES | TEXT_DTYPES | {TOKENS: token_dtype(origin.vocab_size), LENGTHS: np.int32}

    def manifest(self, folder: Path, values: Mapping[str, Any], files: dict[str, FileRecord]) -> DocumentsManifest:
        lengths = np.fromfile(folder / LENGTHS, np.int32)
        (folder / LENGTHS).unlink()
        write_index(folder / INDEX, lengths, token_dtype(values["vocab_size"]))
        return _manifest(values, {**_anchor_files(files), TOKENS: files[TOKENS], INDEX: file_record(folder / INDEX)})


@dataclass(frozen=True)
class IndexedCorpus(_Documents):
    """The documents of PREFIX.bin and PREFIX.idx, which stay where they are."""

    prefix: str

    @property
    def total(self) -> int:
        corpus = open_corpus(self.prefix)
        return int(corpus.sequence_lengths.sum(dtype=np.int64)) * corpus.dtype.itemsize

    def origin(self, tokenizer: Any, say: Callable[[str], None]) -> DocumentOrigin:
        return _origin(self.options, tokenizer, self.prefix, [(Path(f"{self.prefix}.idx"), INDEXED)])

    def chunks(self, start: Position, size: int) -> Iterator[Span]:
        """Documents of about `size` bytes at a time. `Position.offset` is the index of a document."""
        corpus = open_corpus(self.prefix)
        first, done, read = start.offset, start.done, 0
        for document in range(first, len(corpus)):
            read += int(corpus.sequence_lengths[document]) * corpus.dtype.itemsize
            if read >= size or document == len(corpus) - 1:
                done += read
                yield Span(first, document + 1, Position(0, document + 1, document + 2, done))
                first, read = document + 1, 0

    def encoder(self, tokenizer: Any, origin: DocumentOrigin) -> CorpusEncoder:
        return CorpusEncoder(tokenizer, self.prefix, _cut(origin))

    def dtypes(self, origin: DocumentOrigin) -> Mapping[str, type[np.generic]]:
        return ANCHOR_DTYPES | TEXT_DTYPES

    def manifest(self, folder: Path, values: Mapping[str, Any], files: dict[str, FileRecord]) -> DocumentsManifest:
        corpus = {end: file_record(Path(f"{self.prefix}{end}")) for end in (".bin", ".idx")}
        return _manifest(values, _anchor_files(files), corpus)


def _origin(
    options: DocumentOptions, tokenizer: Any, corpus: str, inputs: Sequence[tuple[Path, str]]
) -> DocumentOrigin:
    """inputs: files and their formats. Raises ValueError where the tokenizer has no token to end documents on."""
    eod = tokenizer.eos_token_id if options.eod_token is None else tokenizer.get_vocab().get(options.eod_token)
    if eod is None:
        name = "eos_token" if options.eod_token is None else repr(options.eod_token)
        raise ValueError(f"the tokenizer has no {name} to end documents on; name one of its tokens with --eod-token")
    return DocumentOrigin(
        stride=options.stride,
        horizons=[list(horizon) for horizon in options.horizons],
        min_segment_length=options.min_segment_length,
        segmenter=options.segmenter,
        text_key=options.text_key,
        eod=eod,
        vocab_size=len(tokenizer),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        corpus=corpus,
        inputs=[{"path": str(path.resolve()), "sha256": sha256_of(path), "format": form} for path, form in inputs],
    )


def _cut(origin: DocumentOrigin) -> Cut:
    return Cut(origin.stride, origin.horizons, origin.min_segment_length, origin.segmenter)


def _anchor_files(files: dict[str, FileRecord]) -> dict[str, FileRecord]:
    return {name: files[name] for name in ANCHOR_DTYPES | TEXT_DTYPES}


def _manifest(
    values: Mapping[str, Any], files: dict[str, FileRecord], corpus_files: dict[str, FileRecord] | None = None
) -> DocumentsManifest:
    known = {name: value for name, value in values.items() if name in DocumentsManifest.__dataclass_fields__}
    return DocumentsManifest(**known, files=files, corpus_files=corpus_files)
