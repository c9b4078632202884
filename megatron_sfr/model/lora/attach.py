"""Freezes a model and attaches adapters to its linear layers; the model is then saved and loaded without its base.

The adapted layers stay the objects that upstream has built: like torch's FSDP 2, `attach` changes their class to a
subclass, so that no name of a parameter changes. This module and its folder are all that knows how LoRA is computed.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_pg_size
from torch import Tensor, nn

from megatron_sfr.model.lora.adapter import AdaptedLayer, Adapter
from megatron_sfr.model.lora.options import ADAPTER, KINDS, LoRAOptions
from megatron_sfr.runtime.parallel import union_over_stages

HEAD = "flow_head."
"""Start of the names of the flow head's parameters, which are trained and saved too."""
COLUMN: tuple[type, ...] = (ColumnParallelLinear, *((te.TEColumnParallelLinear,) if te.HAVE_TE else ()))
ROW: tuple[type, ...] = (RowParallelLinear, *((te.TERowParallelLinear,) if te.HAVE_TE else ()))
FUSED_NORM: tuple[type, ...] = (te.TELayerNormColumnParallelLinear,) if te.HAVE_TE else ()
"""Transformer Engine's norm and column-parallel layer in one. Adapters of its layers have not run yet: no GPU here."""


def attach_adapters(options: LoRAOptions, seed: int) -> Callable[[list[MegatronModule]], list[MegatronModule]]:
    """Returns a hook for a rank's model chunks, after the base weights are in them and before DDP wraps them.

    Frozen parameters have no gradient, so DDP and the optimizer hold nothing for them.

    Args:
        options: with a rank.
        seed: of the adapters' initial weights.
    Raises:
        ValueError: by the hook, where a target matches no layer, or a layer cannot be adapted.
    """

    def attach(chunks: list[MegatronModule]) -> list[MegatronModule]:
        names: set[str] = set()
        for chunk in chunks:
            for name, p in chunk.named_parameters():
                if not name.startswith(HEAD):
                    p.requires_grad_(False)
            names |= _adapt(chunk, options, seed)
            if chunk.pre_process and chunk.config.recompute_granularity is not None:
                chunk.embedding.register_forward_hook(_require_grad)
            chunk.__class__ = _without_base(chunk.__class__)
            chunk.register_load_state_dict_pre_hook(_keep_base)
        _check_targets(options, union_over_stages(names))
        if not any(p.requires_grad for chunk in chunks for p in chunk.parameters()):
            raise ValueError(
                "lora_targets match no layer of a pipeline stage: name layers that every stage has, and give every "
                "stage at least one decoder layer"
            )
        return chunks

    return attach


def _adapt(chunk: MegatronModule, options: LoRAOptions, seed: int) -> set[str]:
    """Adapts the layers of a chunk that the options name. Returns the names of all that can be adapted."""
    names: set[str] = set()
    for block in chunk.decoder.layers:
        for path, linear in _linears(block):
            name = re.sub(r"local_experts\.\d+\.", "", path)
            names.add(name)
            if options.adapts(name):
                expert = _expert_number(block, path)
                origin = f"{seed}/{block.layer_number}/{name}/{expert}"
                linear.adapter = Adapter(options, _split(linear, name, chunk.config), linear.weight, origin)
                if issubclass(linear.__class__, FUSED_NORM):
                    linear.return_layernorm_output = True
                linear.__class__ = _with_adapter(linear.__class__)
    return names


def _check_targets(options: LoRAOptions, names: set[str]) -> None:
    """Raises ValueError for a target that matches none of the model's layers, given by name."""
    if unknown := [p for p in options.patterns if not any(map(LoRAOptions(targets=p).adapts, names))]:
        raise ValueError(f"lora_targets: {unknown[0]} matches none of this model's layers: {', '.join(sorted(names))}")


