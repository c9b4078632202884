"""`embed`: encodes each distinct segment once into a target store; a run that was stopped goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_sfr.data.prepared.open import open_prepared
from megatron_sfr.data.targets.create import Say, begin_store, reopen_damaged
from megatron_sfr.data.targets.encoder import EncoderOptions
from megatron_sfr.data.targets.encoder_pool import Crew, gather
from megatron_sfr.data.targets.fill import Filling
from megatron_sfr.data.targets.store import DEFAULT, StoreIdentity, TargetManifest, TargetStore

MOST = 1_000_000  # of anything that EmbedOptions counts


@dataclass(frozen=True)
class EmbedOptions(EncoderOptions):
    """How segments are encoded, in what batches, and by how many."""

    batch_size: int = 64
    block_rows: int = 256  # encoded as one piece of work: what a kill can lose
    workers: int = 1  # processes on each device, each with an encoder of its own
    devices: tuple[str, ...] = ()  # several of them, instead of `device`

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "block_rows", "workers"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1, and at most {MOST:,}")
        if self.device and self.devices:
            raise ValueError("give one device or several devices, not both")


def embed(
    prepared: Path,
    encoder: str,
    options: EmbedOptions,
    *,
    output: Path | None = None,
    reuse: Sequence[Path] = (),
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
        verify: read every embedding, and encode again what is damaged.
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
    data = open_prepared(prepared)
    folder = Path(output) if output is not None else data.folder / DEFAULT
    say: Say = print if progress else lambda line: None
    devices = (options.devices or (options.device,)) * options.workers
    with closing(gather(encoder, options, devices)) as crew:
        identity = StoreIdentity(**asdict(crew.identity), batch_size=options.batch_size, block_rows=options.block_rows)
        begin_store(folder, data, identity, reuse=reuse, force=force, say=say)
        if verify:
            data.texts.check(data.manifest.files)
            damaged = reopen_damaged(folder, data)
            say(f"{folder}: {damaged:,} of {data.manifest.segments:,} rows are missing or damaged")
        manifest = TargetStore.open(folder, data, partial=True).manifest
        if later:
            return manifest
        if manifest.complete:
            say(f"{folder} is up to date")
        else:
            data.texts.check(data.manifest.files)
            with Filling(folder, data) as filling:
                _fill(filling, crew, progress)
    return TargetStore.open(folder, data).manifest


def _fill(filling: Filling, crew: Crew, progress: bool) -> None:
    """Every row that is not there."""
    from tqdm import tqdm

    rows = {block: filling.rows_of(block) for block in filling.blocks_of(filling.store.rows.missing())}
    total, left = len(filling.store), sum(r.stop - r.start for r in rows.values())
    with tqdm(total=total, initial=total - left, desc="embed", unit="segment", disable=not progress) as bar:
        for block in crew.fill(filling, list(rows)):
            bar.update(rows[block].stop - rows[block].start)
    filling.finish()
