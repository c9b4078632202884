"""Prepared data of few segments and stores of it, shared by the tests of target stores."""

from pathlib import Path

import numpy as np

from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.targets.embed import EmbedOptions, embed
from megatron_sfr.data.targets.store import TargetManifest, TargetStore
from megatron_sfr.data.targets.vectors import VECTORS
from tests.data.records import turns, write_records

CUT = PrepareOptions(seq_length=200, stride=4, horizons=((1, 12),), min_segment_length=4)
BLOCKS = EmbedOptions(batch_size=2, block_rows=3, device="cpu")
RECORDS = [
    {"messages": turns("the sea", "is blue and the sky is grey and so on")},
    {"messages": turns("the sky", "is blue and the sky is grey and so on")},
    {"messages": turns("who", "the sky", "what", "is GREY and the sea is blue, as ever it was and will be!")},
]


def write_prepared(folder: Path, tokenizer: Path, records: list = RECORDS, force: bool = False) -> Path:
    """FOLDER/data, of these records."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs = [write_records(folder / "records.jsonl", records)]
    prepare(inputs, folder / "data", tokenizer, CUT, force=force, progress=False)
    return folder / "data"


def run(prepared: Path, **changes) -> Path:
    """The store, as `embed` leaves it."""
    arguments = {"encoder": "minilm", "options": BLOCKS, "progress": False} | changes
    embed(prepared, **arguments)
    return arguments.get("output") or prepared / "targets"


def open_store(folder: Path, prepared: Path, *, partial: bool = False) -> TargetStore:
    return TargetStore.open(folder, PreparedData.open(prepared), partial=partial)


def flip(path: Path, byte: int) -> None:
    """Damages one bit of a file in place, as a disk does."""
    with open(path, "r+b") as file:
        file.seek(byte)
        (old,) = file.read(1)
        file.seek(byte)
        file.write(bytes([old ^ 1]))


def damage_row(store: Path, row: int, dim: int = 384) -> None:
    flip(store / VECTORS, row * dim * np.dtype(np.float16).itemsize + 5)


def manifest_of(store: Path, prepared: Path) -> TargetManifest:
    return open_store(store, prepared, partial=True).manifest
