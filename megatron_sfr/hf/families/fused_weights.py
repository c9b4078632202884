"""Weights that some families store fused: queries, keys and values in one tensor, gate and up projection in another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_sfr.hf.families.dense import H, M
from megatron_sfr.hf.mappings import QKV as SeparateQKV
from megatron_sfr.hf.mappings import Dimensions, Direct, Divided, ParameterMapping, Spans

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FusedQKV:
    """One Hugging Face tensor of all queries, then all keys, then all values; Megatron keeps them group by group."""

    megatron: str
    names: tuple[str]
    columns: tuple[str, ...]
    tp_dim: int | None = 0
    padded: bool = False
    divided: Divided = ()

    def shapes(self, d: Dimensions) -> tuple[tuple[int, ...], ...]:
        return (self.megatron_shape(d),)

    def megatron_shape(self, d: Dimensions) -> tuple[int, ...]:
        return self._apart.megatron_shape(d)

    def grain(self, d: Dimensions) -> int:
        return self._apart.grain(d)

    def spans(self, start: int, stop: int, d: Dimensions) -> tuple[Spans, ...]:
        parts = zip((0, d.query, d.query + d.key_value), self._apart.spans(start, stop, d), strict=True)
        return (tuple((offset + first, offset + last) for offset, ((first, last),) in parts),)

    def join(self, parts: tuple[Tensor, ...], d: Dimensions) -> Tensor:
        (tensor,) = parts
        rows = [rows * len(tensor) // self.grain(d) for rows in self._apart.group(d)]
        return self._apart.join(tensor.split(rows), d)

    def split(self, tensor: Tensor, d: Dimensions) -> tuple[Tensor, ...]:
        import torch  # here: a config.json is checked without it

        return (torch.cat(self._apart.split(tensor, d)),)

    @property
    def _apart(self) -> SeparateQKV:
        return SeparateQKV(self.megatron, (*self.names, "", ""), self.columns)


QKV = FusedQKV(M + "self_attention.linear_qkv.weight", (H + "self_attn.qkv_proj.weight",), ("hidden",))
MLP: tuple[ParameterMapping, ...] = (
    Direct(M + "mlp.linear_fc1.layer_norm_weight", (H + "post_attention_layernorm.weight",), ("hidden",)),
    Direct(M + "mlp.linear_fc1.weight", (H + "mlp.gate_up_proj.weight",), ("gated_ffn", "hidden"), 0),
    Direct(M + "mlp.linear_fc2.weight", (H + "mlp.down_proj.weight",), ("hidden", "ffn"), 1),
)
"""The gate's rows come first, as in Megatron's checkpoint."""
