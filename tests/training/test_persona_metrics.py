"""Metrics by persona: sums against plain counting, and what of them is written where."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from megatron_sfr.training.data.persona_groups import Group
from megatron_sfr.training.metrics_log import JsonLines
from megatron_sfr.training.persona_metrics import NAMES, SHOWN, PersonaMetrics
from megatron_sfr.training.step_context import StepContext

B, S = 3, 7
GROUPS = [Group("", "poet"), Group("", "cook"), Group("validation-a", "poet"), Group("validation-b", "")]
STEP = StepContext(iteration=4, train_iters=9, num_microbatches=2)


def microbatch(seed: int, low: int, high: int) -> tuple[dict[str, Tensor], Tensor]:
    """Random groups, mask and values."""
    g = torch.Generator().manual_seed(seed)
    batch = {
        "group": torch.randint(low, high, (B, S), generator=g, dtype=torch.int32),
        "loss_mask": torch.randint(2, (B, S), generator=g).float(),
    }
    return batch, torch.rand(3, B, S, generator=g)


def means(microbatches: list[tuple[dict[str, Tensor], Tensor]], group: int) -> dict[str, float]:
    """The metrics of a group, token by token."""
    tokens = [
        values_3BS[:, b, s].tolist()
        for batch, values_3BS in microbatches
        for b in range(B)
        for s in range(S)
        if batch["loss_mask"][b, s] and batch["group"][b, s] == group
    ]
    sums = [sum(column) for column in zip(*tokens, strict=True)]
    return {name: x / len(tokens) for name, x in zip(NAMES, sums, strict=True)} | {"tokens": len(tokens)}


def test_a_validation_set_is_averaged_over_its_own_tokens(one_rank: None, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = PersonaMetrics(lambda: GROUPS)
    both = [microbatch(seed, 0, 2) for seed in (0, 1)]
    for batch, values in both:
        metrics.add(batch, values, STEP, training=False)
    (report,) = metrics.collect(None)
    assert (report.part, list(report.personas)) == ("", ["poet", "cook"])
    for group, persona in enumerate(("poet", "cook")):
        assert report.personas[persona] == pytest.approx(means(both, group), rel=1e-6)
    assert report.tokens == sum(batch["loss_mask"].sum() for batch, _ in both)
    assert f"poet: lm loss {report.personas['poet']['lm loss']:.6f}, token entropy" in capsys.readouterr().out

    batch, values = microbatch(2, 3, 4)  # the next set starts from zero, and has no personas
    metrics.add(batch, values, STEP, training=False)
    (report,) = metrics.collect(None)
    assert (report.part, report.tokens, report.personas) == ("validation-b", batch["loss_mask"].sum(), {})
    assert metrics.collect(None) == []


def test_training_is_reported_over_the_steps_since_the_last_report(one_rank: None, tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    metrics, writer = PersonaMetrics(lambda: GROUPS, lines), SummaryWriter(str(tmp_path))
    steps = [[microbatch(10 * step + i, 0, 2) for i in (0, 1)] for step in range(4)]
    for step, microbatches in enumerate(steps):
        context = replace(STEP, iteration=step, writer=writer, reports_personas=step in (1, 3))
        for batch, values in microbatches:
            metrics.add(batch, values, context, training=True)
    lines.flush()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4]
    for record, (first, second) in zip(records, (steps[:2], steps[2:]), strict=True):
        for group, persona in enumerate(("poet", "cook")):
            assert record["by persona"][persona] == pytest.approx(means(first + second, group), rel=1e-6)


class Logged:
    """Where W&B's `log` would send scalars: upstream's writer needs an account or a background service."""

    def __init__(self) -> None:
        self.scalars: dict[str, Any] = {}

    def log(self, scalars: dict[str, Any], step: int) -> None:
        self.scalars |= {f"{name} @{step}": value for name, value in scalars.items()}


def test_boards_show_the_first_personas_and_the_file_all(one_rank: None, tmp_path: Path) -> None:
    """Long names are cut and stay distinct."""
    long = "You are a cook who answers in rhymes, and never in more than one sentence, "
    personas = [f"{long}{i}" if i < 2 else f"persona {i}" for i in range(SHOWN + 5)]
    groups = [Group("validation", persona) for persona in personas]
    lines, wandb = JsonLines(tmp_path / "metrics.jsonl"), Logged()
    metrics, writer = PersonaMetrics(lambda: groups, lines, lambda: wandb), SummaryWriter(str(tmp_path))
    order = random.Random(0).sample(range(len(groups)), len(groups))
    batch = {"group": torch.tensor([order], dtype=torch.int32), "loss_mask": torch.ones(1, len(groups))}
    metrics.add(batch, torch.rand(3, 1, len(groups)), STEP, training=False)
    reports = metrics.collect(None)
    metrics.write(reports, 8, writer)
    writer.close()
    lines.flush()
    assert list(json.loads((tmp_path / "metrics.jsonl").read_text())["by persona validation"]) == personas
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    tags = board.Tags()["scalars"]
    assert len(tags) == len(wandb.scalars) == 1 + 4 * SHOWN
    assert f"{tags[1]} @8" in wandb.scalars
    shown = [tag for tag in tags if tag.startswith("lm loss")]
    assert shown[2] == "lm loss validation by persona/persona 2"
    assert [name[-3:] for name in shown[:2]] == [" #1", " #2"]
    assert "and 5 personas more, in metrics.jsonl" in str(reports[0])
