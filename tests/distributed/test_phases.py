"""Who learns in which phase, read off the gradients (Adam's first moments) and weights of real runs."""

from pathlib import Path

import pytest
import torch

from tests import warm

from .launch import read_checkpoint, read_metrics
from .runs import Runs
from .settings import CLIP, EACH_STEP, LATE, OVERLAPPED, PP2, SHARDED_OPTIMIZER, TP2
from .test_layouts import MOMENT

pytestmark = pytest.mark.distributed
ONE_STEP = ("--train-iters", "1")
DETACHED = ("--sfr", "--sfr-warmup", "detached", "--sfr-warmup-steps", "9", *CLIP)
# A static gate that closes after the first step, which belongs to phase A.
CLOSED = ("--sfr", "--sfr-gate", "static", "--sfr-gate-threshold", "1e9", *LATE, *CLIP)
PHASES: dict[str, tuple[str, ...]] = {
    "plain": (*CLIP, *EACH_STEP),
    "weight-0": ("--sfr", "--sfr-weight", "0", *CLIP),
    "detached": DETACHED,
    "closed": CLOSED,
    "ramp-0": ("--sfr", "--sfr-ramp-steps", "3", *CLIP, *EACH_STEP),
    "head-only": ("--sfr", "--sfr-warmup-steps", "9", "--weight-decay", "0", *EACH_STEP),
    "clipped-head": ("--sfr", "--sfr-clip-grad", "0.01", *CLIP, *ONE_STEP),
    "unclipped-head": ("--sfr", "--sfr-clip-grad", "0", *CLIP, *ONE_STEP),
    "slow-head": ("--sfr", "--sfr-head-lr-mult", "0.25", *ONE_STEP),
    "weight-on-loss": ("--sfr", "--sfr-weight-on", "loss", "--sfr-weight", "50", *CLIP, *ONE_STEP),
    "weight-50": ("--sfr", "--sfr-weight", "50", *CLIP, *ONE_STEP),
    "weight-1": ("--sfr", *CLIP, *ONE_STEP),
}
# Layouts in which a head that does not reach the backbone changes no bit of it: in the first step it is detached,
# then the gate is closed. Each layout also runs without a head, "plain".
LAYOUTS: dict[str, tuple[str, ...]] = {
    "tp2": TP2,
    "pp2": PP2,
    "dp2-sharded": (*SHARDED_OPTIMIZER, *OVERLAPPED),
    "dp2-sharded-bf16": ("--bf16", *SHARDED_OPTIMIZER),
}
IN_LAYOUTS = {"plain": CLIP, "closed": (*CLOSED, *EACH_STEP)}


def phase(runs: Runs, name: str) -> Path:
    """A single-process run, most with gradients that are clipped in every step."""
    return runs.train(name, 1, *PHASES[name], recipe=runs.plain)


def laid_out(runs: Runs, name: str, layout: str) -> Path:
    """A run of two processes."""
    return runs.train(f"{name}-{layout}", 2, *IN_LAYOUTS[name], *LAYOUTS[layout], recipe=runs.plain)


def is_head(name: str) -> bool:
    return "flow_head." in name


