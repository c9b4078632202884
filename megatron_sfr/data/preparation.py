"""`prepare`: conversations in, a prepared folder out, in one pass; a bad row stops it or is set aside."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sfr.data.chat import BadRow, Conversation, Encoded, encode, parse_row, read_rows
from megatron_sfr.data.flat import FlatWriter
from megatron_sfr.data.horizons import Horizon, check_horizons, check_segmenter
from megatron_sfr.data.manifest import NAME, InputRecord, publish, sha256_of, staging, write_manifest
from megatron_sfr.data.prepared import DTYPES, PreparedData, PreparedManifest
from megatron_sfr.data.segments import Cut, DistinctTexts, futures, text_digest
from megatron_sfr.data.template import RowError, load_tokenizer, tokenizer_sha256
from megatron_sfr.data.units import Segmenter

REJECTED = "rejected.jsonl"


@dataclass(frozen=True)
class PrepareOptions:
    """How conversations are cut: lengths in tokens of the model's tokenizer, horizons in units of the segmenter."""

    seq_length: int = 2048
    stride: int = 32
    horizons: tuple[Horizon, ...] = ((1, 256),)
    min_segment_length: int = 16
    segmenter: Segmenter = "window"
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        for name in ("seq_length", "stride", "min_segment_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        check_horizons(self.horizons)
        check_segmenter(self.segmenter)


@dataclass(frozen=True)
class Origin:
    """What decides every byte of a prepared folder; the same names as in its manifest."""

    seq_length: int
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
) -> PreparedManifest:
    """Writes `output`, or leaves it as it is where it already holds just this; ValueError for bad rows and conflicts.

    With `force` the prepared data in `output` is replaced; target stores in it stay, and are checked when opened.
    """
    inputs, output = [Path(path) for path in inputs], Path(output)
    if not inputs:
        raise ValueError("no input; give at least one JSONL file")
    _check_output(output)
    loaded = load_tokenizer(str(tokenizer))
    origin = Origin(
        seq_length=options.seq_length,
        stride=options.stride,
        horizons=[list(horizon) for horizon in options.horizons],
        min_segment_length=options.min_segment_length,
        segmenter=options.segmenter,
        vocab_size=len(loaded),
        tokenizer_sha256=tokenizer_sha256(loaded),
        inputs=[{"path": str(path.resolve()), "sha256": sha256_of(path)} for path in inputs],
    )
    if not force and (output / NAME).exists() and (done := _up_to_date(output, origin, options.skip_bad_rows)):
        if progress:
            print(f"{output} is up to date")
        return done
    with staging(output, keep=False) as folder, ExitStack() as stack:
        files = {name: stack.enter_context(FlatWriter(folder / name, dtype)) for name, dtype in DTYPES.items()}
        writer = _Writer(folder, files, loaded, origin)
        for conversation, encoded in _good_rows(inputs, loaded, options, writer, progress):
            writer.add(conversation, encoded)
        manifest = writer.finish(str(Path(tokenizer).resolve()) if Path(tokenizer).is_dir() else str(tokenizer))
        write_manifest(folder, manifest)
        if not manifest.rejected:
            (output / REJECTED).unlink(missing_ok=True)
        publish(folder, output)
    return manifest


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
        side["inputs"] = [record["sha256"] for record in side["inputs"]]
    changed = sorted(name for name in new if new[name] != old[name])
    if changed:
        raise ValueError(
            f"{output} was prepared with other values of {', '.join(changed)}; "
            "choose another output folder, or --force to replace it"
        )
    return manifest if skip_bad_rows or not manifest.rejected else None


def _good_rows(
    inputs: Sequence[Path], tokenizer: Any, options: PrepareOptions, writer: _Writer, progress: bool
) -> Iterator[tuple[Conversation, Encoded]]:
    from tqdm import tqdm

    size = sum(path.stat().st_size for path in inputs)
    with tqdm(total=size, desc="prepare", unit="B", unit_scale=True, disable=not progress) as bar:
        for path in inputs:
            for row in read_rows(path):
                try:
                    conversation = parse_row(row)
                    yield conversation, _encode(conversation, tokenizer, options.seq_length)
                except RowError as error:
                    bad = BadRow(row, str(error))
                    if not options.skip_bad_rows:
                        raise ValueError(str(bad)) from error
                    writer.reject(bad)
                bar.update(len(row.text))


