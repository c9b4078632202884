"""What upstream's model classes offer to our losses. Fails by name when a new version moves it (docs/upstream.md)."""

import ast
import importlib
import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module, MegatronModule

from megatron_sfr.model import model_class
from megatron_sfr.model.model_class import HOOK, ensure_output_processor, takes_output_processor
from megatron_sfr.runtime.replacements import Replacement
from megatron_sfr.training.forward_step import ForwardStep
from tests.runtime.test_replacements import EVERYTHING, label

PAGE = (Path(__file__).parents[2] / "docs/upstream.md").read_text(encoding="utf-8")
GPT, HYBRID = "megatron.core.models.gpt.gpt_model", "megatron.core.models.hybrid.hybrid_model"


def upstream(module: str, name: str) -> Any:
    """A class of upstream; the test fails with its name if it is gone."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        pytest.fail(f"{module}.{name} is gone from Megatron: docs/upstream.md says what depends on it")


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def passed_to_the_processor(function: Any) -> set[str]:
    """The keywords with which a method of upstream calls `output_processor`."""
    calls = (node for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))
    found = [node for node in calls if isinstance(node, ast.Call) and ast.unparse(node.func) == "output_processor"]
    assert len(found) == 1
    return {keyword.arg for keyword in found[0].keywords if keyword.arg}


def read_by_the_losses() -> set[str]:
    return {name for name, p in parameters(ForwardStep.losses).items() if p.kind is p.KEYWORD_ONLY}


def test_the_losses_are_computed_by_a_hook_of_gpt_model() -> None:
    model = upstream(GPT, "GPTModel")
    found = parameters(model.forward)
    assert found.keys() >= HOOK | {"labels", "loss_mask", "packed_seq_params"}
    assert [found[name].default for name in sorted(HOOK)] == [None, None]
    assert takes_output_processor(model)


def test_gpt_model_passes_to_the_hook_what_the_losses_read() -> None:
    assert passed_to_the_processor(upstream(GPT, "GPTModel")._postprocess) >= read_by_the_losses()


def test_hybrid_model_has_no_such_hook_yet() -> None:
    """When this fails, remove _WithProcessor from model/model_class.py, and say so in docs/upstream.md."""
    assert not parameters(upstream(HYBRID, "HybridModel").forward).keys() & HOOK


def test_hybrid_model_stops_at_one_flag_before_its_loss() -> None:
    """What our hook relies on: forward returns the hidden states of a stage without output layer, and nothing else of
    it reads that flag."""
    forward = ast.parse(textwrap.dedent(inspect.getsource(upstream(HYBRID, "HybridModel").forward)))
    reads = [node for node in ast.walk(forward) if isinstance(node, ast.Attribute) and node.attr == "post_process"]
    stops = [
        node for node in ast.walk(forward) if isinstance(node, ast.If) and "self.post_process" in ast.unparse(node.test)
    ]
    assert len(reads) == len(stops) == 1
    assert ast.unparse(stops[0]) == "if not self.post_process:\n    return hidden_states"


def test_our_hook_passes_what_upstreams_passes_and_the_losses_read() -> None:
    ours = passed_to_the_processor(model_class._WithProcessor.forward)
    assert ours >= read_by_the_losses()
    assert ours <= passed_to_the_processor(upstream(GPT, "GPTModel")._postprocess)


def test_the_page_names_the_flag_and_the_method_of_our_hook() -> None:
    assert "`HybridModel.forward`" in PAGE
    assert "`post_process`" in PAGE


class NoHook(MegatronModule):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens


def test_a_model_without_the_hook_is_refused_by_name_also_in_its_wrapper() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=2, num_attention_heads=1, cuda_graph_modules=[], bf16=True)
    for model in (NoHook(config), Float16Module(config, NoHook(config))):
        with pytest.raises(ValueError, match=r"^NoHook\.forward takes no output_processor, by which the losses"):
            ensure_output_processor(model)


@pytest.mark.parametrize("entry", EVERYTHING, ids=label)
def test_the_page_lists_each_replaced_name(entry: Replacement) -> None:
    assert f"`{entry.name}`" in PAGE
