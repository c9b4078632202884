"""The flow head: predicts the velocity of a future's embedding from its noised value, the time and the hidden state.

Replicated over tensor-parallel ranks, lives on the last pipeline stage only, and is dropped at inference.
Letters: B samples, A anchors, K noise draws, D dimension of the embedding, H of the hidden state, W width of the head.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

TIME_SCALE = 1000.0  # t in [0, 1] on a sinusoid of base 10000 would have almost no resolution


@dataclass(frozen=True)
class FlowHeadOptions:
    """Shape of the flow head."""

    sfr_target_dim: int | None = None
    """Dimension of the sentence embeddings; by default that of the target store."""
    sfr_head_width: int = 1024
    """Width of the head."""
    sfr_head_depth: int = 1
    """Residual blocks of the head."""

    def __post_init__(self) -> None:
        if self.sfr_head_width < 1 or self.sfr_head_depth < 0:
            raise ValueError(f"a head of width {self.sfr_head_width} and depth {self.sfr_head_depth} cannot be built")


class Measured(nn.Module):
    """What the gradient measurements have found, kept in the checkpoint so that a resumed run steers alike."""

    ratio: Tensor
    """Norm of SFR's gradient at h, at weight 1, over cross-entropy's; 0 before the first measurement."""
    signal: Tensor
    """Share of SFR's gradient power that does not average out over noise draws."""
    weight: Tensor
    """The steered weight, for sfr_weight_control = ratio."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        for name, value in (("ratio", 0.0), ("signal", 0.0), ("weight", weight)):
            self.register_buffer(name, torch.tensor([value]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Measured":
        # Float16Module casts every buffer of the model; these three are moved with it, and stay fp32.
        return super()._apply(lambda x: x.to(fn(x).device), recurse)


class ResidualBlock(nn.Module):
    """x + SiLU(LayerNorm(Linear(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.norm(self.linear(x)))


class FlowHead(MegatronModule):
    """concat(x_t, emb(t), h) -> Linear -> LayerNorm -> SiLU -> residual blocks -> zero-initialised Linear -> velocity.

    emb(t): D sines and cosines -> Linear(D, 4D) -> SiLU -> Linear(4D, D). The head of SFR's authors (arXiv 2605.27971)
    but for the time's scale. With fresh = True a checkpoint may lack the head: the one made here then stays.
    """

    def __init__(
        self, config: TransformerConfig, options: FlowHeadOptions, *, weight: float, seed: int, fresh: bool = False
    ) -> None:
        assert options.sfr_target_dim is not None, "the target dimension is resolved before the model is built"
        super().__init__(config)
        D, W = options.sfr_target_dim, options.sfr_head_width
        self.dim, self.fresh = D, fresh
        device = torch.get_default_device()
        with torch.device("meta"):  # made without numbers, so that the backbone's random stream is not touched
            self.time_in, self.time_out = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
            self.input, self.norm = nn.Linear(2 * D + config.hidden_size, W), nn.LayerNorm(W)
            self.blocks = nn.ModuleList(ResidualBlock(W) for _ in range(options.sfr_head_depth))
            self.output = nn.Linear(W, D)
        self.to_empty(device=device)
        self.measured = Measured(weight)
        self._initialise(seed)
        for p in self.parameters():  # under sequence parallelism each rank sees its own positions: sum over the ranks
            p.sequence_parallel = config.sequence_parallel
        self.register_load_state_dict_pre_hook(_keep_fresh)
        self.register_load_state_dict_post_hook(_loaded)

    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):  # torch's own default: U(-1/sqrt(fan_in), 1/sqrt(fan_in))
                bound = module.in_features**-0.5
                for p in (module.weight, module.bias):
                    with torch.no_grad():
                        p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """Velocity [B, A, K, D] from x_t [B, A, K, D], t [B, A, K, 1] in [0, 1] and h [B, A, 1, H].

        Products run in the weights' dtype (bf16 under --bf16); the caller keeps path and loss in fp32.
        """
        dtype = self.input.weight.dtype
        time = self.time_out(F.silu(self.time_in(self.embed_time(t).to(dtype))))
        # One Linear on the concatenation, computed by parts: h is projected once an anchor, not once a draw.
        w_x, w_t, w_h = self.input.weight.split([self.dim, self.dim, h.shape[-1]], dim=-1)
        x = F.linear(x_t.to(dtype), w_x, self.input.bias) + F.linear(time, w_t) + F.linear(h.to(dtype), w_h)
        x = F.silu(self.norm(x))
        for block in self.blocks:
            x = block(x)
        return self.output(x)

    def embed_time(self, t: Tensor) -> Tensor:
        """[..., 1] -> [..., D] in fp32: sines, then cosines, of 1000 t at frequencies from 1 to 1/10000."""
        half = (self.dim + 1) // 2
        frequency = torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device) / half)
        angle = t.float() * TIME_SCALE * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)[..., : self.dim]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """As upstream's; empty while the head is fresh, so that a checkpoint without a head can be read."""
        return {} if self.fresh else super().sharded_state_dict(prefix, sharded_offsets, metadata)


def _keep_fresh(head: FlowHead, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a load: a fresh head stands in for the entries that were not read."""
    if head.fresh:
        state.update({prefix + name: value.detach() for name, value in head.state_dict().items()})


def _loaded(head: FlowHead, _: Mapping[str, Any]) -> None:
    """After a load the head is like any other module: it is saved, and must be there to be loaded."""
    head.fresh = False
