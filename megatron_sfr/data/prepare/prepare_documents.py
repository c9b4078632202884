"""`prepare-text`: a pretraining corpus in, a folder of prepared documents out; a killed run goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sfr.data.chat.tokenizer import load_tokenizer, tokenizer_sha256
from megatron_sfr.data.prepare.chunk_loop import Bar, write_chunks
from megatron_sfr.data.prepare.encode_documents import DocumentEncoder, OpenCorpus, Span
from megatron_sfr.data.prepare.prepare_conversations import bytes_before, check_output, is_up_to_date
from megatron_sfr.data.prepare.write_conversations import REJECTED
from megatron_sfr.data.prepare.write_documents import DocumentFiles, WriteIndex
from megatron_sfr.data.prepared.documents import CORPUS, DocumentsManifest, PreparedDocuments
from megatron_sfr.data.segments.anchors import Cut
from megatron_sfr.data.segments.horizons import Horizon, check_horizons, check_segmenter
from megatron_sfr.data.segments.segmenters import Segmenter
from megatron_sfr.storage.integrity import FileRecord, sha256_of
from megatron_sfr.storage.journal import discard_without_journal
from megatron_sfr.storage.jsonl import CHUNK_BYTES, Chunk, Place, read_chunks
from megatron_sfr.storage.manifest import NAME, InputRecord, publish, staging, write_manifest

CHUNK_TOKENS = 1 << 18  # of a corpus that is there already
INDEXED = "indexed dataset"


@dataclass(frozen=True)
class DocumentOptions:
    """How documents are read and cut: lengths in tokens of the tokenizer, horizons in units of the segmenter."""

    stride: int = 32
    horizons: tuple[Horizon, ...] = ((1, 256),)
    min_segment_length: int = 16
    segmenter: Segmenter = "window"
    text_key: str = "text"
    eod_token: str | None = None  # None: the tokenizer's eos_token
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        for name in ("stride", "min_segment_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        check_horizons(self.horizons)
        check_segmenter(self.segmenter)


@dataclass(frozen=True)
class Indexed:
    """What upstream's indexed datasets are opened and written with; picklable."""

    open_corpus: OpenCorpus
    write_index: WriteIndex
    token_dtype: Any


@dataclass(frozen=True)
class Origin:
    """What decides every byte of a folder of documents; the same names as in its manifest."""

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


def prepare_documents(
    inputs: Sequence[Path],
    output: Path,
    tokenizer: str | Path,
    options: DocumentOptions,
    indexed: Indexed,
    *,
    force: bool = False,
    progress: bool = True,
    workers: int = 1,
    chunk_bytes: int = CHUNK_BYTES,
) -> DocumentsManifest:
    """Writes `output`, or leaves it as it is where it already holds just this; ValueError for bad rows and conflicts.

    inputs: JSONL files with a text a row, or the one prefix of a .bin and .idx, which stay where they are.
    """
    inputs, output = [Path(path) for path in inputs], Path(output)
    if not inputs:
        raise ValueError("no input; give JSONL files, or the prefix of a .bin and .idx")
    if workers < 1:
        raise ValueError(f"{workers} workers; give at least 1")
    check_output(output)
    loaded = load_tokenizer(str(tokenizer), chat=False)
    origin = _origin(inputs, loaded, options)
    if not force and (output / NAME).exists():
        done = PreparedDocuments.open(output).manifest
        if is_up_to_date(output, done, origin, options.skip_bad_rows):
            if progress:
                print(f"{output} is up to date")
            return done
    cut = Cut(options.stride, origin.horizons, options.min_segment_length, options.segmenter)
    encoder = DocumentEncoder(loaded, origin.eod, options.text_key, cut, indexed.open_corpus)
    with staging(output, keep=True) as folder, discard_without_journal(folder):
        about = {"version": DocumentsManifest.version, **asdict(origin)}
        with DocumentFiles(folder, indexed.token_dtype(origin.vocab_size), about) as files:
            chunks, bar = _chunks(inputs, origin, files.totals.place, indexed, chunk_bytes, progress)
            write_chunks(files, chunks, encoder, bar, workers=workers, skip_bad_rows=options.skip_bad_rows)
            manifest = _finish(files, origin, tokenizer, indexed.write_index if origin.corpus == CORPUS else None)
        write_manifest(folder, manifest)
        if not manifest.rejected:
            (output / REJECTED).unlink(missing_ok=True)
        publish(folder, output)
    return manifest


