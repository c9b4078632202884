"""Who learns in which phase, read off the gradients (Adam's first moments) and weights of real runs."""

from pathlib import Path

import pytest
import torch

from .launch import read_checkpoint, read_metrics, torchrun
from .settings import UNTOUCHED, UNTOUCHED_LAYOUTS
from .test_layouts import MOMENT

pytestmark = pytest.mark.distributed


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
def test_a_head_that_does_not_reach_the_backbone_changes_no_bit_of_it(runs: Path, name: str) -> None:
    # In "detached" and "closed" a head learns beside the backbone: its noise, its initial weights and its gradient
    # norm must be separate.
    plain, other = (read_checkpoint(runs / run / "iter_0000003") for run in ("plain", name))
    assert equal_backbones(plain, other)
    assert clipped(runs / "plain")
    for term in ("lm loss", "grad-norm"):
        assert [r[term] for r in read_metrics(runs / name)] == [r[term] for r in read_metrics(runs / "plain")]
    assert any(map(is_head, other)) == (name != "weight-0")


@pytest.mark.parametrize("name", [name for name in UNTOUCHED if name != "plain"])
@pytest.mark.parametrize("layout", UNTOUCHED_LAYOUTS)
def test_nor_does_it_on_other_layouts(runs: Path, layout: str, name: str) -> None:
    plain, other = (runs / f"{run}-{layout}" for run in ("plain", name))
    assert equal_backbones(*(read_checkpoint(run / "iter_0000003") for run in (plain, other)))
    assert clipped(plain)
    for term in ("lm loss", "grad-norm"):
        assert [r[term] for r in read_metrics(other)] == [r[term] for r in read_metrics(plain)]
    assert [row["sfr gate"] for row in read_metrics(other) if "sfr gate" in row] == (
        [1, 0, 0] if name == "closed" else []
    )


def test_nor_does_it_after_a_resume(runs: Path) -> None:
    names = ("plain-dp2-sharded", "closed-dp2-sharded", "resumed-dp2-sharded")
    plain, closed, resumed = (read_checkpoint(runs / name / "iter_0000003") for name in names)
    assert equal_backbones(plain, resumed)
    named = [key for key in closed if not key.startswith("optimizer.distributed")]
    assert [key for key in named if not torch.equal(closed[key], resumed[key])] == []


def moments(checkpoint: dict[str, torch.Tensor], head: bool) -> float:
    """Norm of Adam's first moments of the head or of the backbone: after one step a tenth of the clipped gradient's."""
    found = [x for name, x in checkpoint.items() if name.startswith(MOMENT) and is_head(name) == head]
    return float(torch.stack([x.double().norm() for x in found]).norm())


def test_head_and_backbone_are_clipped_by_separate_norms(runs: Path) -> None:
    first = {name: read_checkpoint(runs / name / "iter_0000001") for name in ("clipped-head", "unclipped-head")}
    norms = read_metrics(runs / "unclipped-head")[0]
    for checkpoint in first.values():
        assert moments(checkpoint, head=False) == pytest.approx(0.1 * 0.05, rel=1e-4)
    assert moments(first["clipped-head"], head=True) == pytest.approx(0.1 * 0.01, rel=1e-4)
    assert moments(first["unclipped-head"], head=True) == pytest.approx(0.1 * norms["sfr head grad-norm"], rel=1e-4)
    assert norms["grad-norm"] == read_metrics(runs / "clipped-head")[0]["grad-norm"]


def test_the_weight_reaches_the_backbone_and_not_the_head(runs: Path) -> None:
    one, fifty, on_loss = (read_metrics(runs / name)[0] for name in ("weight-1", "weight-50", "weight-on-loss"))
    assert fifty["sfr head grad-norm"] == one["sfr head grad-norm"]
    assert [row["sfr weight"] for row in (one, fifty, on_loss)] == [1, 50, 50]
    # On the whole loss the head's gradient is in the one norm, 50 times as large.
    assert "sfr head grad-norm" not in on_loss
    backbone = (on_loss["grad-norm"] ** 2 - (50 * one["sfr head grad-norm"]) ** 2) ** 0.5
    assert backbone == pytest.approx(fifty["grad-norm"], rel=0.01)


def test_the_heads_learning_rate_has_a_factor(runs: Path) -> None:
    # The output layer starts at 0, and Adam's first step is the learning rate wherever the gradient is well above eps.
    plain, slow = (read_checkpoint(runs / name / "iter_0000001") for name in ("clipped-head", "slow-head"))
    steps = [checkpoint["flow_head.net.output.weight"].abs().max().item() for checkpoint in (plain, slow)]
    assert steps == pytest.approx([1e-3, 0.25e-3], rel=0.05)


def test_ramp_starts_from_cross_entropys_gradient_and_leaves_it(runs: Path) -> None:
    plain, ramp = ([read_checkpoint(runs / run / f"iter_000000{i}") for i in (1, 2)] for run in ("plain", "ramp-0"))
    assert equal_backbones(plain[0], ramp[0])
    assert [row["sfr weight"] for row in read_metrics(runs / "ramp-0")] == pytest.approx([0, 1 / 3, 2 / 3])


def test_head_only_phase_gives_the_backbone_no_gradient(runs: Path) -> None:
    first, last = (read_checkpoint(runs / "head-only" / f"iter_000000{i}") for i in (1, 3))
    for name, moment in last.items():
        if name.startswith(MOMENT):
            assert moment.any() == is_head(name), name
    assert all(torch.equal(first[n], last[n]) for n in first if n.startswith(("decoder.", "embedding.")))
    losses = [row["sfr loss"] for row in read_metrics(runs / "head-only")]
    assert losses[0] == pytest.approx(2.0, abs=0.15)  # a zero head on unit-variance noise and targets


def test_fresh_head_joins_a_backbone_that_had_none(runs: Path) -> None:
    plain, fresh = (read_checkpoint(runs / run / "iter_0000003") for run in ("plain", "fresh-head"))
    assert not any(map(is_head, plain))
    assert fresh["flow_head.net.output.weight"].any()
    assert read_metrics(runs / "fresh-head")[0]["lm loss"] < read_metrics(runs / "plain")[0]["lm loss"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--bf16", "has no flow_head.net.time_in.weight: add --sfr-fresh-head to start one"),
        ("--add-qkv-bias", "has no decoder.layers.self_attention.linear_qkv.bias: it is of another model"),
    ],
)
def test_what_a_checkpoint_lacks_is_named(runs: Path, tmp_path: Path, flag: str, message: str) -> None:
    source = ("--recipe", str(runs / "recipe.yaml"), "--pretrained-checkpoint", str(runs / "plain"))
    fresh = ("--sfr-fresh-head",) if "another" in message else ()
    flags = ("--save", str(tmp_path / "run"), flag, *fresh)
    done = torchrun(1, "-m", "megatron_sfr.train", *source, *flags, check=False)
    assert done.returncode != 0
    assert f"megatron-sfr train: error: the checkpoint in {runs / 'plain'} {message}" in done.stderr
