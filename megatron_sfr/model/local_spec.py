"""Upstream's local layer spec, dense or with experts, with a norm that also works under sequence parallelism.

Without Apex, upstream uses torch's norm and asserts that sequence parallelism is off (megatron-core 0.19.2). It is
enough to mark the norm's parameters sequence_parallel: upstream then sums their gradients over the tensor group.
"""

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.training.models.base import ModelConfig
from torch import nn

from megatron_sfr.model.gathered_attention import GatheredAttention


def local_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> nn.Module:
    """torch's RMSNorm or LayerNorm, by config.normalization. Upstream calls it with this signature."""
    norm = (nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm)(hidden_size, eps=eps)
    for p in norm.parameters():
        p.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


def local_block_spec(config: ModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Spec of one stage's decoder layers, for GPTModelConfig.transformer_layer_spec. Experts run sequentially."""
    transformer = config.transformer
    spec = get_gpt_layer_local_spec(
        num_experts=transformer.num_moe_experts,
        qk_layernorm=transformer.qk_layernorm,
        normalization=transformer.normalization,
    )
    layer = spec.submodules
    if (
        transformer.num_moe_experts is not None
    ):  # 0.19.2 saves it as a dense layer's; Transformer Engine's spec does not
        del layer.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    layer.input_layernorm = layer.pre_mlp_layernorm = local_norm
    if transformer.context_parallel_size > 1:
        layer.self_attention.submodules.core_attention = GatheredAttention
    if transformer.qk_layernorm:
        layer.self_attention.submodules.q_layernorm = layer.self_attention.submodules.k_layernorm = local_norm
    layers = get_num_layers_to_build(transformer, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=local_norm)
