"""The newest complete checkpoint is found, whatever a kill left in the tracker file and in the folders."""

import json
import pickle
import shutil

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from megatron_sfr.hf.megatron.megatron_checkpoint import COMMON, Chunk, find_checkpoint, write_checkpoint
from megatron_sfr.hf.megatron.tracker import CONFIG, METADATA, TRACKER, incomplete, newest


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    chunks = [Chunk("x", (4,), torch.float32, (0,), (4,), lambda: torch.arange(4.0))]
    for step in (2, 4, 10):
        write_checkpoint(folder / f"iter_{step:07d}", chunks, {COMMON: {"iteration": step}})
    (folder / TRACKER).write_text("10")
    return folder


@pytest.fixture
def save(made, tmp_path):
    """A --save folder of three complete checkpoints, the tracker naming the last."""
    return shutil.copytree(made, tmp_path / "run")


def test_what_the_tracker_names_is_used_without_a_word(save):
    found = newest(save)
    assert (found.step, found.note, found.repair) == (10, None, None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"1", "names iter_0000001, which does not exist"),
        (b"12", "names iter_0000012, which does not exist"),
        (b"ten", "holds 'ten', which is not an iteration"),
        (b"-4", "holds '-4', which is not an iteration"),
        (b"4.0", "holds '4.0', which is not an iteration"),
        (b"\xff\xfe\x00", "which is not an iteration"),
        (b"9" * 5000, "which is not an iteration"),
        (b"release", "names release, which does not exist"),
        (None, "is missing"),
    ],
)
def test_a_damaged_tracker_leads_to_the_newest_complete_one(save, content, said, caplog):
    if content is None:
        (save / TRACKER).unlink()
    else:
        (save / TRACKER).write_bytes(content)
    found = newest(save)
    assert (found.step, found.repair) == (10, "10")
    assert said in found.note
    assert found.note.endswith(": iter_0000010 is used, the newest complete checkpoint")
    assert "\n" not in found.note
    assert find_checkpoint(save) == save / "iter_0000010"
    assert caplog.messages == [f"warning: {found.note}"]


def no_metadata(folder):
    (folder / METADATA).unlink()


def no_config(folder):
    (folder / CONFIG).unlink()


def empty_config(folder):
    (folder / CONFIG).write_bytes(b"")


def config_of_another_shape(folder):
    (folder / CONFIG).write_text("[]")


def config_without_backend(folder):
    (folder / CONFIG).write_text('{"sharded_backend": null}')


def metadata_of_another_shape(folder):
    (folder / METADATA).write_bytes(pickle.dumps(Metadata({}, storage_data={1: _StorageInfo("x", "0", 1)})))


def empty_metadata(folder):
    (folder / METADATA).write_bytes(b"")


def cut_tensors(folder):
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])


def no_tensors(folder):
    next(folder.glob("*.distcp")).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        no_metadata,
        no_config,
        empty_config,
        config_of_another_shape,
        config_without_backend,
        metadata_of_another_shape,
        empty_metadata,
        cut_tensors,
        no_tensors,
    ],
)
@pytest.mark.parametrize("tracker", ["10", ""])
def test_a_checkpoint_that_is_not_complete_is_passed_over(save, damage, tracker):
    damage(save / "iter_0000010")
    (save / TRACKER).write_text(tracker)
    found = newest(save)
    assert (found.step, found.repair) == (4, "4")
    assert incomplete(save / "iter_0000010")
    assert (save / "iter_0000010").is_dir()


def test_an_older_one_that_the_tracker_names_is_used_and_a_newer_complete_one_named(save):
    """A run may be sent back by hand; or it was killed before the tracker was moved."""
    (save / TRACKER).write_text("2")
    found = newest(save)
    assert (found.step, found.repair) == (2, None)
    assert "names iter_0000002, which is used; iter_0000010 is newer and complete" in found.note
    no_config(save / "iter_0000010")
    no_config(save / "iter_0000004")
    assert newest(save).note is None


def test_nothing_complete_is_an_error_that_names_the_file(save):
    (save / TRACKER).write_text("")
    for folder in save.glob("iter_*"):
        no_config(folder)
    with pytest.raises(
        ValueError, match=rf"{TRACKER} is empty, and no iter_\* folder beside it is known to be complete"
    ):
        newest(save)
    (save / TRACKER).unlink()
    assert newest(save) is None  # killed during its first save: it starts from the beginning
    assert newest(save / "absent") is None


def test_formats_without_a_marker_are_trusted_if_the_tracker_names_them(save):
    shutil.rmtree(save / "iter_0000010")
    (save / "iter_0000010" / "mp_rank_00").mkdir(parents=True)
    assert newest(save).note is None
    (save / TRACKER).write_text("")
    assert newest(save).step == 4
    (save / "iter_0000012").mkdir()
    (save / TRACKER).write_text("12")
    assert newest(save, any_format=True).step == 12
    assert newest(save).step == 4


def test_an_import_is_found(save):
    (save / "iter_0000010").rename(save / "release")
    (save / TRACKER).write_text("release")
    assert (newest(save).step, newest(save).note) == (0, None)
    assert json.loads((find_checkpoint(save) / CONFIG).read_text())["sharded_backend"] == "torch_dist"
