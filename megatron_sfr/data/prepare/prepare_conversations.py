"""`prepare`: conversations in, a prepared folder out, in one pass; a run that was killed goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sfr.data.chat.formats import FORMATS, TITLES, detect
from megatron_sfr.data.chat.tokenizer import load_tokenizer, tokenizer_sha256
from megatron_sfr.data.prepare.chunk_loop import Bar, write_chunks
from megatron_sfr.data.prepare.encode_conversations import TOO_LONG, SampleEncoder
from megatron_sfr.data.prepare.write_conversations import REJECTED, SampleFiles
from megatron_sfr.data.prepared.conversations import PreparedData, PreparedManifest
from megatron_sfr.data.segments.anchors import Cut
from megatron_sfr.data.segments.horizons import Horizon, check_horizons, check_segmenter
from megatron_sfr.data.segments.segmenters import Segmenter
from megatron_sfr.storage.integrity import sha256_of
from megatron_sfr.storage.journal import discard_without_journal
from megatron_sfr.storage.jsonl import CHUNK_BYTES, Place, read_chunks
from megatron_sfr.storage.manifest import NAME, InputRecord, publish, staging, write_manifest


@dataclass(frozen=True)
class PrepareOptions:
    """How rows are read and conversations cut: lengths in tokens of the model's tokenizer, horizons in units of the
    segmenter."""

    seq_length: int = 2048
    stride: int = 32
    horizons: tuple[Horizon, ...] = ((1, 256),)
    min_segment_length: int = 16
    segmenter: Segmenter = "window"
    skip_bad_rows: bool = False
    format: str | None = None  # None: told by each file's first row
    persona_key: str = "persona"
    too_long: str = "error"  # or truncate: the first seq_length + 1 tokens are kept

    def __post_init__(self) -> None:
        for name in ("seq_length", "stride", "min_segment_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        check_horizons(self.horizons)
        check_segmenter(self.segmenter)
        if self.format not in (None, *FORMATS):
            raise ValueError(f"format {self.format!r} is unknown; choose {', '.join(FORMATS)}")
        if self.too_long not in TOO_LONG:
            raise ValueError(f"too_long {self.too_long!r} is unknown; choose {' or '.join(TOO_LONG)}")


@dataclass(frozen=True)
class Origin:
    """What decides every byte of a prepared folder; the same names as in its manifest."""

    persona_key: str
    seq_length: int
    too_long: str
    stride: int
    horizons: list[list[int]]
    min_segment_length: int
    segmenter: Segmenter
    vocab_size: int
    tokenizer_sha256: str
    inputs: list[InputRecord]


def prepare(
    inputs: Sequence[Path],
    output: Path,
    tokenizer: str | Path,
    options: PrepareOptions,
    *,
    force: bool = False,
    progress: bool = True,
    workers: int = 1,
    chunk_bytes: int = CHUNK_BYTES,
) -> PreparedManifest:
    """Writes `output`, or leaves it as it is where it already holds just this; ValueError for bad rows and conflicts.

    With `force` the prepared data in `output` is replaced; target stores in it stay, and are checked when opened. What
    is written depends neither on `workers` nor on `chunk_bytes`, the bytes of input that a kill can lose for each.
    """
    inputs, output = [Path(path) for path in inputs], Path(output)
    if not inputs:
        raise ValueError("no input; give at least one JSONL file")
    if workers < 1:
        raise ValueError(f"{workers} workers; give at least 1")
    check_output(output)
    loaded = load_tokenizer(str(tokenizer))
    origin = _origin(inputs, loaded, options, progress)
    if not force and (output / NAME).exists():
        done = PreparedData.open(output).manifest
        if is_up_to_date(output, done, origin, options.skip_bad_rows):
            if progress:
                print(f"{output} is up to date")
                _print_end_tokens(done, loaded)
            return done
    cut = Cut(options.stride, origin.horizons, options.min_segment_length, options.segmenter)
    formats = {str(path): record["format"] for path, record in zip(inputs, origin.inputs, strict=True)}
    encoder = SampleEncoder(loaded, formats, options.persona_key, options.seq_length, options.too_long, cut)
    with staging(output, keep=True) as folder, discard_without_journal(folder):
        with SampleFiles(folder, {"version": PreparedManifest.version, **asdict(origin)}) as files:
            _write(files, inputs, encoder, options.skip_bad_rows, workers, chunk_bytes, progress)
            manifest = _finish(files, origin, tokenizer)
        write_manifest(folder, manifest)
        if not manifest.rejected:
            (output / REJECTED).unlink(missing_ok=True)
        publish(folder, output)
    if progress:
        _print_end_tokens(manifest, loaded)
    return manifest


def _print_end_tokens(manifest: PreparedManifest, tokenizer: Any) -> None:
    """Says which tokens end the replies where they are not the tokenizer's eos_token, at which engines stop."""
    others = [id for id in manifest.reply_end_tokens or () if id != tokenizer.eos_token_id]
    if others:
        names = ", ".join(tokenizer.convert_ids_to_tokens(others))
        print(
            f"replies end on {names}, which is not the tokenizer's eos_token ({tokenizer.eos_token}): "
            "`megatron-sfr convert export` adds it to the end tokens of generation_config.json"
        )


