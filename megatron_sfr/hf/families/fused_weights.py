"""Weights that some families store fused: queries, keys and values in one tensor, gate and up projection in another."""

from megatron_sfr.hf.families.dense import H, M
from megatron_sfr.hf.mappings import Direct, FusedQKV, ParameterMapping

QKV = FusedQKV(M + "self_attention.linear_qkv.weight", (H + "self_attn.qkv_proj.weight",), ("hidden",))
MLP: tuple[ParameterMapping, ...] = (
    Direct(M + "mlp.linear_fc1.layer_norm_weight", (H + "post_attention_layernorm.weight",), ("hidden",)),
    Direct(M + "mlp.linear_fc1.weight", (H + "mlp.gate_up_proj.weight",), ("gated_ffn", "hidden"), 0),
    Direct(M + "mlp.linear_fc2.weight", (H + "mlp.down_proj.weight",), ("hidden", "ffn"), 1),
)
"""The gate's rows come first, as in Megatron's checkpoint."""
