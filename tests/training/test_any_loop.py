"""The forward step in any loop around Megatron Core: without global arguments, and with the same numbers.

One process runs all steps (loop_program.py). It does not exercise parallel layouts: tests/distributed does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    command = [sys.executable, "-m", "tests.training.loop_program"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_forward_step_needs_no_part_of_megatrons_training_loop(found: dict[str, Any]) -> None:
    assert found["imported"] == []
    assert found["global arguments"] is None


def test_losses_and_gradients_equal_those_under_megatrons_loop(found: dict[str, Any]) -> None:
    assert all(given == usual for given, usual in found["losses"])
    assert len({given for given, _ in found["losses"]}) == len(found["losses"]) == 4
    assert all(given == usual for given, usual in found["reports"])
    assert found["gradients"] == [True] * 4
    assert {"embedding.word_embeddings.weight", "flow_head.net.output.weight"} <= set(found["named"])


def test_the_state_of_megatron_bridge_gives_the_same_step(found: dict[str, Any]) -> None:
    assert found["bridge"]


def test_upstream_can_free_the_loss_of_a_pipeline_stage(found: dict[str, Any]) -> None:
    """With deallocate_pipeline_outputs, its default on GPUs, upstream refuses an output that is a view."""
    assert found["views"] == [False] * 4


def test_the_example_of_an_own_loop_trains_with_megatrons_optimizer(found: dict[str, Any]) -> None:
    logged = found["own loop"]["logged"]
    assert [line["sfr weight"] for line in logged] == [1.0, 0.0, 0.5, 1.0]
    assert all(1 < line["sfr loss"] < 3 for line in logged)
    assert found["own loop"]["restored"]


def test_entries_of_a_batch_have_defaults(found: dict[str, Any]) -> None:
    assert found["defaults"]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("layer", "sfr_layer = 9 is not on the last pipeline stage, which has layers 1 to 2"),
        ("head", "the model has no flow_head: run attach_head(plan) on its chunks before they are wrapped in DDP"),
        ("gate", "the flow head was built with other options than the loss: build its plan by flow_head_plan"),
        ("wrapped", "Linear has no post_process: attach the head to models of Megatron Core, before they are wrapped"),
        ("name", "loss is 'gem': give an instance of a TokenLoss, such as GEM(beta=0.7)"),
        ("entry", "the batch has no target; it has tokens, labels,"),
        ("shape", "give [B, S] each: tokens is [2, 12], labels is [2, 12], loss_mask is [2, 13]"),
        ("label", "a label with loss_mask 1 is -100: give tokens from 0 to 60, or loss_mask 0"),
        ("dim", "the flow head is for embeddings of 6 dimensions and hidden states of 16, not of 7 and 16"),
    ],
)
def test_a_mistake_is_answered_in_one_line(found: dict[str, Any], mistake: str, message: str) -> None:
    assert message in found["errors"][mistake]
    assert "\n" not in found["errors"][mistake]


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_after_a_decay_to_weight_0_the_backbone_is_that_of_plain_sft(found: dict[str, Any], decay: str) -> None:
    """In a run of train_iters steps the decay ends with the run; a longer loop trains on at weight 0."""
    shares = found[decay]["shares"]
    assert shares[0] > shares[1] > 0
    assert shares[2:] == [0, 0, 0]
    assert found[decay]["equal"]
    assert found[decay]["head learns"]


def test_at_a_constant_weight_it_is_not(found: dict[str, Any]) -> None:
    assert found["constant"]["shares"] == [1] * 5
    assert not found["constant"]["equal"]
