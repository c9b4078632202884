"""HybridModel with our hook: upstream's own loss from what the hook gives, and the numbers of GPTModel.

One process runs everything (hybrid_program.py); layouts are tested in tests/distributed/test_hybrid.py. Not exercised:
Transformer Engine's specification, which needs a GPU.
"""

import json
from typing import Any

import pytest

from tests import warm


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = warm.run("-m", "tests.model.hybrid_program", ranks=1, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("weights", ["tied", "untied"])
def test_the_hook_gets_what_upstreams_own_loss_is_computed_from(found: dict[str, Any], weights: str) -> None:
    """Bit for bit. It fails if a new version reads `post_process` for anything else than where to stop."""
    assert found[weights] == {
        "logits": True,
        "loss": True,
        "context": "context",
        "without the hook": True,
        "names": True,
    }


@pytest.mark.parametrize("reads", ["last states", "first layer"])
def test_attention_and_mlp_have_the_losses_and_gradients_of_gpt_model(found: dict[str, Any], reads: str) -> None:
    """Bit for bit: the layers compute the same, in the same order."""
    assert found[reads]["named"]
    assert all(gpt == hybrid for gpt, hybrid in found[reads]["losses"])
    assert all(gpt == hybrid and "sfr loss" in gpt for gpt, hybrid in found[reads]["reports"])
    assert found[reads]["gradients"] == 0
