"""A plan's bytes are those of the model and the optimizer that Megatron builds, on each stage of several layouts."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint
from tests import warm

from .runs import Runs
from .settings import PP2, SHARDED_OPTIMIZER, SP, TEACHER, TP2

pytestmark = pytest.mark.distributed
EXPERTS = ("--num-experts", "4", "--moe-ffn-hidden-size", "24", "--moe-router-topk", "2")
EXPERTS += ("--moe-shared-expert-intermediate-size", "16", "--expert-model-parallel-size", "2")
OTHER = {  # a model of other parts: a tied embedding, learned positions, norms and linear layers with biases
    **{"untie_embeddings_and_output_weights": False, "position_embedding_type": "learned_absolute"},
    **{"normalization": "LayerNorm", "disable_bias_linear": False, "swiglu": False, "qk_layernorm": False},
}
CASES: dict[str, tuple[int, tuple[str, ...], dict]] = {
    "fp32": (1, (), {}),
    "tp2-pp2-sp-teacher": (4, ("--bf16", *TP2, *PP2, SP, *TEACHER), {}),
    "pp2-other": (2, ("--bf16", *PP2), OTHER),
    "ep2-experts": (2, ("--bf16", *SHARDED_OPTIMIZER, *EXPERTS), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_planned_bytes_are_those_of_the_built_run(runs: Runs, name: str, tmp_path: Path) -> None:
    """To the byte; the shares of a distributed optimizer's ranks are compared by their sum."""
    ranks, flags, changes = CASES[name]
    more = tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump(changes or {"seed": 1234}))
    recipes = ("--recipe", str(runs.sfr), "--recipe", str(more))
    warm.run("-m", "tests.distributed.plan_program", str(tmp_path), *recipes, *flags, ranks=ranks, check=True)
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    assert {report["stage"] for report in reports} == set(range(2 if "pp2" in name else 1))
    for report in reports:
        assert report["found"]["weights"] == report["planned"]["weights"], report
        assert report["found"]["gradients"] == report["planned"]["gradients"], report
    for stage in {report["stage"] for report in reports}:
        here = [report for report in reports if report["stage"] == stage]
        found, planned = (sum(report[which]["optimizer"] for report in here) for which in ("found", "planned"))
        assert found == pytest.approx(planned, abs=len(here)), (stage, found, planned)


def test_the_planned_checkpoint_is_that_of_a_run(runs: Runs) -> None:
    """Beside each parameter with its moments it has the head's small state."""
    save = Path(runs.start()[1])
    checkpoint = Checkpoint(save / "iter_0000001")
    stored = 0
    for entry in checkpoint.tensors.values():
        elements = 1
        for size in entry.size:
            elements *= size
        stored += elements * entry.properties.dtype.itemsize
    done = warm.run("-m", "megatron_sfr.cli", "plan", str(save / "recipe.yaml"), "--gpus", "1", "--json", check=True)
    planned = json.loads(done.stdout)
    assert planned["work"]["checkpoint_bytes"] == pytest.approx(stored, rel=0.02)
    assert planned["work"]["steps_per_epoch"] == 10
    assert planned["assumed"] == ["MFU 35% (--mfu)"]
