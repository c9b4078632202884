"""Who learns in which phase, read off the gradients (Adam's first moments) and weights of real runs."""

from pathlib import Path

import pytest
import torch

from .launch import read_checkpoint, read_metrics, torchrun
from .test_layouts import MOMENT

pytestmark = pytest.mark.distributed


def is_head(name: str) -> bool:
    return "flow_head." in name


def equal_backbones(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    names = [name for name in a if not is_head(name)]
    assert len(names) > 20
    return all(torch.equal(a[name], b[name]) for name in names)


@pytest.mark.parametrize("name", ["weight-0", "detached"])
def test_a_head_that_does_not_reach_the_backbone_changes_no_bit_of_it(runs: Path, name: str) -> None:
    # "detached" has a head that learns beside the backbone: its noise and its initial weights must be its own.
    plain, other = (read_checkpoint(runs / run / "iter_0000003") for run in ("plain", name))
    assert equal_backbones(plain, other)
    assert [r["lm loss"] for r in read_metrics(runs / name)] == [r["lm loss"] for r in read_metrics(runs / "plain")]
    assert any(map(is_head, other)) == (name == "detached")


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
