"""What upstream's model classes offer to our losses. Fails by name when a new version moves it (docs/upstream.md)."""

import inspect
from pathlib import Path

import pytest
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel

from megatron_sfr.runtime.replacements import Replacement
from tests.runtime.test_replacements import EVERYTHING, label

PAGE = (Path(__file__).parents[2] / "docs/upstream.md").read_text(encoding="utf-8")
HOOK = {"output_processor", "output_processor_context"}


def test_the_losses_are_computed_by_a_hook_of_gpt_model() -> None:
    assert inspect.signature(GPTModel.forward).parameters.keys() >= HOOK


def test_hybrid_model_has_no_such_hook_yet() -> None:
    """When this fails, SFR can move to HybridModel, and docs/upstream.md has to say so."""
    assert not inspect.signature(HybridModel.forward).parameters.keys() & HOOK


@pytest.mark.parametrize("entry", EVERYTHING, ids=label)
def test_the_page_lists_each_replaced_name(entry: Replacement) -> None:
    assert f"`{entry.name}`" in PAGE
