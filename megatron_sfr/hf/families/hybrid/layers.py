"""Shared by families whose layers differ: their kinds, by Megatron's symbols, and the weights of a Mamba-2 layer.

HybridModel numbers its layers across kinds, and its checkpoints keep each layer under its number. Of a Mamba layer,
`MambaMixer.sharded_state_dict` (megatron-core 0.19.2) saves the input projection in five tensors and the convolution's
weight and bias in three each, because tensor parallelism splits each of these separately.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_sfr.hf.families import dense
from megatron_sfr.hf.families.dense import M
from megatron_sfr.hf.mappings import LAYER, QKV, Dimensions, Direct

MAMBA, ATTENTION, MLP, EXPERTS = "M", "*", "-", "E"
"""Kinds of layers, as in `hybrid_layer_pattern`."""
NORM = "decoder.final_norm"
Records = tuple[Direct | QKV, ...]


@dataclass(frozen=True)
class HybridDimensions(Dimensions):
    """Sizes of a model with Mamba-2 layers."""

    mamba_heads: int = 1
    mamba_head_dim: int = 1
    mamba_groups: int = 1
    """Groups of heads that share B and C."""
    state: int = 1
    kernel: int = 4
    """Width of the convolution."""

    @property
    def mamba_inner(self) -> int:
        """Rows of z, and of x."""
        return self.mamba_heads * self.mamba_head_dim

    @property
    def mamba_states(self) -> int:
        """Rows of B, and of C."""
        return self.mamba_groups * self.state

    @property
    def mamba_convolved(self) -> int:
        return self.mamba_inner + 2 * self.mamba_states

    @property
    def mamba_projected(self) -> int:
        return self.mamba_inner + self.mamba_convolved + self.mamba_heads


_XBC = ((".x", "mamba_inner"), (".B", "mamba_states"), (".C", "mamba_states"))
_ZXBCDT = ((".z", "mamba_inner"), *_XBC, (".dt", "mamba_heads"))


def mamba(norm: str, mixer: str) -> Records:
    """The weights of a Mamba-2 layer. norm, mixer: Hugging Face's name of its norm, and prefix of the others."""
    own, projection, filters = M + "mixer.", ("mamba_projected", "hidden"), ("mamba_convolved", "one", "kernel")
    return (
        Direct(own + "in_proj.layer_norm_weight", (norm,), ("hidden",)),
        Direct(own + "in_proj.weight", (mixer + "in_proj.weight",), projection, 0, divided=_ZXBCDT),
        Direct(own + "conv1d.weight", (mixer + "conv1d.weight",), filters, 0, divided=_XBC),
        Direct(own + "conv1d.bias", (mixer + "conv1d.bias",), ("mamba_convolved",), 0, divided=_XBC),
        Direct(own + "dt_bias", (mixer + "dt_bias",), ("mamba_heads",), 0),
        Direct(own + "A_log", (mixer + "A_log",), ("mamba_heads",), 0),
        Direct(own + "D", (mixer + "D",), ("mamba_heads",), 0),
        Direct(own + "norm.weight", (mixer + "norm.weight",), ("mamba_inner",), 0),
        Direct(own + "out_proj.weight", (mixer + "out_proj.weight",), ("hidden", "mamba_inner"), 1),
    )


MAMBA_STATES = (M + "mixer.in_proj", M + "mixer.out_proj")


def in_each_layer(pattern: str, records: Mapping[str, Records]) -> Records:
    """The mappings of all layers, with their numbers in the names. records: those of a layer of each kind."""
    return tuple(_at(x, i) for i, kind in enumerate(pattern) for x in records[kind])


def _at(x: Direct | QKV, layer: int) -> Direct | QKV:
    names: Any = tuple(_numbered(name, layer) for name in x.names)  # as many as before
    return replace(x, megatron=_numbered(x.megatron, layer), names=names)


def states(pattern: str, experts: tuple[str, ...]) -> tuple[str, ...]:
    """The modules with an extra state. experts: those of a layer of experts."""
    of_kind = {MAMBA: MAMBA_STATES, ATTENTION: dense.ATTENTION_STATES, MLP: dense.MLP_STATES, EXPERTS: experts}
    layers = (_numbered(module, i) for i, kind in enumerate(pattern) for module in of_kind[kind])
    return (*layers, NORM, "output_layer")


def _numbered(name: str, layer: int) -> str:
    return name.replace(LAYER, str(layer))
