"""TensorBoard's scalars arrive in the JSON lines too, a line a step."""

import json
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from megatron_sfr.training.metrics import JsonLines, pair


def test_one_line_a_step_without_the_doubles_over_samples(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path / "tensorboard") as writer:
        lines = JsonLines(writer, tmp_path / "metrics.jsonl")
        for step in (1, 2):
            writer.add_scalar("lm loss", torch.tensor(3.0 / step), step)
            writer.add_scalar("lm loss vs samples", 3.0, 8 * step)
            writer.add_scalar("grad-norm", 0.5, step)
        lines.flush()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "time"} for row in rows] == [
        {"step": 1, "lm loss": 3.0, "grad-norm": 0.5},
        {"step": 2, "lm loss": 1.5, "grad-norm": 0.5},
    ]
    assert list((tmp_path / "tensorboard").iterdir())


def test_pair_is_a_detached_sum_and_its_count() -> None:
    total = torch.tensor(2.0, requires_grad=True) * 3
    assert pair(total, torch.tensor(4)).tolist() == [6.0, 4.0]
    assert not pair(total, torch.tensor(4)).requires_grad
