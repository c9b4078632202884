"""TensorBoard's scalars are also written as JSONL, one line per step."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from megatron_sfr.runtime.replacements import replaced
from megatron_sfr.training.metrics_log import JsonLines, cut_back, pair, replacements


def read(path: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in path.read_text().splitlines()]


def test_one_line_per_step_without_the_vs_samples_duplicates(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    with SummaryWriter(tmp_path / "tensorboard") as writer, replaced(replacements(lines)):
        for step in (1, 2):
            writer.add_scalar("lm loss", torch.tensor(3.0 / step), step)
            writer.add_scalar("lm loss vs samples", 3.0, 8 * step)
            writer.add_scalar("grad-norm", 0.5, step)
        lines.flush()
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": 1, "lm loss": 3.0, "grad-norm": 0.5},
        {"step": 2, "lm loss": 1.5, "grad-norm": 0.5},
    ]
    assert list((tmp_path / "tensorboard").iterdir())


def test_scalars_that_come_after_the_checkpoint_join_their_steps_line(tmp_path: Path) -> None:
    """Upstream validates after it saved; the line was written before the save, so that a kill does not lose it."""
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    with SummaryWriter(tmp_path / "tensorboard") as writer, replaced(replacements(log)):
        for step in (1, 2):
            writer.add_scalar("lm loss", 3.0 / step, step)
            log.flush()
            assert read(path)[-1] == {"step": step, "lm loss": 3.0 / step}
            writer.add_scalar("lm loss validation", 4.0, step)
        log.flush()
    assert read(path) == [
        {"step": 1, "lm loss": 3.0, "lm loss validation": 4.0},
        {"step": 2, "lm loss": 1.5, "lm loss validation": 4.0},
    ]


def test_pair_is_a_detached_sum_and_its_count() -> None:
    total = torch.tensor(2.0, requires_grad=True) * 3
    assert pair(total, torch.tensor(4)).tolist() == [6.0, 4.0]
    assert not pair(total, torch.tensor(4)).requires_grad


def lines(*steps: int) -> bytes:
    return b"".join(b'{"step": %d, "time": 1.0, "lm loss": 2.0}\n' % step for step in steps)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lines(1, 2, 3, 4, 5), lines(1, 2, 3)),
        (lines(1, 2) + b'{"step": 3, "ti', lines(1, 2)),
        (lines(1, 2, 3, 4) + b'{"st', lines(1, 2, 3)),
        (lines(1, 2, 3, 4, 5, 3, 4), lines(1, 2, 3, 3)),  # by a version that did not truncate
        (lines(1, 2) + b"not of ours\n" + lines(9), lines(1, 2) + b"not of ours\n"),
    ],
)
def test_a_resumed_run_drops_later_steps(tmp_path: Path, before: bytes, after: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(before)
    cut_back(path, 3)
    assert path.read_bytes() == after
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_without_later_steps_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    cut_back(path, 3)
    assert not path.exists()
    path.write_bytes(lines(1, 2, 3))
    inode = path.stat().st_ino
    cut_back(path, 3)
    assert path.stat().st_ino == inode


def test_a_resumed_run_has_one_line_per_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(1, 2, 3, 4) + b'{"step": 5')
    resumed = JsonLines(path, resumed=lambda: 2)
    with SummaryWriter(tmp_path / "tensorboard") as writer, replaced(replacements(resumed)):
        assert path.read_bytes().count(b"\n") == 4  # another run may still hold the folder
        for step in (3, 4, 5):
            writer.add_scalar("lm loss", 1.0, step)
        resumed.flush()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["lm loss"]) for row in rows] == [(1, 2.0), (2, 2.0), (3, 1.0), (4, 1.0), (5, 1.0)]
