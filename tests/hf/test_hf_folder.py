"""Incomplete HF folders are refused by name, and a new folder appears complete or not at all."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_sfr.hf.hf_folder import INDEX, RECORD, SINGLE, Weights, new_folder, read_config
from tests.hf.models import save_model

MADE = {"identity": {"command": "test"}}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("sharded") / "hf", max_shard_size="100KB")


@pytest.fixture
def folder(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "hf")


def test_shards_read_as_the_single_file(folder, untied):
    shards, single = Weights(folder), Weights(untied)
    assert len(set(shards.files.values())) > 1
    assert shards.files.keys() == single.files.keys()
    assert all(torch.equal(shards[name], single[name]) for name in shards.files)


def test_missing_shard(folder):
    (folder / Weights(folder).files["lm_head.weight"]).unlink()
    with pytest.raises(ValueError, match=r"missing model-0000\d-of-0000\d.safetensors"):
        Weights(folder)


def test_truncated_shard(folder):
    shard = folder / Weights(folder).files["lm_head.weight"]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{shard.name}: damaged or cut off"):
        Weights(folder)


@pytest.mark.parametrize(
    ("name", "file", "match"),
    [
        (
            "model.norm.weight",
            "model-00001-of-00004.safetensors",
            r"model\.norm\.weight is in model-.*, the index names model-00001-of-00004",
        ),
        (
            "model.norm.weight",
            None,
            r"model\.norm\.weight is in model-.*, the index names no file: the index belongs to other files",
        ),
        ("surprise", "model-00001-of-00004.safetensors", "surprise is not in model-00001-of-00004"),
    ],
)
def test_index_of_other_files(folder, name, file, match):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].pop(name, None)
    index["weight_map"] |= {name: file} if file else {}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=match):
        Weights(folder)


def test_two_models_in_one_folder(folder):
    save_file({"w": torch.zeros(3)}, folder / SINGLE)
    with pytest.raises(ValueError, match="which is the model"):
        Weights(folder)


def test_index_that_is_not_json(folder):
    (folder / INDEX).write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        Weights(folder)


def test_folder_without_safetensors(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="only safetensors are read"):
        Weights(tmp_path)


def test_shards_without_their_index(folder):
    (folder / INDEX).unlink()
    with pytest.raises(ValueError, match=r"model-00001-of-.* without model\.safetensors\.index\.json"):
        Weights(folder)


def test_folder_without_config(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        read_config(tmp_path)


def test_new_folder_appears_at_the_end(tmp_path):
    output = tmp_path / "out"
    with new_folder(output, **MADE, force=False) as folder:
        (folder / "mark").write_text("new")
        assert not output.exists()
    assert (output / "mark").read_text() == "new"
    assert list(tmp_path.iterdir()) == [output]


def test_a_link_stays_and_its_target_is_written(tmp_path):
    link, target = tmp_path / "link", tmp_path / "disk/out"
    target.parent.mkdir()
    link.symlink_to(target)
    for text, force in (("first", False), ("second", True), ("third", True)):
        with new_folder(link, **MADE, force=force) as folder:
            assert folder.parent == target.parent  # on the disk of the target
            (folder / "mark").write_text(text)
        assert link.is_symlink()
        assert (target / "mark").read_text() == text
        assert list(target.parent.iterdir()) == [target]


def test_a_file_that_cannot_be_read_is_not_called_the_output(tmp_path):
    """Permissions do not bind root: the errors are raised."""
    for path, ours in (
        (tmp_path / "like/tokenizer.json", False),
        (tmp_path / "out.json", False),
        (tmp_path / ".out.partial/config.json", True),
        (tmp_path, True),
        (None, True),
    ):
        with (
            pytest.raises((ValueError, PermissionError), match="choose another --output" if ours else "denied: '"),
            new_folder(tmp_path / "out", **MADE, force=False),
        ):
            raise PermissionError(errno.EACCES, "Permission denied", path and str(path))


def test_a_second_writer_is_refused_and_removes_nothing(tmp_path):
    output = tmp_path / "out"
    with new_folder(output, **MADE, force=False) as folder:
        (folder / "mark").write_text("first")
        with (
            pytest.raises(ValueError, match="out is being written by process"),
            new_folder(output, **MADE, force=False),
        ):
            raise AssertionError("not reached")
        assert (folder / "mark").read_text() == "first"
    assert list(tmp_path.iterdir()) == [output]


def test_failure_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "mark").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", **MADE, force=False) as folder:
        fail(folder)
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_replaced_only_by_force_and_only_at_the_end(tmp_path):
    output = tmp_path / "out"
    with new_folder(output, **MADE, force=False) as folder:
        (folder / "mark").write_text("old")
    with pytest.raises(ValueError, match="--force"), new_folder(output, **MADE, force=False):
        pass
    with pytest.raises(RuntimeError), new_folder(output, **MADE, force=True):
        raise RuntimeError
    assert (output / "mark").read_text() == "old"
    with new_folder(output, **MADE, force=True) as folder:
        (folder / "mark").write_text("new")
    assert (output / "mark").read_text() == "new"
    assert list(tmp_path.iterdir()) == [output]


def test_a_kill_between_the_renames_of_a_replacement_loses_nothing(tmp_path):
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced/mark").write_text("old")
    (tmp_path / ".out.replaced" / RECORD).write_text("{}")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", **MADE, force=True):
        raise RuntimeError
    assert (tmp_path / "out/mark").read_text() == "old"


@pytest.mark.parametrize("file", ["thesis.tex", "config.json"])
def test_force_does_not_replace_what_no_conversion_wrote(tmp_path, file):
    """Not even a Hugging Face model, such as the one that training started from."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / file).touch()
    with (
        pytest.raises(ValueError, match="replaces only folders that a conversion has written"),
        new_folder(tmp_path / "thesis", **MADE, force=True),
    ):
        pass


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path):
    with (
        pytest.raises(ValueError, match=r"1,000,000,000,000,000,000 bytes to write, [\d,]+ free: make room"),
        new_folder(tmp_path / "out", **MADE, force=False, size=10**18),
    ):
        raise AssertionError("not reached")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events, sync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda x: (events.append(Path(os.readlink(f"/proc/self/fd/{x}")).name), sync(x)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (events.append("renamed"), rename(path, to))[1])
    with new_folder(tmp_path / "out", **MADE, force=False) as folder:
        (folder / "sub").mkdir()
        for name in ("a", "sub/b"):
            (folder / name).write_text("content")
    assert {"a", "b", "sub", ".out.partial"} <= set(events[: events.index("renamed")])
    assert events[-2:] == ["renamed", tmp_path.name]