def _chunks(
    inputs: Sequence[Path], origin: Origin, place: Place, indexed: Indexed, chunk_bytes: int, progress: bool
) -> tuple[Iterator[Chunk | Span], Bar]:
    """What is left to do from `place` on, and the bar that counts it."""
    if origin.corpus == CORPUS:
        sizes = [path.stat().st_size for path in inputs]
        bar = Bar(sum(sizes), partial(bytes_before, sizes=sizes), "B", progress)
        return read_chunks(inputs, place, chunk_bytes), bar
    lengths = indexed.open_corpus(origin.corpus).sequence_lengths
    return _spans(origin.corpus, lengths, place), Bar(int(lengths.sum()), _tokens, "token", progress)


def _origin(inputs: Sequence[Path], tokenizer: Any, options: DocumentOptions) -> Origin:
    prefixes = [path for path in inputs if not path.is_file()]
    if prefixes and len(inputs) > 1:
        raise ValueError(f"{prefixes[0]} is no file; give JSONL files, or the one prefix of a .bin and .idx")
    if prefixes and not Path(f"{prefixes[0]}.idx").is_file():
        raise ValueError(f"{prefixes[0]} is neither a JSONL file nor the prefix of a .bin and .idx")
    eod = tokenizer.eos_token_id if options.eod_token is None else tokenizer.get_vocab().get(options.eod_token)
    if eod is None:
        wanted = "eos_token" if options.eod_token is None else repr(options.eod_token)
        raise ValueError(f"the tokenizer has no {wanted} to end documents on; name one of its tokens with --eod-token")
    files = [Path(f"{prefixes[0]}.idx")] if prefixes else inputs
    form = INDEXED if prefixes else "text"
    return Origin(
        stride=options.stride,
        horizons=[list(horizon) for horizon in options.horizons],
        min_segment_length=options.min_segment_length,
        segmenter=options.segmenter,
        text_key=options.text_key,
        eod=eod,
        vocab_size=len(tokenizer),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        corpus=str(prefixes[0].resolve()) if prefixes else CORPUS,
        inputs=[{"path": str(path.resolve()), "sha256": sha256_of(path), "format": form} for path in files],
    )


def _spans(prefix: str, lengths: Any, start: Place) -> Iterator[Span]:
    """The documents from `start` on, about CHUNK_TOKENS at a time."""
    first, tokens, place = start.line - 1, 0, start
    for document in range(first, len(lengths)):
        tokens += int(lengths[document])
        if tokens >= CHUNK_TOKENS or document == len(lengths) - 1:
            place = Place(0, place.byte + tokens, document + 2)
            yield Span(prefix, first, document + 1, place)
            first, tokens = document + 1, 0


def _tokens(place: Place) -> int:
    return place.byte


def _records(prefix: str) -> dict[str, FileRecord]:
    """Sizes and checksums of a corpus that stays where it is."""
    paths = {end: Path(f"{prefix}{end}") for end in (".bin", ".idx")}
    return {end: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for end, path in paths.items()}


def _finish(
    files: DocumentFiles, origin: Origin, tokenizer: str | Path, write_index: WriteIndex | None
) -> DocumentsManifest:
    totals = files.totals
    if not totals.documents:
        first = f"; the first of {totals.rejected} bad rows: {totals.first_bad}" if totals.rejected else ""
        raise ValueError(f"no usable documents in {', '.join(record['path'] for record in origin.inputs)}{first}")
    records = files.finish(write_index)
    return DocumentsManifest(
        documents=totals.documents,
        tokens=totals.tokens,
        anchors=totals.anchors,
        max_token_id=totals.max_token_id,
        corpus_files=None if origin.corpus == CORPUS else _records(origin.corpus),
        segments=len(files.segments),
        rejected=totals.rejected,
        tokenizer=str(Path(tokenizer).resolve()) if Path(tokenizer).is_dir() else str(tokenizer),
        segments_sha256=records["segments.jsonl"]["sha256"],
        files=records,
        **{name: getattr(origin, name) for name in asdict(origin)},
    )
