"""`prepare`: reads a source in chunks, encodes them in worker processes, and appends the results to a prepared folder.

The same pipeline serves conversations, plain texts and indexed corpora; each is a `Source`. What is written depends
neither on the number of workers nor on the size of the chunks, and a run that was stopped resumes after its last chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_sfr.data.chat.template_options import ALL_TOGETHER
from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.data.prepare.folder_writer import REJECTED, EncodedChunk, FolderWriter, Totals
from megatron_sfr.data.prepare.worker_pool import ordered_map
from megatron_sfr.storage.arrays import discard_without_journal
from megatron_sfr.storage.integrity import FileRecord
from megatron_sfr.storage.jsonl import CHUNK_BYTES, Position
from megatron_sfr.storage.manifest import NAME, InputRecord, Manifest, publish, staging, write_manifest


class Origin(Protocol):
    """A dataclass of all that decides the bytes of a prepared folder, with the names of the manifest's fields."""

    @property
    def inputs(self) -> list[InputRecord]: ...


class PreparedFolder(Manifest, Protocol):
    """What the manifests of all prepared folders have."""

    @property
    def rejected(self) -> int: ...


class Source[M: PreparedFolder](Protocol):
    """What is prepared: how it is read, encoded and recorded. M is the manifest of the folder that it becomes."""

    @property
    def version(self) -> int:
        """Version of the manifest."""
        ...

    @property
    def is_chat(self) -> bool:
        """Whether the tokenizer needs a chat template."""
        ...

    @property
    def total(self) -> int:
        """Bytes of the source: `Position.done` at its end."""
        ...

    def origin(self, tokenizer: Any, say: Callable[[str], None]) -> Any:
        """The `Origin` of a run. Passes lines about what was recognized to `say`."""
        ...

    def chunks(self, start: Position, size: int) -> Iterator[Any]:
        """The chunks from a position on, of about `size` bytes each."""
        ...

    def encoder(self, tokenizer: Any, origin: Any) -> Callable[[Any], EncodedChunk]:
        """Encodes a chunk. It is pickled once for each worker."""
        ...

    def dtypes(self, origin: Any) -> Mapping[str, type[np.generic]]:
        """The files of the folder that is written, by name, but for rejected.jsonl."""
        ...

    def totals(self) -> Totals:
        """Totals of an empty folder, which also say what a chunk adds to which file."""
        ...

    def manifest(self, folder: Path, values: Mapping[str, Any], files: dict[str, FileRecord]) -> M:
        """Completes the files in `folder` and makes their manifest. values: by the names of its fields, and others."""
        ...

    def read_manifest(self, folder: Path) -> M:
        """The manifest of a complete folder."""
        ...

    def report(self, manifest: M, tokenizer: Any, say: Callable[[str], None]) -> None:
        """Says what a user should know of a finished folder."""
        ...


class Options[M: PreparedFolder](Protocol):
    """Options of `prepare`; their type decides what the inputs are."""

    @property
    def skip_bad_rows(self) -> bool: ...
    def source(self, inputs: Sequence[Path]) -> Source[M]:
        """The source of these inputs. Raises ValueError where they are not of its kind."""
        ...


def prepare[M: PreparedFolder](
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    tokenizer: str | Path,
    options: Options[M],
    *,
    force: bool = False,
    progress: bool = True,
    workers: int = 1,
    chunk_bytes: int = CHUNK_BYTES,
) -> M:
    """Writes the prepared folder `output`, or leaves it unchanged if it holds the same already.

    Args:
        inputs: files of records, folders of them, names of datasets on the hub, or the prefix of an indexed corpus
            (.bin and .idx): one or several.
        output: the folder. Target stores in it stay, and are checked when they are opened.
        tokenizer: folder or name of the model's tokenizer.
        options: `PrepareOptions` for conversations, `DocumentOptions` for texts and indexed corpora.
        force: replace a folder that was prepared with other inputs or options.
        progress: show a progress bar and messages.
        workers: processes that encode.
        chunk_bytes: input that a worker encodes at a time, and that a kill can lose for each worker.
    Returns:
        The manifest of the folder: counts of samples, tokens and segments, and what they were made from.
    Raises:
        ValueError: an input or an option is wrong, or a record is and `options.skip_bad_rows` is False.
    Example:
        >>> import megatron_sfr as sfr
        >>> options = sfr.PrepareOptions(seq_length=256, horizons=((1, 16),), min_segment_length=4)
        >>> manifest = sfr.prepare(["chats.jsonl"], "prepared", "model", options, progress=False)
        >>> manifest.samples
        18
    """
    output, say = Path(output), (print if progress else lambda line: None)
    paths = [inputs] if isinstance(inputs, str | Path) else inputs
    source = options.source([Path(path) for path in paths])
    if workers < 1:
        raise ValueError(f"{workers} workers; give at least 1")
    check_output(output)
    loaded = load_tokenizer(str(tokenizer), chat=source.is_chat)
    origin = source.origin(loaded, say)
    if not force and (output / NAME).exists():
        done = source.read_manifest(output)
        if is_up_to_date(output, done, origin, options.skip_bad_rows):
            say(f"{output} is up to date")
            source.report(done, loaded, say)
            return done
    encoder, about = source.encoder(loaded, origin), {"version": source.version, **asdict(origin)}
    with staging(output, keep=True) as folder, discard_without_journal(folder):
        with FolderWriter(folder, source.dtypes(origin), source.totals(), about) as files:
            _say_resumed(files.totals.position, origin, say)
            _encode(source, encoder, files, workers, chunk_bytes, options.skip_bad_rows, progress)
            manifest = _finish(source, files, origin, tokenizer)
        write_manifest(folder, manifest)
        if not manifest.rejected:
            (output / REJECTED).unlink(missing_ok=True)
        publish(folder, output)
    source.report(manifest, loaded, say)
    return manifest


