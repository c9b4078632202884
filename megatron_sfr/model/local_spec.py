"""Upstream's local layer spec, dense or with experts, with a norm that also works under sequence parallelism.

For HybridModel, for which upstream has specs of Transformer Engine only, the same attention and MLP as separate layers.

Without Apex, upstream uses torch's norm and asserts that sequence parallelism is off (megatron-core 0.19.2). It is
enough to mark the norm's parameters sequence_parallel: upstream then sums their gradients over the tensor group.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.training.models.base import ModelConfig
from torch import nn

from megatron_sfr.model.gathered_attention import GatheredAttention
from megatron_sfr.runtime.replacements import Replacement, wrapper


def local_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> nn.Module:
    """torch's RMSNorm or LayerNorm, by config.normalization. Upstream calls it with this signature."""
    norm = (nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm)(hidden_size, eps=eps)
    for p in norm.parameters():
        p.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


def local_block_spec(config: ModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Spec of one stage's decoder layers, for GPTModelConfig.transformer_layer_spec. Experts run sequentially."""
    spec = _layer_spec(config.transformer)
    layers = get_num_layers_to_build(config.transformer, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=local_norm)


def _layer_spec(transformer: TransformerConfig) -> ModuleSpec:
    """Spec of a layer of GPTModel."""
    spec = get_gpt_layer_local_spec(
        num_experts=transformer.num_moe_experts,
        qk_layernorm=transformer.qk_layernorm,
        normalization=transformer.normalization,
    )
    layer = spec.submodules
    if transformer.num_moe_experts is not None:
        # 0.19.2 saves the norm before the experts under a dense layer's name, unlike Transformer Engine's spec.
        del layer.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    layer.input_layernorm = layer.pre_mlp_layernorm = local_norm
    if transformer.context_parallel_size > 1:
        layer.self_attention.submodules.core_attention = GatheredAttention
    if transformer.qk_layernorm:
        layer.self_attention.submodules.q_layernorm = layer.self_attention.submodules.k_layernorm = local_norm
    return spec


@wrapper
def _local_prediction_layers(original: Callable[..., Any]) -> Callable[..., Any]:
    def mtp_block_spec(config: ModelConfig, *args: Any, **kwargs: Any) -> Any:
        block = original(config, *args, **kwargs)
        if block is not None and config.transformer_layer_spec is local_block_spec:
            for layer in (spec.submodules for spec in block.layer_specs):
                layer.enorm = layer.hnorm = layer.layer_norm = local_norm
                layer.mtp_model_layer = _layer_spec(config.transformer)
        return block

    return mtp_block_spec


REPLACEMENTS = (
    Replacement(
        "megatron.training.models.gpt",
        "mtp_block_spec",
        _local_prediction_layers,
        "builds the layers of multi-token prediction from upstream's spec, whatever that of the decoder's layers is",
        ("config",),
    ),
)
"""For the time in which a model is built."""


class LocalHybridStack(HybridStack):
    """Upstream's stack with torch's final norm; upstream builds Transformer Engine's, whatever the spec says."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs, post_layer_norm=False)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = local_norm(config, config.hidden_size, config.layernorm_epsilon)


def local_hybrid_spec(transformer: TransformerConfig) -> ModuleSpec:
    """Spec of HybridModel's attention and MLP, for HybridModelConfig.hybrid_stack_spec.

    They are the two halves of GPTModel's layer, with the same names in a checkpoint except for the layer's number.
    """
    both = _layer_spec(transformer).submodules
    names = both.sharded_state_dict_keys_map
    attention = TransformerLayerSubmodules(
        input_layernorm=both.input_layernorm,
        self_attention=both.self_attention,
        self_attn_bda=both.self_attn_bda,
        sharded_state_dict_keys_map={key: name for key, name in names.items() if key == "input_layernorm."},
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=both.pre_mlp_layernorm,
        mlp=both.mlp,
        mlp_bda=both.mlp_bda,
        sharded_state_dict_keys_map={key: name for key, name in names.items() if key == "pre_mlp_layernorm."},
    )
    return ModuleSpec(
        module=LocalHybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )
