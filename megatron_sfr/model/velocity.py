"""Velocity networks: an MLP on concatenated inputs, as in SFR's code, or residual blocks modulated by adaLN.

Every weight is used by calling its module, so that upstream's forward pre-hooks run before the weight is read.
Shapes: B samples, A anchors, K noise draws, D embedding dimension, H hidden size, W width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADALN_FREQUENCIES = 256


def sinusoids(t: Tensor, dim: int, scale: float, *, reach_last: bool = False) -> Tensor:
    """[..., 1] -> [..., dim]: n sines, then n cosines, of scale * t at frequencies 10000^(-k / n). At least fp32.

    The last feature of an odd dim is 0.

    Args:
        reach_last: divide k by n - 1, so that the last frequency is 1/10000 itself, as in SFR's code. With n, as in
            DiT's and KL-flow's code, it is one step short of that.
    """
    t, n = t.to(torch.promote_types(t.dtype, torch.float32)), dim // 2
    k = torch.arange(n, dtype=t.dtype, device=t.device)
    angle = t * scale * torch.exp(-math.log(10000.0) * k / (max(1, n - 1) if reach_last else n))
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=-1), (0, dim % 2))


class ResidualBlock(nn.Module):
    """x + SiLU(LayerNorm(Linear(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.norm(self.linear(x)))


class MLPVelocity(nn.Module):
    """concat(x_t, emb(t), h) -> Linear -> LayerNorm -> SiLU -> residual blocks -> Linear, as in SFR's public code.

    emb(t): D sines and cosines, to the frequency 1/10000 -> Linear(D, 4D) -> SiLU -> Linear(4D, D). The first Linear is
    split by input, so that h is projected once per anchor and not once per draw.
    """

    def __init__(self, D: int, H: int, W: int, depth: int, horizons: int, time_scale: float) -> None:
        super().__init__()
        self.dim, self.time_scale = D, time_scale
        self.time_in, self.time_out = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.input_x, self.input_t = nn.Linear(D, W), nn.Linear(D, W, bias=False)
        self.input_h = nn.Linear(H, W, bias=False)
        self.horizon = nn.Embedding(horizons, W) if horizons > 1 else None
        self.norm = nn.LayerNorm(W)
        self.blocks = nn.ModuleList(ResidualBlock(W) for _ in range(depth))
        self.output = nn.Linear(W, D)

    def initialize(self, generator: torch.Generator) -> None:
        """torch's defaults, with the first Linear treated as one of 2D + H inputs and the last one zero."""
        inputs = (self.input_x, self.input_t, self.input_h)
        fan_in = sum(part.in_features for part in inputs)
        _initialize(self, generator, fan_in=dict.fromkeys(inputs, fan_in), zero=(self.output,))

    def forward(self, x_t: Tensor, t: Tensor, h: Tensor, horizon_BA: Tensor) -> Tensor:
        """Velocity [B, A, K, D] from x_t [B, A, K, D], t [B, A, K, 1] in [0, 1] and h [B, A, 1, H]."""
        wave = sinusoids(t, self.dim, self.time_scale, reach_last=True)
        time = self.time_out(F.silu(self.time_in(wave)))
        x = self.input_x(x_t) + self.input_t(time) + self.input_h(h)
        if self.horizon is not None:
            x = x + self.horizon(horizon_BA)[:, :, None]
        x = F.silu(self.norm(x))
        for block in self.blocks:
            x = block(x)
        return self.output(x)


class ModulatedBlock(nn.Module):
    """x + gate MLP((1 + scale) LN(x) + shift), with shift, scale and gate from the condition; initially x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.rise, self.fall = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return x + gate * self.fall(F.silu(self.rise((1 + scale) * self.norm(x) + shift)))


class AdaLNVelocity(nn.Module):
    """x_t -> Linear -> blocks modulated by emb(t) + Linear(h) -> modulated LayerNorm -> Linear.

    MAR's diffusion head (arXiv 2406.11838; adaLN-Zero of DiT, arXiv 2212.09748): modulations and the last Linear are
    initialized to zero. emb(t): 256 sines and cosines -> Linear -> SiLU -> Linear.
    """

    def __init__(self, D: int, H: int, W: int, depth: int, horizons: int, time_scale: float) -> None:
        super().__init__()
        self.time_scale = time_scale
        self.time_in, self.time_out = nn.Linear(ADALN_FREQUENCIES, W), nn.Linear(W, W)
        self.input_x, self.input_h = nn.Linear(D, W), nn.Linear(H, W)
        self.horizon = nn.Embedding(horizons, W) if horizons > 1 else None
        self.blocks = nn.ModuleList(ModulatedBlock(W) for _ in range(depth))
        self.norm = nn.LayerNorm(W, elementwise_affine=False)
        self.modulation = nn.Linear(W, 2 * W)
        self.output = nn.Linear(W, D)

    def initialize(self, generator: torch.Generator) -> None:
        """torch's defaults, with every modulation and the last Linear zero."""
        modulations = [block.modulation for block in self.blocks if isinstance(block, ModulatedBlock)]
        _initialize(self, generator, fan_in={}, zero=(*modulations, self.modulation, self.output))

    def forward(self, x_t: Tensor, t: Tensor, h: Tensor, horizon_BA: Tensor) -> Tensor:
        """See MLPVelocity.forward."""
        time = self.time_out(F.silu(self.time_in(sinusoids(t, ADALN_FREQUENCIES, self.time_scale))))
        condition = time + self.input_h(h)
        if self.horizon is not None:
            condition = condition + self.horizon(horizon_BA)[:, :, None]
        condition = F.silu(condition)
        x = self.input_x(x_t)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return self.output((1 + scale) * self.norm(x) + shift)


def _initialize(
    net: nn.Module, generator: torch.Generator, *, fan_in: dict[nn.Linear, int], zero: tuple[nn.Linear, ...]
) -> None:
    """torch's defaults, drawn on the CPU: U(-1/sqrt(fan_in), 1/sqrt(fan_in)). Embeddings have std 0.02."""
    for module in net.modules():
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            with torch.no_grad():
                module.weight.copy_(0.02 * torch.randn(module.weight.shape, generator=generator))
        elif isinstance(module, nn.Linear):
            bound = fan_in.get(module, module.in_features) ** -0.5
            for p in module.parameters(recurse=False):
                with torch.no_grad():
                    p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
    for module in zero:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)


VELOCITIES: dict[str, type[MLPVelocity] | type[AdaLNVelocity]] = {"mlp": MLPVelocity, "adaln": AdaLNVelocity}
