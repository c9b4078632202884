"""Upstream's GPT as the denoiser of KL-flow (Logit-KL Flow Matching, arXiv 2411.16821), with bidirectional attention.

It takes points of the simplex and their time, and returns logits of the clean tokens.

Shapes: B samples, S positions of the text, V vocabulary columns of the shard, H hidden size, F numbers of a time.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.utils import get_attr_wrapped_model, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.model.builder import GPTModelBuilder, GPTModelConfig, default_layer_spec
from megatron_sfr.model.gradient_fusion import fuse_layers
from megatron_sfr.model.local_spec import local_block_spec, local_norm
from megatron_sfr.model.velocity import sinusoids
from megatron_sfr.option_names import named

TIME_NUMBERS = 256
Way = Literal["token", "adaln"]


@named("kl_flow_")
@dataclass(frozen=True)
class KLFlowModelOptions:
    """How the denoiser of KL-flow is conditioned on the time."""

    time: Way = "token"
    """'token' (default): an embedding of t precedes the text, as in the paper's code, and takes one of the seq_length
    positions. 'adaln': t scales and shifts the output of each layer's norms, and the text has all positions."""
    time_scale: float = 1000.0
    """Factor on t before its sinusoidal embedding of base 10000. Default 1000. With 1, as in the authors' code, the
    embeddings of all times up to t_max = 0.3 are almost equal."""

    def __post_init__(self) -> None:
        if self.time_scale <= 0:
            raise ValueError(f"`time_scale` = {self.time_scale}: choose a factor above 0")


@dataclass(kw_only=True)
class KLFlowModelConfig(GPTModelConfig):
    """The configuration of the denoiser."""

    builder: ClassVar[str] = "megatron_sfr.kl_flow.model.KLFlowModelBuilder"
    time: Way = "token"
    time_scale: float = 1000.0
    seed: int = 1234
    """Seed of the initial weights of the time embedding."""
    fuses_layers: bool = False
    """Gradient accumulation is fused in Transformer Engine's layers only (model/gradient_fusion.py)."""


@dataclass
class FlowTime:
    """The time of the model's next call. Every pipeline stage sets it itself; it is not sent between stages.

    A recomputed layer would read the time of a later microbatch. The embedding is never recomputed, so 'token' works
    with recomputation; with 'adaln' the norms must not be recomputed.
    """

    way: Way
    scale: float = 1000.0
    wave_BF: Tensor | None = None

    @property
    def positions(self) -> int:
        """Number of positions before the text that the time takes: 1 for 'token', else 0."""
        return 1 if self.way == "token" else 0

    def set(self, t_B: Tensor) -> None:
        """t in [0, 1) of each sample, fp32."""
        self.wave_BF = sinusoids(t_B[:, None], TIME_NUMBERS, self.scale)

    def read(self, dtype: torch.dtype) -> Tensor:
        """The time's sines and cosines [B, F]."""
        assert self.wave_BF is not None, "set_time comes before the model's call"
        return self.wave_BF.to(dtype)


class SimplexTable(nn.Module):
    """x E of points x [B, S, V] with this rank's rows of the embedding matrix E: [S, B, H], to be summed over ranks.

    The weight has upstream's name, for tying, checkpoints and hooks.
    """

    def __init__(self, table: VocabParallelEmbedding) -> None:
        super().__init__()
        self.weight, self.tp_group = table.weight, table.tp_group

    def forward(self, x_BSV: Tensor) -> Tensor:
        return x_BSV.to(self.weight.dtype).transpose(0, 1) @ self.weight

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """As of VocabParallelEmbedding: the padding of the vocabulary may differ between layouts."""
        sharded = make_tp_sharded_tensor_for_checkpoint(
            tensor=self.weight,
            key=f"{prefix}weight",
            allow_shape_mismatch=True,
            prepend_offsets=sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return {f"{prefix}weight": sharded}


class SimplexEmbedding(MegatronModule):
    """Replaces upstream's `embedding`: from points [B, S, V] to the decoder's input [S (+ 1) (/ TP), B, H]."""

    scatter_to_sequence_parallel = True

    def __init__(self, config: TransformerConfig, table: VocabParallelEmbedding, time: FlowTime, seed: int) -> None:
        super().__init__(config)
        self.word_embeddings, self.time = SimplexTable(table), time
        self.dropout = nn.Dropout(config.hidden_dropout)
        if time.way == "token":
            H, std, generator = config.hidden_size, config.init_method_std, torch.Generator().manual_seed(seed)
            self.time_in, self.time_out = nn.Linear(TIME_NUMBERS, H), nn.Linear(H, H)
            for layer in (self.time_in, self.time_out):
                nn.init.normal_(layer.weight, std=std, generator=generator)
                nn.init.zeros_(layer.bias)
                for p in layer.parameters():  # the token lies in one rank's slice: sum over all
                    p.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input_ids: Tensor, position_ids: None = None) -> Tensor:
        """Upstream's names: input_ids are the points; positions enter by the rotary embedding."""
        group, h = self.word_embeddings.tp_group, self.word_embeddings(input_ids)
        if self.config.fp32_residual_connection:
            h = h.float()
        if not self.config.sequence_parallel:
            h = reduce_from_tensor_model_parallel_region(h, group=group)
            return self.dropout(self._with_time(h))
        # One rank adds the time to its part of the sums; the others' factor of 0 keeps their gradient, which is 0.
        h = self._with_time(h, factor=float(group.rank() == 0))
        with get_cuda_rng_tracker().fork():
            return self.dropout(reduce_scatter_to_sequence_parallel_region(h.contiguous(), group=group))

    def _with_time(self, text_SBH: Tensor, factor: float = 1.0) -> Tensor:
        if self.time.way == "adaln":
            return text_SBH
        wave_BF = self.time.read(self.time_in.weight.dtype)
        token_BH = self.time_out(F.silu(self.time_in(wave_BF))).to(text_SBH.dtype)
        return torch.cat([factor * token_BH[None], text_SBH])


