"""`prepare`: conversations in, a prepared folder out, in one pass; a run that was killed goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sfr.data.file_pass import PassOptions, encode_files
from megatron_sfr.data.formats import FORMATS, TITLES, detect
from megatron_sfr.data.horizons import Horizon, check_horizons
from megatron_sfr.data.journal import discard_without_journal
from megatron_sfr.data.lines import CHUNK_BYTES
from megatron_sfr.data.manifest import NAME, InputRecord, publish, sha256_of, staging, write_manifest
from megatron_sfr.data.prepared import PreparedData, PreparedManifest
from megatron_sfr.data.sample_files import REJECTED, SampleFiles
from megatron_sfr.data.samples import TOO_LONG, SampleEncoder
from megatron_sfr.data.segments import Cut
from megatron_sfr.data.template import load_tokenizer, tokenizer_sha256


@dataclass(frozen=True)
class PrepareOptions:
    """How rows are read and conversations cut: lengths in tokens of the model's tokenizer."""

    seq_length: int = 2048
    stride: int = 32
    horizons: tuple[Horizon, ...] = ((1, 256),)
    min_segment_length: int = 16
    skip_bad_rows: bool = False
    format: str | None = None  # None: told by each file's first row
    persona_key: str = "persona"
    too_long: str = "error"  # or truncate: the first seq_length + 1 tokens are kept

    def __post_init__(self) -> None:
        for name in ("seq_length", "stride", "min_segment_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        check_horizons(self.horizons)
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
    how = PassOptions(workers, chunk_bytes, options.skip_bad_rows, progress)
    _check_output(output)
    loaded = load_tokenizer(str(tokenizer))
    origin = _origin(inputs, loaded, options, progress)
    if not force and (output / NAME).exists() and (done := _up_to_date(output, origin, options.skip_bad_rows)):
        if progress:
            print(f"{output} is up to date")
        return done
    cut = Cut(options.stride, origin.horizons, options.min_segment_length)
    formats = {str(path): record["format"] for path, record in zip(inputs, origin.inputs, strict=True)}
    encoder = SampleEncoder(loaded, formats, options.persona_key, options.seq_length, options.too_long, cut)
    with staging(output, keep=True) as folder, discard_without_journal(folder):
        with SampleFiles(folder, {"version": PreparedManifest.version, **asdict(origin)}) as files:
            _write(files, inputs, encoder, how)
            manifest = _finish(files, origin, tokenizer)
        write_manifest(folder, manifest)
        if not manifest.rejected:
            (output / REJECTED).unlink(missing_ok=True)
        publish(folder, output)
    return manifest


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
        vocab_size=len(tokenizer),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        inputs=records,
    )


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; choose another output folder")
    ours = any((output / name).exists() for name in (NAME, "segment_offsets.bin"))
    if output.is_dir() and not ours and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and is no prepared folder; choose another one or empty it")


def _up_to_date(output: Path, origin: Origin, skip_bad_rows: bool) -> PreparedManifest | None:
    """The manifest of `output` if this run would write the same; None if there are bad rows to report again."""
    manifest = PreparedData.open(output).manifest
    old = {name: getattr(manifest, name) for name in asdict(origin)}
    new = asdict(origin)
    for side in (old, new):  # a file may have been moved
        side["inputs"] = [(record["sha256"], record["format"]) for record in side["inputs"]]
    changed = sorted(name for name in new if new[name] != old[name])
    if changed:
        raise ValueError(
            f"{output} was prepared with other values of {', '.join(changed)}; "
            "choose another output folder, or --force to replace it"
        )
    return manifest if skip_bad_rows or not manifest.rejected else None


def _write(files: SampleFiles, inputs: Sequence[Path], encoder: SampleEncoder, how: PassOptions) -> None:
    """Everything from the place where the files end."""
    totals = files.totals
    if totals.rejected and not how.skip_bad_rows:  # of an earlier run, which skipped them
        raise ValueError(totals.first_bad)
    with closing(encode_files(inputs, encoder, totals.place, how)) as chunks:
        for chunk in chunks:
            files.add(chunk)


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