def _linears(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """The linear layers of a decoder layer that can be adapted, with their names."""
    for path, module in block.named_modules():
        if path.rpartition(".")[2] in KINDS.values():
            if not isinstance(module, (*COLUMN, *ROW, *FUSED_NORM)):
                raise ValueError(
                    f"LoRA cannot adapt {path}, a {type(module).__name__}: of experts it adapts sequential ones (leave "
                    "moe_grouped_gemm out), or name other layers as lora_targets"
                )
            yield path, module


def _expert_number(block: nn.Module, path: str) -> int | None:
    """The number of an expert among those of all ranks; None for other layers."""
    if (found := re.fullmatch(r"(.*)\.local_experts\.(\d+)\..*", path)) is None:
        return None
    experts: Any = block.get_submodule(found[1])
    return int(experts.ep_group.rank() * experts.num_local_experts + int(found[2]))


def _split(linear: Any, name: str, config: TransformerConfig) -> AdaptedLayer:
    """How a layer is split over its group, and its output into parts."""
    group = linear._tp_group if hasattr(linear, "_tp_group") else linear.tp_group  # the first: Transformer Engine's
    rows = [len(linear.weight)]
    if name.endswith(KINDS["qkv"]):
        groups = config.num_query_groups
        queries = config.num_attention_heads // groups
        rows = [queries * config.kv_channels, config.kv_channels, config.kv_channels]
    elif name.endswith(KINDS["fc1"]) and config.gated_linear_unit:
        rows = [len(linear.weight) // 2] * 2
    return AdaptedLayer(
        column=isinstance(linear, (*COLUMN, *FUSED_NORM)),
        rows=tuple(rows),
        group=group,
        sequence_parallel=config.sequence_parallel and get_pg_size(group) > 1,
        expert=name.startswith("mlp.experts."),
    )


class _WithAdapter(nn.Module):
    """Mixin in front of a linear layer's class: adds the adapter's output, and its entries in checkpoints."""

    adapter: Adapter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        y, bias = super().forward(x, *args, **kwargs)
        return y + self.adapter(x), bias

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        entries = super().sharded_state_dict(prefix, *args, **kwargs)  # type: ignore[misc]
        return {**entries, **self.adapter.sharded_state_dict(f"{prefix}adapter.", *args, **kwargs)}


class _WithAdapterAfterNorm(_WithAdapter):
    """For a layer that normalizes its input first: the adapter reads the normalized input.

    Transformer Engine returns it with return_layernorm_output: (y, norm), or (y, bias, norm) if it returns the bias;
    Megatron's layer appends None for a bias that it does not have.
    """

    te_return_bias: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        result = super(_WithAdapter, self).forward(x, *args, **kwargs)
        y, bias, normed = result if self.te_return_bias else (result[0][0], None, result[0][1])
        return y + self.adapter(normed), bias


class _WithoutBase(nn.Module):
    """Mixin in front of a model's class: its checkpoints hold adapters and flow head, not the frozen base."""

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        entries = super().sharded_state_dict(*args, **kwargs)  # type: ignore[misc]
        return {key: x for key, x in entries.items() if _is_saved(key)}


@functools.cache
def _with_adapter(layer: type) -> type:
    mixin = _WithAdapterAfterNorm if issubclass(layer, FUSED_NORM) else _WithAdapter
    return type(f"LoRA{layer.__name__}", (mixin, layer), {})


@functools.cache
def _without_base(model: type) -> type:
    return type(f"LoRA{model.__name__}", (_WithoutBase, model), {})


def _is_saved(key: str) -> bool:
    return key.startswith(HEAD) or ADAPTER in key


def _keep_base(chunk: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load pre-hook: adds the values of the base, which the checkpoint lacks."""
    state.update({prefix + key: x for key, x in chunk.state_dict().items() if not _is_saved(key)})


def _require_grad(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    """Forward hook of a frozen embedding: upstream's recomputation has no gradient for a layer without an input
    that requires one."""
    return output.requires_grad_() if torch.is_grad_enabled() else output