def _encode(conversation: Conversation, tokenizer: Any, seq_length: int) -> Encoded:
    encoded = encode(conversation, tokenizer)
    if len(encoded.tokens) > seq_length + 1:  # inputs are tokens[:-1], labels tokens[1:]
        raise RowError(
            f"{len(encoded.tokens)} tokens, which is over sequence length {seq_length} + 1; "
            "shorten the conversation or raise --seq-length"
        )
    return encoded


class _Writer:
    """The files of a prepared folder while they are written; memory grows only with the number of distinct segments."""

    def __init__(self, folder: Path, files: dict[str, FlatWriter], tokenizer: Any, origin: Origin) -> None:
        self._folder = folder
        self._files = files
        self._tokenizer = tokenizer
        self._origin = origin
        self._segments = DistinctTexts()
        self._personas: Counter[str] = Counter()
        self._persona_index: dict[str, int] = {}
        self._tokens = self._supervised = self._anchors = self._max_anchors = self._segment_bytes = 0
        self._max_response_tokens = 0
        self._first_bad: BadRow | None = None
        self._rejected = 0
        for name in ("offsets.bin", "anchor_offsets.bin", "segment_offsets.bin"):
            self._files[name].append(0)

    def add(self, conversation: Conversation, encoded: Encoded) -> None:
        persona = conversation.persona or ""
        self._personas[persona] += 1
        self._tokens += len(encoded.tokens)
        supervised = int(encoded.loss_mask.sum())
        self._supervised += supervised
        self._max_response_tokens = max(self._max_response_tokens, supervised)
        anchors = self._anchor_rows(encoded)
        self._anchors += len(anchors)
        self._max_anchors = max(self._max_anchors, len(anchors))
        self._files["tokens.bin"].append(encoded.tokens)
        self._files["mask.bin"].append(encoded.loss_mask)
        self._files["offsets.bin"].append(self._tokens)
        self._files["personas.bin"].append(self._persona_index.setdefault(persona, len(self._persona_index)))
        self._files["anchors.bin"].append(anchors)
        self._files["anchor_offsets.bin"].append(self._anchors)

    def reject(self, bad: BadRow) -> None:
        """Sets a row aside, with its reason, for someone to repair."""
        self._first_bad = self._first_bad or bad
        self._rejected += 1
        text = bad.row.text.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
        record = {"file": bad.row.source, "line": bad.row.line, "reason": bad.reason, "row": text}
        with open(self._folder / REJECTED, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def finish(self, tokenizer: str) -> PreparedManifest:
        if not self._personas:
            first = f"; the first of {self._rejected} bad rows: {self._first_bad}" if self._first_bad else ""
            raise ValueError(f"no usable rows in {', '.join(r['path'] for r in self._origin.inputs)}{first}")
        files = {name: file.finish() for name, file in self._files.items()}
        return PreparedManifest(
            samples=self._personas.total(),
            tokens=self._tokens,
            supervised_tokens=self._supervised,
            max_response_tokens=self._max_response_tokens,
            anchors=self._anchors,
            max_anchors=self._max_anchors,
            segments=len(self._segments),
            rejected=self._rejected,
            personas=dict(self._personas),
            tokenizer=tokenizer,
            segments_sha256=files["segments.jsonl"]["sha256"],
            files=files,
            **{name: getattr(self._origin, name) for name in asdict(self._origin)},
        )

    def _anchor_rows(self, encoded: Encoded) -> list[tuple[int, ...]]:
        """Rows of anchors.bin, one for each anchor of a sample and horizon; segments not met before are written."""
        origin = self._origin
        cut = Cut(origin.stride, origin.horizons, origin.min_segment_length, origin.segmenter)
        rows: list[tuple[int, ...]] = []
        for segment, text in futures(encoded.tokens, encoded.replies, self._tokenizer, cut):
            row, is_new = self._segments.row(digest := text_digest(text))
            if is_new:
                line = (json.dumps(text, ensure_ascii=False) + "\n").encode("utf-8")
                self._segment_bytes += len(line)
                self._files["segments.jsonl"].append(np.frombuffer(line, np.uint8))
                self._files["segment_offsets.bin"].append(self._segment_bytes)
                self._files["segment_digests.bin"].append(np.frombuffer(digest, np.uint8))
            rows.append((segment.position, row, segment.response, segment.ordinal, segment.length, segment.horizon))
        return rows
