"""Inputs as users name them: files, folders of shards, saved datasets and their splits, names on the hub."""

import json
import sys
from pathlib import Path

import pytest

from megatron_sfr.storage.input_files import DatasetOptions, _hub_files, record_files
from megatron_sfr.storage.jsonl import read_records


def touch(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [folder / name for name in names]


def save_state(folder: Path, *names: str) -> list[Path]:
    """A folder as Dataset.save_to_disk writes it, with empty data files."""
    paths = touch(folder, *names)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return paths


def test_files_and_folders_of_shards_are_read_in_order(tmp_path: Path) -> None:
    first = touch(tmp_path, "first.txt")
    shards = touch(tmp_path / "shards", "00.jsonl", "01.jsonl.gz", "02.parquet", "deep/a.json.zst", "deep/b.arrow")
    touch(
        tmp_path / "shards",
        "README.md",
        "dataset_info.json",
        ".hidden.jsonl",
        ".cache/x.jsonl",
        "_temporary/y.jsonl",
        "image.gz",
    )
    assert record_files([*first, tmp_path / "shards"]) == (*first, *shards)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    inside, outside = touch(tmp_path / "shards", "a.jsonl", "c.JSONL"), touch(tmp_path / "disk", "b.jsonl")
    (tmp_path / "shards" / "b").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "loop").symlink_to(tmp_path / "shards")
    assert record_files([tmp_path / "shards"]) == (inside[0], tmp_path / "shards" / "b" / outside[0].name, inside[1])


def test_a_prepared_folder_among_the_shards_is_not_an_input(tmp_path: Path) -> None:
    """`prepare --input d --output d/prepared`, called again, has to find the same inputs."""
    shards = touch(tmp_path, "00.jsonl", "p/01.jsonl")
    touch(tmp_path / "p/prepared", "segment_offsets.bin", "segments.jsonl", "manifest.json", "targets/manifest.json")
    assert record_files([tmp_path]) == tuple(shards)
    with pytest.raises(ValueError, match="prepared has no file whose name ends in"):
        record_files([tmp_path / "p/prepared"])


def test_a_saved_dataset_is_its_arrow_files_by_split(tmp_path: Path) -> None:
    train = save_state(tmp_path / "d" / "train", "data-00001-of-00002.arrow", "data-00000-of-00002.arrow")
    test = save_state(tmp_path / "d" / "test", "data-00000-of-00001.arrow")
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert record_files([tmp_path / "d" / "train"]) == tuple(train)  # in the order of its state
    assert record_files([tmp_path / "d"], DatasetOptions("test")) == tuple(test)
    with pytest.raises(ValueError, match=r"has the splits train, test; choose one with --split"):
        record_files([tmp_path / "d"])
    with pytest.raises(ValueError, match=r"has the splits train, test and no dev; choose one"):
        record_files([tmp_path / "d"], DatasetOptions("dev"))
    with pytest.raises(ValueError, match=rf"has a saved dataset inside; give {tmp_path / 'd'} as a separate input"):
        record_files([tmp_path])
    with pytest.raises(ValueError, match="is a dataset without splits; leave --split out"):
        record_files([tmp_path / "d" / "train"], DatasetOptions("train"))
    test[0].unlink()
    with pytest.raises(ValueError, match=r"00001\.arrow is missing; save the dataset again"):
        record_files([tmp_path / "d"], DatasetOptions("test"))


@pytest.mark.parametrize("state", ["[]", '{"_data_files": 3}', '{"_data_files": [{}]}', "{"])
def test_a_damaged_state_is_one_line(tmp_path: Path, state: str) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(ValueError, match=r"state\.json"):
        record_files([tmp_path])


def test_an_invalid_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "empty/README.md", "a.jsonl")
    with pytest.raises(ValueError, match="empty has no file whose name ends in"):
        record_files([tmp_path / "empty"])
    with pytest.raises(ValueError, match="nowhere does not exist; give a file, a folder, or the name of a dataset"):
        record_files([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="empty/gone does not exist"):  # a slip in a path is not asked of the hub
        record_files([Path("empty/gone")])
    with pytest.raises(ValueError, match="no input is one; leave them out"):
        record_files([tmp_path / "a.jsonl"], DatasetOptions("train"))
    with pytest.raises(ValueError, match=r"split 'train\[:9\]' is not the name of a split"):
        DatasetOptions("train[:9]")


def test_without_the_library_a_name_on_the_hub_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    with pytest.raises(
        ValueError, match=r"someone/chats is not a file here; .* pip install 'megatron-sfr\[datasets\]'$"
    ):
        record_files([Path("someone/chats")])


def test_a_dataset_that_the_library_loads_is_read_from_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_text('{"text": "the sea"}\n{"text": "is blue"}\n')
    files = _hub_files(str(tmp_path / "d"), DatasetOptions())  # the library loads folders as it loads names
    assert [json.loads(record.text) for path in files for record in read_records(path)] == [
        {"text": "the sea"},
        {"text": "is blue"},
    ]
    saved = datasets.load_dataset(str(tmp_path / "d"), split="train")
    saved.save_to_disk(tmp_path / "saved")
    (file,) = record_files([tmp_path / "saved"])
    assert [json.loads(record.text)["text"] for record in read_records(file)] == ["the sea", "is blue"]
