"""`embed`: encodes each distinct segment once into a target store. A run that was stopped resumes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_sfr.data.prepared.open import open_prepared
from megatron_sfr.data.targets.create import Say, create_store, reopen_if_damaged
from megatron_sfr.data.targets.encoder import EncoderOptions
from megatron_sfr.data.targets.encoder_pool import EncoderPool, open_pool
from megatron_sfr.data.targets.fill import StoreWriter
from megatron_sfr.data.targets.store import DEFAULT, StoreIdentity, TargetManifest, TargetStore

MOST = 1_000_000  # of anything that EmbedOptions counts


@dataclass(frozen=True)
class EmbedOptions(EncoderOptions):
    """How segments are encoded, in which batches, and by how many processes.

    Example:
        >>> import megatron_sfr as sfr
        >>> sfr.EmbedOptions(dtype="bfloat16", devices=("cuda:0", "cuda:1")).block_rows
        256
    """

    batch_size: int = 64
    """Segments in a batch of the encoder."""
    block_rows: int = 256
    """Segments that a process encodes at a time, and that a kill can lose."""
    workers: int = 1
    """Processes on each device. Each loads the encoder."""
    devices: tuple[str, ...] = ()
    """Several devices, instead of `device`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "block_rows", "workers"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1, and at most {MOST:,}")
        if self.device and self.devices:
            raise ValueError("give one device or several devices, not both")


def embed(
    prepared: str | Path,
    encoder: str | Path,
    options: EmbedOptions,
    *,
    output: str | Path | None = None,
    reuse: Sequence[str | Path] = (),
    verify: bool = False,
    later: bool = False,
    force: bool = False,
    progress: bool = True,
) -> TargetManifest:
    """Encodes each distinct segment of a prepared folder once, into a store of SFR's targets.

    A store that is complete stays as it is; one that an earlier call left incomplete is resumed.

    Args:
        prepared: a folder that `prepare` wrote.
        encoder: a sentence-transformers model: a folder, a name, or minilm.
        options: how segments are encoded, and by how many processes.
        output: the store. Default: PREPARED/targets.
        reuse: stores of the same encoder from which embeddings of equal texts are copied, besides the replaced one.
        verify: read every embedding, and encode damaged ones again.
        later: create the store and leave the encoding to a run with online targets, or to the next call.
        force: replace a store of another encoder.
        progress: show a progress bar and messages.
    Returns:
        The manifest of the store: encoder, dimension D, number of segments.
    Raises:
        ValueError: the folder, the encoder or an option is wrong, or the store belongs to another encoder.
    Example:
        >>> import megatron_sfr as sfr
        >>> manifest = sfr.embed("prepared", "minilm", sfr.EmbedOptions(device="cpu"), progress=False)
        >>> manifest.dim
        384
    """
    if not isinstance(encoder, str | Path):
        raise ValueError(
            f"the encoder is a {type(encoder).__name__}: give a folder of sentence-transformers, a name on the hub, or "
            "minilm"
        )
    encoder, data = str(encoder), open_prepared(prepared)
    folder = Path(output) if output is not None else data.folder / DEFAULT
    say: Say = print if progress else lambda line: None
    devices = (options.devices or (options.device,)) * options.workers
    with closing(open_pool(encoder, options, devices)) as pool:
        identity = StoreIdentity(**asdict(pool.identity), batch_size=options.batch_size, block_rows=options.block_rows)
        create_store(folder, data, identity, reuse=[Path(store) for store in reuse], force=force, say=say)
        if verify:
            data.texts.check(data.manifest.files)
            damaged = reopen_if_damaged(folder, data)
            say(f"{folder}: {damaged:,} of {data.manifest.segments:,} embeddings are missing or damaged")
        manifest = TargetStore.open(folder, data, partial=True).manifest
        if later:
            return manifest
        if manifest.complete:
            say(f"{folder} is up to date")
        else:
            data.texts.check(data.manifest.files)
            with StoreWriter(folder, data) as writer:
                _fill(writer, pool, progress)
    return TargetStore.open(folder, data).manifest


def _fill(writer: StoreWriter, pool: EncoderPool, progress: bool) -> None:
    """Encodes every embedding that is missing or damaged."""
    from tqdm import tqdm

    rows = {block: writer.rows_of(block) for block in writer.blocks_of(writer.store.embeddings.missing())}
    total, left = len(writer.store), sum(r.stop - r.start for r in rows.values())
    with tqdm(total=total, initial=total - left, desc="embed", unit="segment", disable=not progress) as bar:
        for block in pool.fill(writer, list(rows)):
            bar.update(rows[block].stop - rows[block].start)
    writer.finish()
