"""`embed`: encodes each distinct segment once into a target store; a run that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_sfr.data.encoder import Encoder, EncoderOptions
from megatron_sfr.data.flat import FlatWriter, map_flat
from megatron_sfr.data.manifest import NAME, FileRecord, publish, sha256_of, staging, write_manifest
from megatron_sfr.data.prepared import PreparedData
from megatron_sfr.data.statistics import statistics_of
from megatron_sfr.data.targets import DEFAULT, STATISTICS, VECTORS, EncoderIdentity, TargetManifest, TargetStore

JOURNAL = "journal.txt"  # a line that says of what, then one checksum a block


@dataclass(frozen=True)
class EmbedOptions(EncoderOptions):
    """How segments are encoded, and how many at a time."""

    batch_size: int = 64
    block_rows: int = 2048  # flushed and checksummed together: what a kill can lose

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "block_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")


def embed(
    prepared: Path,
    encoder: str,
    options: EmbedOptions,
    *,
    output: Path | None = None,
    force: bool = False,
    progress: bool = True,
) -> TargetManifest:
    """Writes the store `output` (PREPARED/targets unless said), or leaves it as it is where it already holds just this.

    With `force` a store that holds something else is replaced.
    """
    data = PreparedData.open(prepared)
    output = Path(output) if output is not None else data.folder / DEFAULT
    exists = (output / NAME).exists()
    if not data.manifest.segments:
        raise ValueError(f"{data.folder} has no segments to embed; prepare it with a smaller --min-segment-length")
    ours = exists or (output / VECTORS).exists()
    if not ours and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is no target store; choose another output folder")
    model = Encoder(encoder, options)
    if exists and not force:
        manifest = _up_to_date(output, data, model.identity)
        if progress:
            print(f"{output} is up to date")
        return manifest
    with staging(output, keep=True) as folder:
        _encode_segments(folder, data, model, options, progress)
        vectors = folder / VECTORS
        manifest = TargetManifest(
            **asdict(model.identity),
            segments=data.manifest.segments,
            segments_sha256=data.manifest.segments_sha256,
            files={
                VECTORS: {"bytes": vectors.stat().st_size, "sha256": sha256_of(vectors)},
                STATISTICS: _write_statistics(folder, model.identity.dim),
            },
        )
        write_manifest(folder, manifest)
        publish(folder, output)
    return manifest


def _up_to_date(output: Path, data: PreparedData, identity: EncoderIdentity) -> TargetManifest:
    manifest = TargetStore.open(output, data).manifest
    new = _what_decides(identity)
    changed = sorted(name for name in new if getattr(manifest, name) != new[name])
    if changed:
        raise ValueError(
            f"{output} was made with other values of {', '.join(changed)}; "
            "choose another output folder, or --force to replace it"
        )
    return manifest


def _what_decides(identity: EncoderIdentity) -> dict[str, Any]:
    return {name: value for name, value in asdict(identity).items() if name != "encoder"}


def _encode_segments(folder: Path, data: PreparedData, model: Encoder, options: EmbedOptions, progress: bool) -> None:
    """Appends block after block to vectors and journal: rows count once their checksum stands in the journal."""
    from tqdm import tqdm

    total = data.manifest.segments
    head = {
        **_what_decides(model.identity),
        "segments_sha256": data.manifest.segments_sha256,
        "batch_size": options.batch_size,  # it decides the last bits of a row
        "block_rows": options.block_rows,
    }
    with open(folder / VECTORS, "a+b") as vectors, open(folder / JOURNAL, "a+b") as journal:
        block_bytes = options.block_rows * model.identity.dim * np.dtype(np.float16).itemsize
        done = min(_resume(vectors, journal, head, block_bytes) * options.block_rows, total)
        with tqdm(total=total, initial=done, desc="embed", unit="segment", disable=not progress) as bar:
            while done < total:
                rows = range(done, min(done + options.block_rows, total))
                texts = [data.segment_text(row) for row in rows]
                block = _encode_block(texts, model, options.batch_size, bar).tobytes()
                _append(vectors, block)
                _append(journal, _checksum_line(block))
                done = rows.stop


def _encode_block(texts: list[str], model: Encoder, batch_size: int, bar: Any) -> np.ndarray:
    """fp16 [len(texts), dim], encoded longest first: batches of equal lengths need little padding."""
    block = np.empty((len(texts), model.identity.dim), np.float16)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        block[batch] = model.encode([texts[i] for i in batch])
        bar.update(len(batch))
    return block


def _write_statistics(folder: Path, dim: int) -> FileRecord:
    """Mean and standard deviation of the rows as they are stored, in fp16."""
    statistics = statistics_of(map_flat(folder / VECTORS, np.float16).reshape(-1, dim))
    with FlatWriter(folder / STATISTICS, np.float32) as file:
        file.append(statistics.mean)
        file.append(statistics.std)
        return file.finish()


def _resume(vectors: BinaryIO, journal: BinaryIO, head: dict[str, Any], block_bytes: int) -> int:
    """The number of whole blocks that an earlier run left; cuts off whatever follows them."""
    head_line = json.dumps(head).encode() + b"\n"
    vectors.seek(0)
    journal.seek(0)
    blocks = kept_bytes = kept_lines = 0
    if journal.readline() == head_line:
        kept_lines = len(head_line)
        for line in journal:
            block = vectors.read(block_bytes)
            if line != _checksum_line(block):
                break
            blocks, kept_bytes, kept_lines = blocks + 1, kept_bytes + len(block), kept_lines + len(line)
    vectors.truncate(kept_bytes)
    journal.truncate(kept_lines)
    if not kept_lines:
        _append(journal, head_line)
    return blocks


def _checksum_line(block: bytes) -> bytes:
    return hashlib.sha256(block).hexdigest().encode() + b"\n"


def _append(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
