"""The parts of the denoiser against their definitions; tests/distributed/test_kl_flow tests complete models.

Shapes: B samples, S positions, V tokens, H hidden size.
"""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from megatron_sfr.kl_flow.model import (
    FlowTime,
    KLFlowModelBuilder,
    KLFlowModelConfig,
    ModulatedNorm,
    SimplexEmbedding,
    Way,
    bidirectional_spec,
)

B, S, V, H = 2, 5, 12, 16
# megatron-core 0.19.2's layer does not pass its MLP the required size.
pytestmark = pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning")


def transformer(**changes: object) -> TransformerConfig:
    read = {"num_layers": 2, "hidden_size": H, "num_attention_heads": 2, "transformer_impl": "local"}
    more = {"use_cpu_initialization": True, "hidden_dropout": 0.0, "normalization": "RMSNorm", "cuda_graph_modules": []}
    return TransformerConfig(**read | more | changes)


def config(time: Way = "token", position: str = "rope") -> KLFlowModelConfig:
    return KLFlowModelConfig(
        transformer=transformer(), vocab_size=V, seq_length=S + 1, position_embedding_type=position, time=time
    )


def build(time: Way) -> GPTModel:
    return KLFlowModelBuilder(config(time)).build_model(ProcessGroupCollection.use_mpu_process_groups(), True, True)


def make_table() -> VocabParallelEmbedding:
    group = parallel_state.get_tensor_model_parallel_group()
    return VocabParallelEmbedding(V, H, init_method=torch.nn.init.normal_, config=transformer(), tp_group=group)


@pytest.mark.usefixtures("one_rank")
def test_a_token_is_embedded_as_its_row_and_a_point_as_the_weighted_mean() -> None:
    table = make_table()
    time = FlowTime("token")
    embedding = SimplexEmbedding(transformer(), table, time, seed=1)
    token_BS = torch.arange(B * S).view(B, S)
    time.set(torch.tensor([0.1, 0.3]))
    h_SBH = embedding(torch.nn.functional.one_hot(token_BS, V).float())
    assert h_SBH.shape == (S + 1, B, H)
    torch.testing.assert_close(h_SBH[1:], table.weight[token_BS].transpose(0, 1))
    assert (h_SBH[0, 0] != h_SBH[0, 1]).any()
    x_BSV = torch.rand(B, S, V).softmax(-1)
    torch.testing.assert_close(embedding(x_BSV)[1:], torch.einsum("bsv,vh->sbh", x_BSV, table.weight))
    torch.testing.assert_close(embedding(x_BSV)[0], h_SBH[0])  # only the time


@pytest.mark.usefixtures("one_rank")
def test_an_embedding_without_the_time_leaves_all_positions_to_the_text() -> None:
    table = make_table()
    embedding = SimplexEmbedding(transformer(), table, FlowTime("adaln"), seed=1)
    assert embedding(torch.rand(B, S, V)).shape == (S, B, H)
    assert [name for name, _ in embedding.named_parameters()] == ["word_embeddings.weight"]


def test_a_modulated_norm_starts_as_the_norm() -> None:
    norm, time = ModulatedNorm(transformer(), H), FlowTime("adaln")
    norm.time = time
    time.set(torch.tensor([0.1, 0.3]))
    x_SBH = torch.randn(S, B, H)
    assert torch.equal(norm(x_SBH), norm.norm(x_SBH))
    torch.nn.init.normal_(norm.modulation.weight)
    scale_BH, shift_BH = norm.modulation(time.read(torch.float32)).chunk(2, dim=-1)
    torch.testing.assert_close(norm(x_SBH)[3, 1], norm.norm(x_SBH)[3, 1] * (1 + scale_BH[1]) + shift_BH[1])


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("sharded", [False, True])
def test_what_knows_the_time_is_summed_over_the_tensor_group_where_its_positions_are_split(sharded: bool) -> None:
    parallel = transformer(sequence_parallel=sharded, tensor_model_parallel_size=2)
    embedding = SimplexEmbedding(parallel, make_table(), FlowTime("token"), seed=1)
    layers = (ModulatedNorm(parallel, H), embedding.time_in, embedding.time_out)
    assert {p.sequence_parallel for layer in layers for p in layer.parameters()} == {sharded}
    assert not hasattr(embedding.word_embeddings.weight, "sequence_parallel")


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("time", ["token", "adaln"])
def test_every_layer_sees_both_ways_and_knows_the_models_time(time: Way) -> None:
    spec = bidirectional_spec(config(time))
    assert [x.submodules.self_attention.params["attn_mask_type"] for x in spec.layer_specs] == [
        AttnMaskType.no_mask
    ] * 2
    model = build(time)
    norms = [module for module in model.modules() if isinstance(module, ModulatedNorm)]
    assert len(norms) == (4 if time == "adaln" else 0)
    assert all(norm.time is model.flow_time for norm in norms)
    assert model.embedding.time is model.flow_time
    assert model.flow_time.positions == (1 if time == "token" else 0)


@pytest.mark.usefixtures("one_rank")
def test_two_models_of_one_seed_have_equal_time_embeddings() -> None:
    one, other = (build("token").embedding.time_in.weight for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("position", ["none", "learned_absolute"])
def test_a_denoiser_without_rotary_positions_is_refused(position: str) -> None:
    with pytest.raises(ValueError, match="set it to rope"):
        KLFlowModelBuilder(config(position=position)).build_model(None, True, True)


@pytest.mark.usefixtures("one_rank")
def test_the_time_scale_is_a_factor_on_t() -> None:
    t_B, authors = torch.tensor([0.1, 0.3]), config()
    authors.time_scale = 1.0
    model = KLFlowModelBuilder(authors).build_model(ProcessGroupCollection.use_mpu_process_groups(), True, True)
    model.flow_time.set(1000 * t_B)
    ours = FlowTime("token")
    ours.set(t_B)
    torch.testing.assert_close(model.flow_time.wave_BF, ours.wave_BF, rtol=0, atol=1e-4)
    model.flow_time.set(t_B)
    first, second = model.flow_time.wave_BF
    assert (first - second).abs().max() < 0.25 < (ours.wave_BF[0] - ours.wave_BF[1]).abs().max()
