"""Creates target stores: of full size, with the embeddings of texts that earlier stores have."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from megatron_sfr.data.prepared.segment_texts import HasSegments
from megatron_sfr.data.targets.store import (
    COPIED,
    DIGESTS,
    STATISTICS,
    StoreIdentity,
    TargetManifest,
    check_files,
    differences,
    embed_hint,
)
from megatron_sfr.data.targets.vectors import CHUNK_ROWS, VECTORS, Embeddings, EmbeddingWriter
from megatron_sfr.storage.arrays import FlatWriter, map_flat
from megatron_sfr.storage.integrity import FileRecord, StoredFileError, check_contents, hint, sha256_of
from megatron_sfr.storage.manifest import NAME, publish, read_manifest, staging, write_manifest

BATCHES = {"batch_size", "block_rows"}
"""Fields of a store's identity that change only the last bits of an embedding."""
Say = Callable[[str], None]


def create_store(
    folder: Path,
    prepared: HasSegments,
    identity: StoreIdentity,
    *,
    reuse: Sequence[Path] = (),
    force: bool = False,
    say: Say = print,
) -> None:
    """Makes `folder` a store of these segments by this encoder, complete or to be filled. Leaves it if it is one.

    A store of other segments by the same encoder is replaced; embeddings of texts that are still needed are copied from
    it.

    Args:
        folder: the store.
        prepared: the prepared folder whose segments it holds.
        identity: encoder and batches.
        reuse: other stores of the same encoder to copy embeddings from.
        force: replace a store of another encoder.
        say: takes lines about how many embeddings were copied from where.
    Raises:
        ValueError: `folder` is something else, or a store of another encoder.
    """
    if not prepared.manifest.segments:
        raise ValueError(f"{prepared.folder} has no segments to embed; prepare it with a smaller --min-segment-length")
    ours = (folder / NAME).exists() or (folder / VECTORS).exists()
    if not ours and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not a target store; choose another output folder")
    old = _manifest(folder, prepared, force)
    sources = list(reuse)
    if old is not None:
        changed = set(differences(old, identity))
        if old.complete:  # other batches would give equal rows, up to rounding
            changed -= BATCHES
        if changed and not force:
            raise ValueError(
                f"{folder} was made with other values of {', '.join(sorted(changed))}; "
                "choose another output folder, or --force to replace it"
            )
        if not changed and old.segments_sha256 == prepared.manifest.segments_sha256:
            return
        if changed <= BATCHES:
            sources.insert(0, folder)
    _write_new(folder, prepared, identity, sources, say)


def _manifest(folder: Path, prepared: HasSegments, force: bool) -> TargetManifest | None:
    """The manifest of an existing store. None if there is none, or if it cannot be read and `force` is set."""
    if not (folder / NAME).exists():
        return None
    try:
        with embed_hint(folder, prepared):
            return read_manifest(folder, TargetManifest)
    except ValueError:
        if not force:
            raise
        return None


def _write_new(folder: Path, prepared: HasSegments, identity: StoreIdentity, sources: Sequence[Path], say: Say) -> None:
    segments = prepared.manifest.segments
    with staging(folder, keep=False) as new:
        with hint(f"run: megatron-sfr inspect --verify --data {prepared.folder}"):
            check_contents(prepared.folder, {DIGESTS: prepared.manifest.files[DIGESTS]})
        shutil.copyfile(prepared.folder / DIGESTS, new / DIGESTS)
        wanted = map_flat(new / DIGESTS, np.uint64).reshape(-1, 2)
        copied = np.zeros(segments, bool)
        with EmbeddingWriter(new, segments, identity.dim) as writer:
            for source in sources:
                try:
                    taken = _take(source, identity, wanted, copied, writer)
                    say(f"{taken:,} of {segments:,} segments taken from {source}")
                except ValueError as error:
                    if source != folder:
                        raise
                    say(f"no segment taken from the store to be replaced: {error}")
            writer.sync()
        manifest = TargetManifest(
            **asdict(identity),
            segments=segments,
            segments_sha256=prepared.manifest.segments_sha256,
            complete=False,
            files={DIGESTS: prepared.manifest.files[DIGESTS], COPIED: _write_copied(new, copied)},
        )
        write_manifest(new, manifest)
        publish(new, folder)


def _take(
    source: Path, identity: StoreIdentity, wanted: np.ndarray, copied: np.ndarray, writer: EmbeddingWriter
) -> int:
    """Copies embeddings of `wanted` (digests [n, 2]) that are not `copied` [n] yet. Marks and counts them."""
    with hint("leave it out of --reuse"):
        manifest = read_manifest(source, TargetManifest)
        if changed := set(differences(manifest, identity)) - BATCHES:
            raise StoredFileError(f"{source} was made with other values of {', '.join(sorted(changed))}")
        check_files(source, manifest)
    old = _indices(wanted, map_flat(source / DIGESTS, np.uint64).reshape(-1, 2))
    rows, found = Embeddings(source, manifest.dim), np.flatnonzero((old >= 0) & ~copied)
    for first in range(0, len(found), CHUNK_ROWS):
        chunk = found[first : first + CHUNK_ROWS]
        vectors, good = rows.read(old[chunk])
        writer.write(chunk[good], vectors[good])
        copied[chunk[good]] = True
    return int(copied[found].sum())


def _indices(wanted: np.ndarray, have: np.ndarray) -> np.ndarray:
    """Index in `have` [m, 2] of each digest of `wanted` [n, 2], int64 [n]; -1 if it is missing.

    Digests are found by their first 8 bytes: if two texts agree in these, one is encoded again.
    """
    order = np.argsort(have[:, 0])
    place = np.searchsorted(have[:, 0], wanted[:, 0], sorter=order).clip(max=len(have) - 1)
    return np.where((have[order[place]] == wanted).all(axis=1), order[place], -1)


def _write_copied(folder: Path, copied: np.ndarray) -> FileRecord:
    with FlatWriter(folder / COPIED, np.uint8) as file:
        file.append(copied)
        return file.finish()


def reopen_if_damaged(folder: Path, prepared: HasSegments) -> int:
    """Reads a complete store and marks it incomplete if anything is damaged, so that it is filled again.

    The store must belong to these segments, as after `create_store`.

    Returns:
        The number of embeddings that are missing or damaged.
    """
    with embed_hint(folder, prepared):
        manifest = read_manifest(folder, TargetManifest)
    with EmbeddingWriter(folder, manifest.segments, manifest.dim):  # restores the size of a truncated file
        missing = len(Embeddings(folder, manifest.dim).missing())
    files = dict(manifest.files)
    damaged = {name for name, record in files.items() if not _is_whole(folder / name, record)}
    if DIGESTS in damaged:
        shutil.copyfile(prepared.folder / DIGESTS, folder / DIGESTS)
    if COPIED in damaged:  # all then count as encoded here: damaged blocks may change in the last bits
        files[COPIED] = _write_copied(folder, np.zeros(manifest.segments, bool))
    if missing or damaged:
        files.pop(STATISTICS, None)
        write_manifest(folder, replace(manifest, complete=False, files=files))
    return missing


def _is_whole(path: Path, record: FileRecord) -> bool:
    return path.is_file() and sha256_of(path) == record["sha256"]
