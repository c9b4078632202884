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


def test_a_wrong_layer_and_a_missing_head_are_named(found: dict[str, Any]) -> None:
    assert found["errors"]["layer"] == "sfr_layer = 9 is not on the last pipeline stage, which has layers 1 to 2"
    assert "flow_head" in found["errors"]["head"]


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
