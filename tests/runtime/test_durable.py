"""Upstream writes its tracker and metadata.json atomically: a write that ends midway leaves the old file."""

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sfr.runtime.durable import DURABLE, REPLACEMENTS
from megatron_sfr.runtime.replacements import replaced
from megatron_sfr.storage.atomic import replacing


@pytest.fixture
def names_replaced() -> Iterator[None]:
    with replaced(REPLACEMENTS):
        yield


@pytest.mark.usefixtures("names_replaced")
def test_metadata_json_is_replaced_whole_by_upstreams_own_function(tmp_path: Path) -> None:
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, maybe_load_config, save_config

    save_config(CheckpointingConfig("torch_dist", 1), str(tmp_path))
    with pytest.raises(TypeError):
        save_config(CheckpointingConfig("torch_dist", object()), str(tmp_path))  # type: ignore[arg-type]
    assert maybe_load_config(str(tmp_path)) == CheckpointingConfig("torch_dist", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["metadata.json"]


@pytest.mark.usefixtures("names_replaced")
def test_the_tracker_is_replaced_whole(tmp_path: Path) -> None:
    from megatron.training import checkpointing

    tracker = Path(checkpointing.get_checkpoint_tracker_filename(str(tmp_path)))
    assert tracker.name in DURABLE
    assert "with maybe_msc.open(tracker_filename, 'w') as f:" in inspect.getsource(checkpointing.save_checkpoint)
    with checkpointing.maybe_msc.open(str(tracker), "w") as file:
        file.write("4")
        assert not tracker.exists()
    assert checkpointing.read_metadata(str(tracker)) == (4, False)
    with contextlib.suppress(KeyboardInterrupt), checkpointing.maybe_msc.open(str(tracker), "w") as file:
        file.write("6")
        raise KeyboardInterrupt
    assert tracker.read_text() == "4"


@pytest.mark.usefixtures("names_replaced")
def test_other_files_and_other_uses_stay_upstreams(tmp_path: Path) -> None:
    from megatron.training.checkpointing import maybe_msc

    with maybe_msc.open(tmp_path / "other", "w") as file:
        file.write("half")
        file.flush()
        assert (tmp_path / "other").read_text() == "half"
    assert maybe_msc.os.path.isfile(tmp_path / "other")


def test_replacing_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write("old")
    with contextlib.suppress(KeyError), replacing(path, "wb") as file:
        file.write(b"new")
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
