"""TensorBoard's scalars are also written as JSONL, one line per step."""

import json
from pathlib import Path

import pytest
import torch
from megatron.training import training
from torch.utils.tensorboard import SummaryWriter

from megatron_sfr.runtime.replacements import replaced
from megatron_sfr.training.metrics_log import JsonLines, cut_back, replacements


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


def test_a_checkpoint_keeps_the_line_of_its_step_which_is_not_over(tmp_path: Path) -> None:
    """Upstream validates after the last save: the file itself gets whole lines only."""
    path, pending = tmp_path / "metrics.jsonl", tmp_path / "metrics.pending.json"
    log = JsonLines(path)
    for step in (1, 2):
        log.add("lm loss", 3.0 / step, step)
        log.keep()
        assert read(pending) == [{"step": step, "lm loss": 3.0 / step}]
        log.add("lm loss validation", 4.0, step)
    log.flush()
    assert not pending.exists()
    assert read(path) == [
        {"step": 1, "lm loss": 3.0, "lm loss validation": 4.0},
        {"step": 2, "lm loss": 1.5, "lm loss validation": 4.0},
    ]


@pytest.mark.parametrize(
    ("written", "kept", "expected"),
    [
        ((1,), 2, [1, 2, 3]),  # killed between the checkpoint and the next step
        ((1, 2), 2, [1, 2, 3]),  # killed after the line was appended
        ((1, 2), 3, [1, 2, 3]),  # killed during the save of step 3, which is computed again
        ((1, 2, 3), 4, [1, 2, 3]),
        ((), 2, [2, 3]),
    ],
)
def test_a_kill_after_a_checkpoint_loses_no_line(
    tmp_path: Path, written: tuple[int, ...], kept: int, expected: list[int]
) -> None:
    path, pending = tmp_path / "metrics.jsonl", tmp_path / "metrics.pending.json"
    path.write_bytes(lines(*written))
    pending.write_bytes(lines(kept))
    resumed = JsonLines(path, resumed=lambda: 2)
    resumed.add("lm loss", 1.0, 3)
    resumed.flush()
    assert [record["step"] for record in read(path)] == expected
    assert not pending.exists()


def test_a_save_of_upstream_keeps_the_line_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl")
    seen = []
    monkeypatch.setattr(
        training, "save_checkpoint_and_time", lambda: seen.append(read(tmp_path / "metrics.pending.json"))
    )
    log.add("lm loss", 3.0, 1)
    with replaced(replacements(log)):
        training.save_checkpoint_and_time()
    assert seen == [[{"step": 1, "lm loss": 3.0}]]


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
        (lines(1) + b"[" * 100_000 + b"\n" + lines(9), lines(1) + b"[" * 100_000 + b"\n"),
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
