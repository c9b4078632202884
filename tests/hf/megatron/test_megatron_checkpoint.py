"""Checkpoints that are read chunk by chunk equal torch's reading; unfinished, damaged and hostile ones are refused."""

import argparse
import json
import os
import pickle
import shutil
from io import BytesIO
from itertools import pairwise

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.hf.megatron.megatron_checkpoint import COMMON, Checkpoint, Chunk, find_checkpoint
from megatron_sfr.hf.megatron.megatron_checkpoint import write_checkpoint as write
from megatron_sfr.hf.megatron.safe_unpickle import read_common_state, read_metadata
from megatron_sfr.hf.megatron.tracker import CONFIG, METADATA, TRACKER

WHOLE = torch.arange(7 * 5 * 4, dtype=torch.float64).reshape(7, 5, 4)
ROWS, COLUMNS = (0, 2, 3, 7), (0, 4, 5)


def chunks():
    """A tensor in uneven boxes, and one in bf16."""
    for a, b in pairwise(ROWS):
        for c, d in pairwise(COLUMNS):
            box = WHOLE[a:b, c:d]
            yield Chunk("x", (7, 5, 4), box.dtype, (a, c, 0), tuple(box.shape), lambda box=box: box)
    small = torch.tensor([1.5, -0.0], dtype=torch.bfloat16)
    yield Chunk("y", (2,), small.dtype, (0,), (2,), lambda: small)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("save") / "iter_0000003"
    args = argparse.Namespace(rotary_base=7, dtype=torch.bfloat16, path=folder)
    write(folder, chunks(), {COMMON: {"args": args, "iteration": 3}, "x._extra_state/shard_0_1": None})
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    """A --save folder whose newest checkpoint is iteration 3."""
    target = tmp_path / folder.name
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    (tmp_path / TRACKER).write_text("3")
    return target


@given(st.data())
def test_any_box_is_read(folder, data):
    start = [data.draw(st.integers(0, n - 1)) for n in WHOLE.shape]
    stop = [data.draw(st.integers(a + 1, n)) for a, n in zip(start, WHOLE.shape, strict=True)]
    box = Checkpoint(folder).read("x", start, [b - a for a, b in zip(start, stop, strict=True)])
    assert torch.equal(box, WHOLE[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))])


def test_torch_reads_the_same(folder):
    state = {"x": torch.zeros(7, 5, 4, dtype=torch.float64), "y": torch.zeros(2, dtype=torch.bfloat16)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(state, checkpoint_id=folder)
    assert torch.equal(state["x"], WHOLE)
    assert state["y"].view(torch.int16).tolist() == torch.tensor([1.5, -0.0]).bfloat16().view(torch.int16).tolist()


def test_arguments_are_read_without_building_what_they_name(folder):
    arguments = Checkpoint(folder).arguments()
    assert arguments["rotary_base"] == 7
    assert not isinstance(arguments["path"], os.PathLike)


def test_newest_is_the_checkpoint_that_the_tracker_names(copy):
    assert find_checkpoint(copy.parent) == copy
    assert find_checkpoint(copy) == copy


@pytest.mark.parametrize("name", [METADATA, CONFIG])
def test_a_save_in_progress_is_not_read(copy, name, caplog):
    older = shutil.copytree(copy, copy.parent / "iter_0000002")
    (copy / name).unlink()
    assert find_checkpoint(copy.parent) == older
    assert f"names iter_0000003, which has no {name}: still being written" in caplog.text
    with pytest.raises(ValueError, match=rf"has no {name}: still being written.*complete: iter_0000002"):
        find_checkpoint(copy)


def test_a_newer_save_in_progress_is_passed_over(copy):
    """The tracker moves last: until then the newest whole checkpoint is what is read."""
    (copy.parent / "iter_0000004").mkdir()
    (copy.parent / "iter_0000004" / "__0_0.distcp").write_bytes(b"half")
    assert find_checkpoint(copy.parent) == copy
    with pytest.raises(ValueError, match=rf"iter_0000004 has no {METADATA}: still being .*; complete: iter_0000003"):
        find_checkpoint(copy.parent / "iter_0000004")


def test_the_first_save_is_still_being_written(copy):
    (copy.parent / TRACKER).unlink()
    (copy / CONFIG).unlink()
    with pytest.raises(ValueError, match="its first save is not finished"):
        find_checkpoint(copy.parent)


def test_nothing_saved_yet(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint here"):
        find_checkpoint(tmp_path)


def test_tracker_of_a_checkpoint_that_is_gone(copy, caplog):
    (copy.parent / TRACKER).write_text("9")
    assert find_checkpoint(copy.parent) == copy
    assert "names iter_0000009, which does not exist: iter_0000003 is used" in caplog.text


def test_other_formats_are_named(copy):
    (copy / CONFIG).write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(ValueError, match="its format is zarr"):
        find_checkpoint(copy)
    (copy / "mp_rank_00").mkdir()
    with pytest.raises(ValueError, match="--ckpt-format torch_dist"):
        find_checkpoint(copy)


def test_truncated_file(copy):
    file = next(copy.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match=rf"{file.name} has \d+ of \d+ bytes"):
        Checkpoint(copy)


def test_a_box_that_was_never_stored(tmp_path):
    write(tmp_path / "whole", chunks(), {})
    metadata = read_metadata(tmp_path / "whole" / METADATA)
    del metadata.state_dict_metadata["x"].chunks[2]
    (tmp_path / "whole" / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="parts of x are not stored"):
        Checkpoint(tmp_path / "whole").read("x", (0, 0, 0), (7, 5, 4))


class Hostile:
    def __reduce__(self):
        return os.system, ("echo this must never run",)


def test_metadata_that_would_run_something_is_refused(tmp_path):
    (tmp_path / METADATA).write_bytes(pickle.dumps({"state_dict_metadata": Hostile()}))
    with pytest.raises(ValueError, match=r"it names posix\.system"):
        read_metadata(tmp_path / METADATA)


def test_common_state_that_would_run_something_does_nothing(tmp_path, capfd):
    write(tmp_path, chunks(), {COMMON: {"args": argparse.Namespace(a=Hostile(), b=1)}})
    assert Checkpoint(tmp_path).arguments()["b"] == 1
    assert "never run" not in capfd.readouterr().out


@pytest.mark.parametrize("zipped", [True, False])  # torch's format since 1.6, and the one before
def test_a_common_state_of_either_format_runs_nothing(zipped, capfd):
    stored = BytesIO()
    state = {"args": argparse.Namespace(a=Hostile(), b=1)}
    torch.save([state], stored, _use_new_zipfile_serialization=zipped)
    stored.seek(0)
    assert read_common_state(stored)["args"].b == 1
    assert "never run" not in capfd.readouterr().out


def test_a_common_state_that_is_not_a_mapping_is_refused(tmp_path):
    write(tmp_path, chunks(), {COMMON: [1]})
    with pytest.raises(ValueError, match=r"arguments cannot be read \(the common state is not a mapping\)"):
        Checkpoint(tmp_path).arguments()


def test_damaged_metadata(copy):
    (copy / METADATA).write_bytes((copy / METADATA).read_bytes()[:50])
    with pytest.raises(ValueError, match=r"\.metadata is damaged"):
        Checkpoint(copy)
