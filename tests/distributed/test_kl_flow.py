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
from tests import warm

from .launch import read_checkpoint, read_metrics
from .runs import Runs, begin_with
from .settings import (
    HALFWAY,
    KL_FLOW,
    MICRO_BATCH_1,
    MICRO_BATCH_4,
    OVERLAPPED,
    PP2,
    RECOMPUTE,
    SHARDED_OPTIMIZER,
    SP,
    TP2,
    VPP,
)
from .test_layouts import MOMENT, TIED, difference
from .tiny import write_recipe

pytestmark = pytest.mark.distributed
PROGRAM = Path(__file__).with_name("denoise_program.py")
KINDS: dict[str, tuple[str, ...]] = {
    "token": ("--kl-flow-infill", "0.5"),
    "adaln": ("--kl-flow-time", "adaln", "--normalization", "LayerNorm"),
    "documents": ("--train-data-path", "{documents}", "--kl-flow-infill", "0.5"),  # tied embeddings
}
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {  # name: processes, flags
    "single": (1, ()),
    "micro-batch-4": (1, MICRO_BATCH_4),
    "recompute": (1, RECOMPUTE),
    "pp2-vpp": (2, (*PP2, *VPP)),
    "dp2-sharded": (2, (*MICRO_BATCH_1, *SHARDED_OPTIMIZER, *OVERLAPPED)),
    "tp2-pp2": (4, (*TP2, *PP2)),
    "tp2-pp2-sp": (4, (*TP2, *PP2, SP)),
}

RESUME = (*KL_FLOW, "--bf16", *TP2, SP, "--train-iters", "4", "--kl-flow-infill", "0.5")


def has_layout(kind: str, layout: str) -> bool:
    """The time as a token in every layout; the other kinds where their difference can show."""
    if kind == "adaln":
        return layout not in ("recompute", "micro-batch-4")
    return kind == "token" or layout in ("single", "tp2-pp2-sp", "dp2-sharded")


CASES = [(kind, layout) for kind in KINDS for layout in LAYOUTS if layout != "single" and has_layout(kind, layout)]


def trained(runs: Runs, kind: str, layout: str = "single") -> Path:
    """Three steps in a layout, after one that all layouts have in common."""
    recipe = runs.plain
    if kind == "documents":
        recipe = runs.once("plain-tied.yaml", lambda path: write_recipe(path, runs.prepared, sfr=False, **TIED))
    ranks, flags = LAYOUTS[layout]
    kl_flow = (*KL_FLOW, *runs.with_data(KINDS[kind]))
    start = runs.train(f"kl-{kind}", 1, *kl_flow, "--train-iters", "1", recipe=recipe)
    return runs.train(f"kl-{kind}-{layout}", ranks, *kl_flow, *begin_with(start), *flags, recipe=recipe)


def straight(runs: Runs) -> Path:
    return runs.train("kl-resume-straight", 2, *RESUME, *HALFWAY, recipe=runs.plain)


def resumed(runs: Runs) -> Path:
    return runs.resume("kl-resume", straight(runs), 2, 2, *RESUME, recipe=runs.plain)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_layout_changes_no_number(runs: Runs, name: str, layout: str) -> None:
    both = [trained(runs, name, x) for x in ("single", layout)]
    single, other = (read_checkpoint(run / "iter_0000003") for run in both)
    heads = [] if name == "documents" else ["output_layer."]  # tied
    for prefix in (MOMENT, "decoder.", "embedding.", *heads):
        assert difference(single, other, prefix) < (1e-5, "")
    expected, found = map(read_metrics, both)
    assert [row["step"] for row in found] == [1, 2, 3]
    for row, row_found in zip(expected, found, strict=True):
        terms = ("kl-flow loss", "grad-norm")
        assert [row_found[t] for t in terms] == pytest.approx([row[t] for t in terms], rel=1e-5)


def test_every_parameter_learns_and_the_kinds_differ(runs: Runs) -> None:
    """Otherwise the test above would compare what is not there."""
    states = {kind: read_checkpoint(trained(runs, kind) / "iter_0000003") for kind in KINDS}
    for state in states.values():
        assert [key for key, x in state.items() if key.startswith(MOMENT) and not x.any()] == []
    assert "embedding.time_in.weight" in states["token"]
    assert any("modulation" in key for key in states["adaln"])
    assert "output_layer.weight" not in states["documents"]
    losses = [read_metrics(trained(runs, kind))[-1]["kl-flow loss"] for kind in KINDS]
    assert len(set(losses)) == len(losses)


def test_resumed_run_equals_the_straight_one_bit_for_bit(runs: Runs) -> None:
    both = straight(runs), resumed(runs)
    expected, actual = (read_checkpoint(run / "iter_0000004") for run in both)
    assert expected.keys() == actual.keys()
    assert [key for key in expected if not torch.equal(expected[key], actual[key])] == []


@pytest.mark.parametrize("kind", ["adaln", "documents"])
def test_no_denoiser_is_exported_as_a_hugging_face_model(runs: Runs, kind: str) -> None:
    checkpoint = Checkpoint(find_checkpoint(trained(runs, kind)))
    with pytest.raises(
        ValueError, match="holds a KL-flow denoiser, which no Hugging Face architecture computes"
    ) as caught:
        StoredModel(checkpoint, {"architectures": ["Qwen3ForCausalLM"]})
    assert "\n" not in str(caught.value)


def denoise(*runs: Path) -> list[dict[str, torch.Tensor]]:
    """What one process computes with the denoisers that it reads from runs."""
    warm.run(str(PROGRAM), *map(str, runs), ranks=1, check=True)
    return [torch.load(run / "logits.pt") for run in runs]


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_reads_the_denoiser_of_any_layout(runs: Runs, kind: str) -> None:
    """Also: a token sees those after it, and its position matters."""
    single, other = denoise(*(trained(runs, kind, layout) for layout in ("single", "tp2-pp2-sp")))
    torch.testing.assert_close(other["plain"], single["plain"], rtol=1e-4, atol=1e-5)
    assert (single["last changed"] - single["plain"])[:, 0].abs().max() > 1e-4
    assert (single["reversed"].flip(1) - single["plain"]).abs().max() > 1e-4
    assert (single["later"] - single["plain"]).abs().amax((1, 2)).gt(0).tolist() == [False, True]


def test_one_process_reads_a_denoiser_in_bf16(runs: Runs) -> None:
    (found,) = denoise(resumed(runs))
    assert found["plain"].dtype == torch.bfloat16
    assert found["plain"].float().abs().max() > 0.05
    assert (found["last changed"] != found["plain"])[:, 0].any()


def test_another_model_is_not_read_as_a_denoiser(runs: Runs) -> None:
    done = warm.run(str(PROGRAM), str(runs.backbone()), ranks=1)
    assert done.returncode == 1
    assert "holds no KL-flow model: train one with --training-task kl-flow\n" in done.stderr


@pytest.mark.parametrize("task", ["autoregressive", "kl-flow"])
@pytest.mark.parametrize("option", ["load", "pretrained_checkpoint"])
def test_a_run_starts_from_a_model_of_its_task(runs: Runs, task: str, option: str) -> None:
    run = runs.backbone() if task == "kl-flow" else trained(runs, "token")
    plain = {"load": None, "pretrained_checkpoint": None, "ckpt_format": "torch_dist"}
    plain |= {"ckpt_step": None, "lora_rank": None, "hybrid_layer_pattern": None}
    args = argparse.Namespace(**plain | {option: str(run), "training_task": task})
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
            lora_rank=None,
            hybrid_layer_pattern=None,
        )
    )