def check_output(output: Path) -> None:
    """Raises ValueError if `output` is something other than a prepared folder, a part of one, or nothing."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; choose another output folder")
    ours = any((output / name).exists() for name in (NAME, "segment_offsets.bin"))
    if output.is_dir() and not ours and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and is not a prepared folder; choose another one or empty it")


def is_up_to_date(output: Path, manifest: Any, origin: Any, skip_bad_rows: bool) -> bool:
    """Whether a run of this origin would write what `output` holds. Raises ValueError if it would write something else.

    A folder with rejected records is not up to date if these are to be reported.
    """
    old, new = {name: getattr(manifest, name) for name in asdict(origin)}, asdict(origin)
    for side in (old, new):  # a file may have been moved
        side["inputs"] = [(record["sha256"], record["format"]) for record in side["inputs"]]
        if chat := side.pop("chat", None):  # folders of earlier releases lack it, or some of its options
            side |= asdict(ALL_TOGETHER) | chat
    if changed := sorted(name for name in new if new[name] != old.get(name)):
        raise ValueError(
            f"{output} was prepared with other values of {', '.join(changed)}; "
            "choose another output folder, or --force to replace it"
        )
    return skip_bad_rows or not manifest.rejected


def _say_resumed(position: Position, origin: Origin, say: Callable[[str], None]) -> None:
    if position != Position():
        path = origin.inputs[position.file]["path"]
        say(f"resumes at {path}:{position.record}, where an earlier run was stopped")


def _encode(
    source: Source[Any],
    encoder: Callable[[Any], EncodedChunk],
    files: FolderWriter,
    workers: int,
    chunk_bytes: int,
    skip_bad_rows: bool,
    progress: bool,
) -> None:
    """Encodes the rest of the source into the files, in order. Raises ValueError for a bad record, unless skipped."""
    from tqdm import tqdm

    totals = files.totals
    if totals.rejected and not skip_bad_rows:  # by an earlier run, which skipped them
        raise ValueError(totals.first_bad)
    start, before = totals.position.done, totals.samples + totals.rejected
    options: dict[str, Any] = {"desc": "prepare", "unit": "B", "unit_scale": True, "disable": not progress}
    workers = min(workers, -(-(source.total - start) // chunk_bytes) or 1)
    chunks = source.chunks(totals.position, chunk_bytes)
    encoded = ordered_map(encoder, chunks, workers) if workers > 1 else (encoder(chunk) for chunk in chunks)
    with tqdm(total=source.total, initial=start, **options) as bar, closing(encoded):
        for chunk in encoded:
            if chunk.bad and not skip_bad_rows:
                raise ValueError(str(chunk.bad[0]))
            files.add(chunk)
            count = totals.samples + totals.rejected
            rate = (count - before) / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{count:,} records, {rate:,.0f} records/s", refresh=False)
            bar.update(totals.position.done - bar.n)


def _finish[M: PreparedFolder](source: Source[M], files: FolderWriter, origin: Any, tokenizer: str | Path) -> M:
    """The manifest of the finished files. Raises ValueError if no record was usable."""
    totals = files.totals
    if not totals.samples:
        first = f"; the first of {totals.rejected} bad records: {totals.first_bad}" if totals.rejected else ""
        raise ValueError(f"no usable records in {', '.join(record['path'] for record in origin.inputs)}{first}")
    records = files.finish()
    values = {
        **asdict(totals),
        **{name: getattr(origin, name) for name in asdict(origin)},
        "segments": files.segments,
        "segments_sha256": records["segments.jsonl"]["sha256"],
        "tokenizer": str(Path(tokenizer).resolve()) if Path(tokenizer).is_dir() else str(tokenizer),
    }
    return source.manifest(files.folder, values, records)
