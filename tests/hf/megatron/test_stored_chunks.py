"""Tensors are read or copied straight from a checkpoint's files, however their chunks are cut and stored."""

import pickle
from io import BytesIO
from itertools import pairwise
from zipfile import ZIP_STORED, ZipFile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_sfr.hf.megatron import stored_chunks
from megatron_sfr.hf.megatron.file_ranges import FileRange
from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint, Chunk, write_checkpoint
from megatron_sfr.hf.megatron.safe_unpickle import read_metadata
from megatron_sfr.hf.megatron.stored_chunks import as_bytes
from megatron_sfr.hf.megatron.tracker import METADATA

LAYERS, ROWS, COLUMNS = 3, (0, 2, 3, 7), (0, 3, 5)
WHOLE = torch.arange(LAYERS * 7 * 5).reshape(LAYERS, 7, 5).to(torch.float32)


def cut(key, rows, columns, dtype=torch.float32):
    """WHOLE, each layer cut at these rows and columns, as Megatron's tensor parallelism cuts it."""
    for layer in range(LAYERS):
        for a, b in pairwise(rows):
            for c, d in pairwise(columns):
                box = WHOLE[layer : layer + 1, a:b, c:d].to(dtype)
                yield Chunk(key, tuple(WHOLE.shape), dtype, (layer, a, c), tuple(box.shape), lambda box=box: box)


@pytest.fixture(scope="module", autouse=True)
def large():
    """No archive is small. test_megatron_checkpoint.py reads small ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_chunks, "SMALL_BYTES", 0)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("save") / "iter_0000003"
    scalar = Chunk("scalar", (), torch.float32, (), (), lambda: torch.tensor(2.5))
    chunks = [*cut("rows", ROWS, (0, 5)), *cut("columns", (0, 7), COLUMNS), *cut("both", ROWS, COLUMNS), scalar]
    write_checkpoint(folder, chunks, {})
    return folder


def content(pieces, dtype):
    """The values of pieces, one after another."""
    found = b"".join(
        x.path.read_bytes()[x.start : x.start + x.bytes] if isinstance(x, FileRange) else bytes(as_bytes(x))
        for x in pieces
    )
    return torch.frombuffer(bytearray(found), dtype=dtype)


@given(st.data(), st.sampled_from(["rows", "columns", "both"]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_pieces_of_any_box(folder, data, key, dtype):
    start = [data.draw(st.integers(0, n - 1)) for n in WHOLE.shape]
    size = [data.draw(st.integers(1, n - a)) for a, n in zip(start, WHOLE.shape, strict=True)]
    wanted = WHOLE[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
    checkpoint = Checkpoint(folder)
    assert torch.equal(checkpoint.read(key, start, size), wanted)
    assert torch.equal(content(checkpoint.pieces(key, start, size, dtype), dtype), wanted.to(dtype).flatten())


def test_rows_are_copied_from_the_files_and_columns_are_assembled(folder, monkeypatch):
    monkeypatch.setattr(stored_chunks, "PIECE_BYTES", 2 * 5 * 4)
    read = Checkpoint(folder).pieces
    assert [x.bytes for x in read("rows", (1, 1, 0), (1, 5, 5), torch.float32)] == [20, 20, 60]
    for key, dtype in (("columns", torch.float32), ("rows", torch.bfloat16)):
        assert [x.shape for x in read(key, (1, 1, 0), (1, 5, 5), dtype)] == [(1, 2, 5), (1, 2, 5), (1, 1, 5)]


def test_a_tensor_without_axes(folder):
    assert Checkpoint(folder).read("scalar", (), ()) == 2.5


def stored_otherwise(folder, target, stored):
    """A copy of the checkpoint in which the middle rows of layer 1 are stored as these bytes."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    metadata = read_metadata(target / METADATA)
    info = metadata.storage_data[MetadataIndex("rows", (1, 2, 0))]
    info.relative_path, info.offset, info.length = "other.distcp", 3, len(stored)
    (target / METADATA).write_bytes(pickle.dumps(metadata))
    (target / "other.distcp").write_bytes(b"abc" + stored + b"d")
    return Checkpoint(target)


def saved(tensor, **options):
    stream = BytesIO()
    torch.save(tensor, stream, **options)
    return stream.getvalue()


def other_byte_order(tensor):
    """What torch.save writes on a machine with the other byte order."""
    stream = BytesIO()
    with ZipFile(BytesIO(saved(tensor))) as own, ZipFile(stream, "w", ZIP_STORED) as other:
        for name in own.namelist():
            content = own.read(name)
            if name.endswith("/data/0"):
                content = tensor.numpy().byteswap().tobytes()
            other.writestr(name, b"big" if name.endswith("/byteorder") else content)
    return stream.getvalue()


MIDDLE = WHOLE[1:2, 2:3].clone()


@pytest.mark.parametrize(
    ("stored", "copied"),
    [
        (saved(MIDDLE), True),
        (saved(WHOLE[1:2, 1:4].clone()[:, 1:2]), True),  # the middle of a larger storage
        (saved(MIDDLE, _use_new_zipfile_serialization=False), False),
        (other_byte_order(MIDDLE), False),
        (saved(torch.stack([MIDDLE, MIDDLE], 3)[..., 0]), False),  # with gaps between its values
    ],
)
def test_other_ways_to_store_a_chunk(folder, tmp_path, stored, copied):
    checkpoint = stored_otherwise(folder, tmp_path / "iter_0000003", stored)
    assert torch.equal(checkpoint.read("rows", (0, 0, 0), WHOLE.shape), WHOLE)
    pieces = list(checkpoint.pieces("rows", (1, 0, 0), (1, 7, 5), torch.float32))
    assert all(isinstance(x, FileRange) is copied for x in pieces)
    assert torch.equal(content(pieces, torch.float32), WHOLE[1].flatten())


@pytest.mark.parametrize(
    ("stored", "match"),
    [
        (saved(MIDDLE[..., :4].clone()), r"a chunk of rows is not \[1, 1, 5\]"),
        (saved(MIDDLE.double()), "a chunk of rows is not .* of torch.float32"),
        (saved({"a": MIDDLE}), "a chunk of rows is not"),
        (saved(MIDDLE)[:-30], "iter_0000003: rows cannot be read"),
        (saved(MIDDLE).replace(b"archive/data/0", b"archive/data/9"), "iter_0000003: rows cannot be read"),
    ],
)
def test_a_chunk_that_is_not_what_the_metadata_says(folder, tmp_path, stored, match):
    checkpoint = stored_otherwise(folder, tmp_path / "iter_0000003", stored)
    with pytest.raises(ValueError, match=match):
        checkpoint.read("rows", (0, 0, 0), WHOLE.shape)
    with pytest.raises(ValueError, match=match):
        list(checkpoint.pieces("rows", (0, 0, 0), WHOLE.shape, torch.float32))


def test_a_chunk_that_was_never_stored(folder, tmp_path):
    metadata = read_metadata(folder / METADATA)
    del metadata.state_dict_metadata["rows"].chunks[1]
    (tmp_path / METADATA).write_bytes(pickle.dumps(metadata))
    for file in folder.glob("*.distcp"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="parts of rows are not stored"):
        list(Checkpoint(tmp_path).pieces("rows", (0, 0, 0), (1, 7, 5), torch.float32))