def _origin(inputs: Sequence[Path], tokenizer: Any, options: PrepareOptions, progress: bool) -> Origin:
    records: list[InputRecord] = []
    for path in inputs:
        form = options.format or detect(path)
        if progress:
            print(f"{path.name}: {TITLES[form]}")
        records.append({"path": str(path.resolve()), "sha256": sha256_of(path), "format": form})
    return Origin(
        persona_key=options.persona_key,
        seq_length=options.seq_length,
        too_long=options.too_long,
        stride=options.stride,
        horizons=[list(horizon) for horizon in options.horizons],
        min_segment_length=options.min_segment_length,
        segmenter=options.segmenter,
        vocab_size=len(tokenizer),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        inputs=records,
    )


def check_output(output: Path) -> None:
    """ValueError where `output` is something else than a prepared folder, a part of one, or nothing."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; choose another output folder")
    ours = any((output / name).exists() for name in (NAME, "segment_offsets.bin"))
    if output.is_dir() and not ours and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and is no prepared folder; choose another one or empty it")


def is_up_to_date(output: Path, manifest: Any, origin: Any, skip_bad_rows: bool) -> bool:
    """Whether a run from this origin would write what `output` holds; ValueError where it would write something else.

    Not up to date is a folder with bad rows that are to be reported again. origin: a dataclass, named as the manifest.
    """
    old, new = {name: getattr(manifest, name) for name in asdict(origin)}, asdict(origin)
    for side in (old, new):  # a file may have been moved
        side["inputs"] = [(record["sha256"], record["format"]) for record in side["inputs"]]
    changed = sorted(name for name in new if new[name] != old[name])
    if changed:
        raise ValueError(
            f"{output} was prepared with other values of {', '.join(changed)}; "
            "choose another output folder, or --force to replace it"
        )
    return skip_bad_rows or not manifest.rejected


def _write(
    files: SampleFiles,
    inputs: Sequence[Path],
    encoder: SampleEncoder,
    skip_bad_rows: bool,
    workers: int,
    chunk_bytes: int,
    progress: bool,
) -> None:
    """Everything from the place where the files end."""
    sizes, place = [path.stat().st_size for path in inputs], files.totals.place
    start = bytes_before(place, sizes)
    if start and progress:
        print(f"goes on at {inputs[place.file]}:{place.line}, where an earlier run was stopped")
    bar = Bar(sum(sizes), partial(bytes_before, sizes=sizes), "B", progress)
    workers = min(workers, -(-(sum(sizes) - start) // chunk_bytes) or 1)
    chunks = read_chunks(inputs, place, chunk_bytes)
    write_chunks(files, chunks, encoder, bar, workers=workers, skip_bad_rows=skip_bad_rows)


def bytes_before(place: Place, sizes: Sequence[int]) -> int:
    """Bytes of files of these sizes up to a place."""
    return sum(sizes[: place.file]) + place.byte


def _finish(files: SampleFiles, origin: Origin, tokenizer: str | Path) -> PreparedManifest:
    totals = files.totals
    if not totals.samples:
        first = f"; the first of {totals.rejected} bad rows: {totals.first_bad}" if totals.rejected else ""
        raise ValueError(f"no usable rows in {', '.join(record['path'] for record in origin.inputs)}{first}")
    records, duplicates = files.finish()
    counts = {name: value for name, value in asdict(totals).items() if name in PreparedManifest.__dataclass_fields__}
    return PreparedManifest(
        **counts,
        segments=len(files.segments),
        duplicates=duplicates,
        tokenizer=str(Path(tokenizer).resolve()) if Path(tokenizer).is_dir() else str(tokenizer),
        segments_sha256=records["segments.jsonl"]["sha256"],
        files=records,
        **{name: getattr(origin, name) for name in asdict(origin)},
    )