class ModulatedNorm(nn.Module):
    """Adaptive norm (DiT, arXiv 2212.09748) of x [S, B, H]: (1 + scale(t)) norm(x) + shift(t), both 0 at first."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm, self.modulation = local_norm(config, hidden_size, eps), nn.Linear(TIME_NUMBERS, 2 * hidden_size)
        self.time: FlowTime | None = None
        for p in self.modulation.parameters():  # under sequence parallelism a rank has some of the positions
            nn.init.zeros_(p)
            p.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_SBH: Tensor) -> Tensor:
        assert self.time is not None
        scale_BH, shift_BH = self.modulation(self.time.read(self.modulation.weight.dtype)).chunk(2, dim=-1)
        return self.norm(x_SBH) * (1 + scale_BH) + shift_BH


def bidirectional_spec(config: KLFlowModelConfig, vp_stage: int | None = None) -> Any:
    """Upstream's layers, local or Transformer Engine's, with bidirectional attention."""
    if config.transformer.transformer_impl == "local":
        spec = local_block_spec(config, vp_stage)
        layers = spec.layer_specs
    else:
        spec = default_layer_spec(config, vp_stage)
        layers = spec.layer_specs if isinstance(spec, TransformerBlockSubmodules) else [spec]
    for layer in layers:
        attention = layer.submodules.self_attention
        attention.params = {**attention.params, "attn_mask_type": AttnMaskType.no_mask}
        if config.time == "adaln":
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = ModulatedNorm
    return spec


class KLFlowModelBuilder(GPTModelBuilder):
    """Builds upstream's model with an embedding of points. `model.flow_time` holds the time of the next call."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> MegatronModule:
        """One pipeline stage; arguments as upstream's. Raises ValueError if the positions are not rotary."""
        config: KLFlowModelConfig = self._model_config
        if config.position_embedding_type != "rope":
            raise ValueError(
                f"position_embedding_type = {config.position_embedding_type}: bidirectional attention learns order "
                "from rotary positions alone; set it to rope"
            )
        config.transformer_layer_spec = bidirectional_spec
        model = super().build_model(pg_collection, pre_process, post_process, vp_stage)
        if config.fuses_layers:
            fuse_layers(model)
        model.flow_time = FlowTime(config.time, config.time_scale)
        if model.pre_process:
            table = model.embedding.word_embeddings
            model.embedding = SimplexEmbedding(config.transformer, table, model.flow_time, config.seed)
        for module in model.modules():
            if isinstance(module, ModulatedNorm):
                module.time = model.flow_time
        return model


def set_time(model: nn.Module, t_B: Tensor) -> None:
    """Sets the time of the next call of a pipeline stage, which may be wrapped."""
    get_attr_wrapped_model(model, "flow_time").set(t_B)


def time_positions(model: nn.Module) -> int:
    """How many positions before the text the time takes: 1 for a time token, else 0."""
    return get_attr_wrapped_model(model, "flow_time").positions


def denoise(model: nn.Module, x_BSV: Tensor, t_B: Tensor, vocab: Vocab) -> Tensor:
    """Logits [B, S, V] of the clean tokens, of this shard, by a model of one pipeline stage; padding columns are -inf.

    Args: x_BSV: the shard of the points, 0 in padding columns. t_B: time in [0, 1), fp32.
    """
    set_time(model, t_B)
    z_BSV = model(input_ids=x_BSV, position_ids=None, attention_mask=None)[:, time_positions(model) :]
    width = vocab.real(z_BSV[0]).shape[-1]
    return F.pad(z_BSV[..., :width], (0, z_BSV.shape[-1] - width), value=-torch.inf)
