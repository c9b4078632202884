"""KL-flow's training is the same however model and batch are split, resumes bit for bit, and leaves a model that one
process reads from any layout: losses, Adam's first moments, which hold the gradients of all steps, and weights.

Not exercised: context parallelism, packing, experts and FP8, which are refused, and Transformer Engine's layers.
"""

import argparse
from pathlib import Path

import pytest
import torch

from megatron_sfr.config.build import check_task
from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint, find_checkpoint
from megatron_sfr.hf.megatron.megatron_model import StoredModel

from .launch import ROOT, read_checkpoint, read_metrics, torchrun
from .settings import KL_FLOW_LAYOUTS, KL_FLOWS, has_kl_flow
from .test_layouts import MOMENT, difference

pytestmark = pytest.mark.distributed
LAYOUTS = [name for layouts in KL_FLOW_LAYOUTS.values() for name in layouts if name != "single"]
CASES = [(name, layout) for name in KL_FLOWS for layout in LAYOUTS if has_kl_flow(name, layout)]
PROGRAM = ROOT / "tests" / "distributed" / "denoise_program.py"


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_layout_changes_no_number(runs: Path, name: str, layout: str) -> None:
    single, other = (read_checkpoint(runs / f"kl-{name}-{x}" / "iter_0000003") for x in ("single", layout))
    heads = [] if name == "documents" else ["output_layer."]  # tied
    for prefix in (MOMENT, "decoder.", "embedding.", *heads):
        assert difference(single, other, prefix) < (1e-5, "")
    expected, found = (read_metrics(runs / f"kl-{name}-{x}") for x in ("single", layout))
    assert [row["step"] for row in found] == [1, 2, 3]
    for row, row_found in zip(expected, found, strict=True):
        terms = ("kl-flow loss", "grad-norm")
        assert [row_found[t] for t in terms] == pytest.approx([row[t] for t in terms], rel=1e-5)


def test_every_parameter_learns_and_the_kinds_differ(runs: Path) -> None:
    """Else the test above would compare what is not there."""
    states = {name: read_checkpoint(runs / f"kl-{name}-single" / "iter_0000003") for name in KL_FLOWS}
    for state in states.values():
        assert [key for key, x in state.items() if key.startswith(MOMENT) and not x.any()] == []
    assert "embedding.time_in.weight" in states["token"]
    assert any("modulation" in key for key in states["adaln"])
    assert "output_layer.weight" not in states["documents"]
    losses = [read_metrics(runs / f"kl-{name}-single")[-1]["kl-flow loss"] for name in KL_FLOWS]
    assert len(set(losses)) == len(losses)


def test_resumed_run_equals_the_straight_one_bit_for_bit(runs: Path) -> None:
    straight, resumed = (read_checkpoint(runs / name / "iter_0000004") for name in ("kl-resume-straight", "kl-resume"))
    assert straight.keys() == resumed.keys()
    assert [key for key in straight if not torch.equal(straight[key], resumed[key])] == []


@pytest.mark.parametrize("name", ["kl-adaln-single", "kl-documents-single"])
def test_no_denoiser_is_exported_as_a_hugging_face_model(runs: Path, name: str) -> None:
    checkpoint = Checkpoint(find_checkpoint(runs / name))
    with pytest.raises(
        ValueError, match="holds a KL-flow denoiser, which no Hugging Face architecture computes"
    ) as caught:
        StoredModel(checkpoint, {"architectures": ["Qwen3ForCausalLM"]})
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def read(runs: Path) -> Path:
    """What one process reads from the checkpoints of several layouts, and from one of another task."""
    names = [f"kl-{name}-{layout}" for name in KL_FLOWS for layout in ("single", "tp2-pp2-sp")]
    torchrun(1, str(PROGRAM), *(str(runs / name) for name in (*names, "kl-resume", "plain")))
    return runs


@pytest.mark.parametrize("name", KL_FLOWS)
def test_one_process_reads_the_denoiser_of_any_layout(read: Path, name: str) -> None:
    """Beside it: a token sees those after it, and knows where it stands."""
    single, other = (torch.load(read / f"kl-{name}-{layout}" / "logits.pt") for layout in ("single", "tp2-pp2-sp"))
    torch.testing.assert_close(other["plain"], single["plain"], rtol=1e-4, atol=1e-5)
    assert (single["last changed"] - single["plain"])[:, 0].abs().max() > 1e-4
    assert (single["reversed"].flip(1) - single["plain"]).abs().max() > 1e-4
    assert (single["later"] - single["plain"]).abs().amax((1, 2)).gt(0).tolist() == [False, True]


def test_one_process_reads_a_denoiser_in_bf16(read: Path) -> None:
    found = torch.load(read / "kl-resume" / "logits.pt")
    assert found["plain"].dtype == torch.bfloat16
    assert found["plain"].float().abs().max() > 0.05
    assert (found["last changed"] != found["plain"])[:, 0].any()


def test_what_is_no_denoiser_is_not_read_as_one(read: Path) -> None:
    said = (read / "plain" / "logits.txt").read_text(encoding="utf-8")
    assert said.endswith("holds no KL-flow model: train one with --training-task kl-flow")


@pytest.mark.parametrize(("run", "task"), [("kl-token-single", "autoregressive"), ("plain", "kl-flow")])
@pytest.mark.parametrize("option", ["load", "pretrained_checkpoint"])
def test_a_run_starts_from_a_model_of_its_task(runs: Path, run: str, task: str, option: str) -> None:
    plain = {"load": None, "pretrained_checkpoint": None, "ckpt_format": "torch_dist", "ckpt_step": None}
    args = argparse.Namespace(**plain | {option: str(runs / run), "training_task": task})
    with pytest.raises(ValueError, match=rf"{run} holds a model of --training-task .*, this run is {task}"):
        check_task(args)
    args.training_task = {"autoregressive": "kl-flow", "kl-flow": "autoregressive"}[task]
    check_task(args)


def test_a_checkpoint_of_another_format_is_left_to_upstream(tmp_path: Path) -> None:
    (tmp_path / "iter_0000004" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    check_task(
        argparse.Namespace(
            load=str(tmp_path),
            pretrained_checkpoint=None,
            ckpt_format="torch_dist",
            ckpt_step=None,
            training_task="kl-flow",
        )
    )
