"""Lock and Fork during training: positions with an almost certain next token, and positions with several futures.

After "Embarrassingly Simple Self-Distillation" (arXiv 2604.01193). At a fixed interval of steps, over the global batch:
the model's entropy and top-1 probability at each position, and the dispersion of the flow head's futures at the
anchors. Labels come from the trained model by fixed thresholds; `megatron-sfr diagnose` labels by a base model.

Shapes: B samples, S positions, A anchors, K sampled futures, D embedding dimension.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sfr.flow.solver import integrate
from megatron_sfr.model.flow_head import FlowHead
from megatron_sfr.objectives.sfr.target_scale import TargetOptions, unit_targets
from megatron_sfr.option_names import named
from megatron_sfr.runtime import noise
from megatron_sfr.runtime.parallel import sum_over_tensor
from megatron_sfr.training.auxiliary_loss import Anchors, StepSums

SEED, STREAM = 0, 5  # of the noise; the auxiliary loss uses streams 0 and 1
SAMPLES, STEPS = 8, 8  # K, and Euler steps from noise to a future


@named("sfr_", interval="sfr_lock_fork_interval")
@dataclass(frozen=True)
class LockForkOptions:
    """Which positions count as Locks and Forks, and how often they are measured."""

    interval: int = 0
    """Steps between measurements of Lock and Fork positions, whose shares and entropies are written to TensorBoard.
    Default 0: never."""
    lock_entropy: float = 0.1
    """Largest entropy of a Lock in nats. Default 0.1."""
    lock_top: float = 0.9
    """Smallest probability of a Lock's most likely token. Default 0.9."""
    fork_entropy: float = 1.0
    """Smallest entropy of a Fork in nats. Default 1."""
    fork_dispersion: float = 0.3
    """Smallest dispersion of a Fork's futures, the mean of 1 - cosine over pairs of the head's samples; not used
    without a flow head. Default 0.3."""

    def __post_init__(self) -> None:
        if self.interval < 0:
            raise ValueError(f"`interval` = {self.interval}: give at least 0")
        if not 0 <= self.lock_entropy < self.fork_entropy:
            raise ValueError("`lock_entropy` must be at least 0 and below `fork_entropy`")


class LockFork:
    """Sums over the microbatches of a measured step and writes the results to TensorBoard."""

    def __init__(self, options: LockForkOptions, targets: TargetOptions) -> None:
        self.options, self.targets, self.sums = options, targets, StepSums()

    def is_due(self, step: int) -> bool:
        interval = self.options.interval
        return interval > 0 and step % interval == 0

    def add(self, step: int, microbatches: int, sums: Tensor, writer: Any) -> None:
        """Adds `sums` of `at_positions` or `at_anchors`, equal on all tensor-parallel ranks. writer: TensorBoard's."""
        if (total := self.sums.add(step, microbatches, sums)) is None or writer is None:
            return
        n, locks, forks, entropy, lock_entropy, fork_entropy, dispersion = total.tolist()
        scalars = {"entropy": entropy / max(n, 1), "lock share": locks / max(n, 1), "fork share": forks / max(n, 1)}
        scalars |= {"lock entropy": lock_entropy / locks} if locks else {}
        scalars |= {"fork entropy": fork_entropy / forks} if forks else {}
        scalars |= {"future dispersion": dispersion / n} if dispersion else {}
        for name, value in scalars.items():
            writer.add_scalar(name, value, step + 1)

    def at_positions(self, entropy_BS: Tensor, top_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Sums over all supervised positions, for training without a head: Forks are defined by entropy alone.

        [count, Locks, Forks, entropy, entropy of Locks, entropy of Forks, dispersion].
        """
        return self._sums(entropy_BS, top_BS, mask_BS > 0, torch.zeros_like(entropy_BS), 0.0)

    @torch.no_grad()
    def at_anchors(
        self, head: FlowHead, h_BAH: Tensor, anchors: Anchors, entropy_BS: Tensor, top_BS: Tensor, *, split: bool
    ) -> Tensor:
        """The same sums over the anchors of the first horizon, with their futures' dispersion.

        split: whether the anchors are distributed over tensor-parallel ranks.
        """
        counted_BA = (anchors.weight_BA > 0) & (anchors.horizon_BA == 0)
        entropy_BA, top_BA = (x.gather(1, anchors.position_BA) for x in (entropy_BS, top_BS))
        wide_BA = self._dispersion(head, h_BAH, anchors)
        sums = self._sums(entropy_BA, top_BA, counted_BA, wide_BA, self.options.fork_dispersion)
        return sum_over_tensor(sums) if split else sums

    def _dispersion(self, head: FlowHead, h_BAH: Tensor, anchors: Anchors) -> Tensor:
        """Mean of 1 - cosine over the pairs of each anchor's K futures: [B, A]."""
        draw_K = torch.arange(SAMPLES, device=h_BAH.device)
        key, place = anchors.sample_BA[:, :, None], anchors.place_BA[:, :, None]
        x_0 = noise.normal(SEED, key, place, draw_K, head.dim, stream=STREAM)
        h = h_BAH[:, :, None]
        x_1 = integrate(lambda x, t: head(x, t, h, anchors.horizon_BA).float(), x_0, STEPS, "euler")
        unit = F.normalize(unit_targets(x_1, head.state.target_mean, head.state.target_std, self.targets), dim=-1)
        return 1 - (unit.sum(2).square().sum(-1) - SAMPLES) / (SAMPLES * (SAMPLES - 1))

    def _sums(self, entropy: Tensor, top: Tensor, counted: Tensor, dispersion: Tensor, wide: float) -> Tensor:
        o = self.options
        lock = counted & (entropy <= o.lock_entropy) & (top >= o.lock_top)
        fork = counted & (entropy >= o.fork_entropy) & (dispersion >= wide)
        columns = [counted, lock, fork, counted * entropy, lock * entropy, fork * entropy, counted * dispersion]
        return torch.stack([column.double().sum() for column in columns])