def equal_backbones(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    names = [name for name in a if not is_head(name)]
    assert len(names) > 20
    return all(torch.equal(a[name], b[name]) for name in names)


def clipped(run: Path, threshold: float = 0.05) -> bool:
    """Whether the backbone's gradient was clipped in every step."""
    return all(row["grad-norm"] > 2 * threshold for row in read_metrics(run))


@pytest.mark.parametrize("name", ["weight-0", "detached", "closed"])
def test_a_head_that_does_not_reach_the_backbone_changes_no_bit_of_it(runs: Runs, name: str) -> None:
    # In "detached" and "closed" a head learns beside the backbone: its noise, its initial weights and its gradient
    # norm must be separate.
    both = [phase(runs, run) for run in ("plain", name)]
    plain, other = (read_checkpoint(run / "iter_0000003") for run in both)
    assert equal_backbones(plain, other)
    assert clipped(both[0])
    for term in ("lm loss", "grad-norm"):
        expected, actual = ([row[term] for row in read_metrics(run)] for run in both)
        assert actual == expected
    assert any(map(is_head, other)) == (name != "weight-0")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nor_does_it_on_other_layouts(runs: Runs, layout: str) -> None:
    plain, other = (laid_out(runs, run, layout) for run in IN_LAYOUTS)
    assert equal_backbones(*(read_checkpoint(run / "iter_0000003") for run in (plain, other)))
    assert clipped(plain)
    for term in ("lm loss", "grad-norm"):
        assert [r[term] for r in read_metrics(other)] == [r[term] for r in read_metrics(plain)]
    assert [row["sfr gate"] for row in read_metrics(other)] == [1, 0, 0]


def test_nor_does_it_after_a_resume(runs: Runs) -> None:
    flags = (*CLOSED, *LAYOUTS["dp2-sharded"])
    plain, closed = (laid_out(runs, name, "dp2-sharded") for name in ("plain", "closed"))
    run = runs.resume("resumed-dp2-sharded", closed, 1, 2, *flags, recipe=runs.plain)
    plain, closed, resumed = (read_checkpoint(run / "iter_0000003") for run in (plain, closed, run))
    assert equal_backbones(plain, resumed)
    named = [key for key in closed if not key.startswith("optimizer.distributed")]
    assert [key for key in named if not torch.equal(closed[key], resumed[key])] == []


def moments(checkpoint: dict[str, torch.Tensor], head: bool) -> float:
    """Norm of Adam's first moments of the head or of the backbone: after one step a tenth of the clipped gradient's."""
    found = [x for name, x in checkpoint.items() if name.startswith(MOMENT) and is_head(name) == head]
    return float(torch.stack([x.double().norm() for x in found]).norm())


def test_head_and_backbone_are_clipped_by_separate_norms(runs: Runs) -> None:
    names = ("clipped-head", "unclipped-head")
    first = {name: read_checkpoint(phase(runs, name) / "iter_0000001") for name in names}
    clipped_norms, norms = (read_metrics(phase(runs, name))[0] for name in names)
    for checkpoint in first.values():
        assert moments(checkpoint, head=False) == pytest.approx(0.1 * 0.05, rel=1e-4)
    assert moments(first["clipped-head"], head=True) == pytest.approx(0.1 * 0.01, rel=1e-4)
    assert moments(first["unclipped-head"], head=True) == pytest.approx(0.1 * norms["sfr head grad-norm"], rel=1e-4)
    assert norms["grad-norm"] == clipped_norms["grad-norm"]


def test_the_weight_reaches_the_backbone_and_not_the_head(runs: Runs) -> None:
    names = ("weight-1", "weight-50", "weight-on-loss")
    one, fifty, on_loss = (read_metrics(phase(runs, name))[0] for name in names)
    assert fifty["sfr head grad-norm"] == one["sfr head grad-norm"]
    assert [row["sfr weight"] for row in (one, fifty, on_loss)] == [1, 50, 50]
    # On the whole loss the head's gradient is in the one norm, 50 times as large.
    assert "sfr head grad-norm" not in on_loss
    backbone = (on_loss["grad-norm"] ** 2 - (50 * one["sfr head grad-norm"]) ** 2) ** 0.5
    assert backbone == pytest.approx(fifty["grad-norm"], rel=0.01)


def test_the_heads_learning_rate_has_a_factor(runs: Runs) -> None:
    # The output layer starts at 0, and Adam's first step is the learning rate wherever the gradient is well above eps.
    plain, slow = (read_checkpoint(phase(runs, name) / "iter_0000001") for name in ("clipped-head", "slow-head"))
    steps = [checkpoint["flow_head.net.output.weight"].abs().max().item() for checkpoint in (plain, slow)]
    assert steps == pytest.approx([1e-3, 0.25e-3], rel=0.05)


def test_ramp_starts_from_cross_entropys_gradient_and_leaves_it(runs: Runs) -> None:
    both = [phase(runs, name) for name in ("plain", "ramp-0")]
    assert equal_backbones(*(read_checkpoint(run / "iter_0000001") for run in both))
    assert [row["sfr weight"] for row in read_metrics(both[1])] == pytest.approx([0, 1 / 3, 2 / 3])


def test_head_only_phase_gives_the_backbone_no_gradient(runs: Runs) -> None:
    run = phase(runs, "head-only")
    first, last = (read_checkpoint(run / f"iter_000000{i}") for i in (1, 3))
    for name, moment in last.items():
        if name.startswith(MOMENT):
            assert moment.any() == is_head(name), name
    assert all(torch.equal(first[n], last[n]) for n in first if n.startswith(("decoder.", "embedding.")))
    losses = [row["sfr loss"] for row in read_metrics(run)]
    assert losses[0] == pytest.approx(2.0, abs=0.15)  # a zero head on unit-variance noise and targets


def test_fresh_head_joins_a_backbone_that_had_none(runs: Runs) -> None:
    both = phase(runs, "plain"), runs.train("fresh-head", 1, *runs.plain_start())
    plain, fresh = (read_checkpoint(run / "iter_0000003") for run in both)
    assert not any(map(is_head, plain))
    assert fresh["flow_head.net.output.weight"].any()
    before, after = (read_metrics(run)[0] for run in both)
    assert after["lm loss"] < before["lm loss"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--bf16", "has no flow_head.net.time_in.weight: add --sfr-fresh-head to start one"),
        ("--add-qkv-bias", "has no decoder.layers.self_attention.linear_qkv.bias: it is of another model"),
    ],
)
def test_what_a_checkpoint_lacks_is_named(runs: Runs, tmp_path: Path, flag: str, message: str) -> None:
    backbone = phase(runs, "plain")
    source = ("--recipe", str(runs.sfr), "--pretrained-checkpoint", str(backbone))
    fresh = ("--sfr-fresh-head",) if "another" in message else ()
    flags = ("--save", str(tmp_path / "run"), flag, *fresh)
    done = warm.run("-m", "megatron_sfr.train", *source, *flags, ranks=1)
    assert done.returncode == 2
    assert f"megatron-sfr train: error: the checkpoint in {backbone} {message}" in done.stderr
