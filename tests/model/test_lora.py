"""LoRA's adapters on the chunks of a model of which only some have the layers that a target names.

Layouts, gradients and checkpoints are in tests/distributed/test_lora.py.
"""

import pytest
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from megatron_sfr.model.builder import SFRModelBuilder, SFRModelConfig
from megatron_sfr.model.local_spec import local_block_spec
from megatron_sfr.model.lora.attach import attach_adapters
from megatron_sfr.model.lora.options import LoRAOptions

pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    # megatron-core 0.19.2's layer does not pass its MLP the required size.
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
]


def chunk(experts: int | None) -> MegatronModule:
    """One layer: dense, or with experts."""
    given = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "transformer_impl": "local"}
    more = {"use_cpu_initialization": True, "add_bias_linear": False, "cuda_graph_modules": []}
    config = TransformerConfig(**given | more, num_moe_experts=experts, moe_ffn_hidden_size=8 if experts else None)
    model = SFRModelConfig(transformer=config, vocab_size=12, seq_length=4, transformer_layer_spec=local_block_spec)
    return SFRModelBuilder(model).build_model(ProcessGroupCollection.use_mpu_process_groups(), True, True)


def adapted(model: MegatronModule) -> set[str]:
    """The layers that have adapters."""
    return {name.partition(".adapter.")[0] for name, p in model.named_parameters() if p.requires_grad}


def test_a_target_may_match_in_some_chunks_only() -> None:
    """As where the first layers are dense, and pipeline stages or virtual stages divide them."""
    chunks = attach_adapters(LoRAOptions(rank=2, targets="*.linear_qkv,mlp.experts.*"), 1)([chunk(None), chunk(2)])
    layer = "decoder.layers.0"
    expert = f"{layer}.mlp.experts.local_experts"
    assert adapted(chunks[0]) == {f"{layer}.self_attention.linear_qkv"}
    assert adapted(chunks[1]) == adapted(chunks[0]) | {f"{expert}.{i}.linear_fc{k}" for i in (0, 1) for k in (1, 2)}


def test_a_target_that_matches_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lora_targets: mlp\.router matches none of this model's layers: mlp\.lin"):
        attach_adapters(LoRAOptions(rank=2, targets="*.linear_qkv,mlp.router"), 1)([chunk(None), chunk(None)])
