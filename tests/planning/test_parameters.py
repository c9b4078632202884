"""Numbers of parameters, memory and disk of a plan, against Megatron's own counts and the benchmarks' shapes."""

import json
from argparse import Namespace

import pytest
import torch

from megatron_sfr.model.flow_head import FlowHeadOptions
from megatron_sfr.model.lora.options import LoRAOptions
from megatron_sfr.planning.activations import head_activations
from megatron_sfr.planning.layout import Layout, stage_layers
from megatron_sfr.planning.memory import HeadSizes
from megatron_sfr.planning.parameters import UNKNOWN, Counts, adapters, check_known
from tests import warm
from tests.training.timing.test_operations import SHAPE, arguments


@pytest.mark.parametrize(
    ("recipe", "processes"),
    [("qwen3_32b_personas", 64), ("qwen2.5_coder_7b", 8), ("long_context", 8), ("llama3_8b_lora_sfr", 8)],
)
def test_megatron_counts_the_same_parameters(recipe: str, processes: int) -> None:
    """On its most loaded stage. It knows neither the norms of queries and keys nor the bias of QKV."""
    path = f"examples/{recipe}/recipe.yaml"
    done = warm.run("-m", "tests.planning.upstream_count", path, str(processes), check=True)
    ours, upstreams = json.loads(done.stdout.splitlines()[-1])
    assert ours == pytest.approx(upstreams, rel=2e-4)


def test_layers_of_a_hybrid_model_are_not_counted() -> None:
    """Their number would be taken for GPTModel's, which are an attention and an MLP each."""
    with pytest.raises(ValueError, match="model_class = hybrid: `megatron-sfr plan` does not count"):
        check_known(Namespace(**UNKNOWN | {"model_class": "hybrid"}))


def test_adapters_are_those_of_the_benchmark() -> None:
    counts = adapters(arguments(num_layers=1), LoRAOptions(rank=8)) * SHAPE.layers
    assert counts.total == SHAPE.lora_parameters(8)
    assert adapters(arguments(), LoRAOptions(rank=8, targets="proj")) == Counts(split=8 * 4096, copied=8 * 4096)


def test_the_schedule_bounds_what_is_in_flight() -> None:
    """Megatron's 1F1B, and with 2 chunks its interleaved form: Narayanan et al., arXiv 2104.04473, figure 4."""
    plain, interleaved = Layout(4, pipeline=4), Layout(4, pipeline=4, chunks=2)
    assert [plain.in_flight(stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert [plain.in_flight(stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    assert [2 * interleaved.in_flight(stage, 8) for stage in range(4)] == [11, 9, 7, 5]
    assert (plain.bubble(8), interleaved.bubble(8)) == (3 / 11, 3 / 19)


def test_layers_are_divided_as_megatron_divides_them() -> None:
    names = {"decoder_first_pipeline_num_layers": None, "decoder_last_pipeline_num_layers": None}
    names |= {"account_for_embedding_in_pipeline_split": False, "account_for_loss_in_pipeline_split": False}
    pp4 = {"num_layers": 64, "pipeline_model_parallel_size": 4} | names
    assert stage_layers(arguments(**pp4)) == (16, 16, 16, 16)
    uneven = {"decoder_first_pipeline_num_layers": 17, "decoder_last_pipeline_num_layers": 15}
    assert stage_layers(arguments(**pp4 | uneven)) == (17, 16, 16, 15)
    both = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
    assert stage_layers(arguments(**pp4 | both | {"num_layers": 62})) == (15, 16, 16, 15)


@pytest.mark.parametrize("architecture", ["mlp", "adaln"])
def test_the_head_keeps_at_least_its_hidden_layers(architecture: str) -> None:
    """For each draw x_t and the inputs of linear layers, at a rate that the number of draws does not change."""
    options = FlowHeadOptions(architecture=architecture, width=64, depth=2)
    one, two, four = (head_activations(options, 32, 16, draws, torch.bfloat16) for draws in (1, 2, 4))
    assert four - two == 2 * (two - one)
    assert two - one > 2 * (16 + 64 * 4)
    sizes = HeadSizes(options, 16, 4, 8.0)
    assert sizes.parameters(32) > 2 * 64 * 64
