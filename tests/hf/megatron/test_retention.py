"""Which checkpoints of a run are deleted: of a real run, and as a rule."""

from pathlib import Path

import pytest
import torch

from megatron_sfr.hf.megatron.megatron_checkpoint import COMMON, Chunk, write_checkpoint
from megatron_sfr.hf.megatron.retention import RetentionOptions, delete_obsolete
from megatron_sfr.hf.megatron.tracker import TRACKER


@pytest.mark.parametrize(
    ("keep", "every", "steps", "obsolete"),
    [
        (None, None, [1, 2, 3], []),
        (1, None, [1, 2, 3], [2, 1]),
        (2, None, [5, 10, 7], [5]),
        (5, None, [1, 2], []),
        (1, 4, [2, 4, 6, 8, 10], [6, 2]),
        (2, 3, [], []),
    ],
)
def test_the_newest_are_kept_and_multiples(
    keep: int | None, every: int | None, steps: list[int], obsolete: list[int]
) -> None:
    assert RetentionOptions(keep, every).obsolete(steps) == obsolete


@pytest.mark.parametrize(("keep", "every"), [(0, None), (-1, None), (2, 0), (None, 3)])
def test_options_without_meaning_are_refused(keep: int | None, every: int | None) -> None:
    with pytest.raises(ValueError, match="keep_"):
        RetentionOptions(keep, every)


@pytest.fixture
def save(tmp_path: Path) -> Path:
    """Five complete checkpoints in Megatron's format, and one that is being written."""
    chunks = [Chunk("x", (4,), torch.float32, (0,), (4,), lambda: torch.arange(4.0))]
    for step in range(1, 6):
        write_checkpoint(tmp_path / f"iter_{step:07d}", chunks, {COMMON: {"iteration": step}})
    (tmp_path / "iter_0000006").mkdir()
    (tmp_path / TRACKER).write_text("5")
    return tmp_path


def test_incomplete_checkpoints_are_neither_counted_nor_deleted(save: Path) -> None:
    (save / "iter_0000000.deleting").mkdir()  # what a kill left
    (save / "iter_0000000.deleting" / "file").touch()
    assert delete_obsolete(save, RetentionOptions(keep_checkpoints=2, keep_every=2)) == [3, 1]
    assert sorted(path.name for path in save.glob("iter_*")) == [f"iter_000000{step}" for step in (2, 4, 5, 6)]
    assert delete_obsolete(save, RetentionOptions(keep_checkpoints=2, keep_every=2)) == []


def test_what_cannot_be_deleted_is_logged(save: Path, caplog: pytest.LogCaptureFixture) -> None:
    (save / "iter_0000004.deleting").mkdir()  # in the way of the rename
    (save / "iter_0000004.deleting" / "file").touch()
    assert delete_obsolete(save, RetentionOptions(keep_checkpoints=1)) == [3, 2, 1]
    assert "cannot delete the checkpoint" in caplog.text
    assert not list(save.glob("*.deleting"))
    assert delete_obsolete(save, RetentionOptions(keep_checkpoints=1)) == [4]
