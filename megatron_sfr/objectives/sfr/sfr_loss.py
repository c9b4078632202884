"""Semantic Flow Regularization (arXiv 2605.27971): a stochastic head models embeddings of the text that follows.

Shapes: B samples, A anchors per sample, K noise draws, D embedding dimension, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_sfr.flow.path import interpolate
from megatron_sfr.objectives.sfr.ablations import cosine_error, linear_cka_error
from megatron_sfr.option_names import named
from megatron_sfr.runtime import noise

SOURCE_STREAM, TIME_STREAM = 0, 1
HORIZON_BITS = 24  # positions are below 2^24; the bits above hold the horizon
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


@named("sfr_")
@dataclass(frozen=True)
class SFROptions:
    """SFR's auxiliary loss.

    Example:
        >>> import megatron_sfr as sfr
        >>> sfr.SFROptions(time="logit_normal", draws=4).loss
        'flow'
    """

    loss: Literal["flow", "mse", "cosine", "cka"] = "flow"
    """'flow' (default): flow matching, the method. The others are the paper's deterministic ablations. 'mse': squared
    error between the embedding and the head's output at x_t = 0, t = 0 (flow with source and time zero). 'cosine':
    cosine distance between the same two. 'cka': linear CKA between hidden states and embeddings over the anchors of
    each sample, at least 4 (the authors: over a batch)."""
    source: Literal["normal", "zero"] = "normal"
    """Source x_0 of the flow. 'normal' (default): N(0, I). 'zero': 0, which requires sfr_time = zero, because at t > 0
    it leaks the target, x_1 = x_t / t."""
    time: Literal["uniform", "logit_normal", "zero"] = "uniform"
    """Distribution of t. 'uniform' (default): U(0, 1), as in the authors' code. 'logit_normal': sigmoid(N(0, 1)), as in
    Stable Diffusion 3 (arXiv 2403.03206). 'zero': 0."""
    time_per: Literal["anchor", "sequence"] = "anchor"
    """Whether each anchor draws its own t (default), or all anchors of a sequence share one, as in the authors'
    code."""
    draws: int = 4
    """Noise draws (x_0, t) per anchor and step; their losses are averaged. Default 4, as in MAR (arXiv 2406.11838); the
    authors' code uses 1."""
    mean: Literal["tokens", "microbatch"] = "tokens"
    """How SFR's weighted sum becomes a mean. 'tokens' (default): the position weights of a reply sum to its number of
    supervised tokens, and the tokens of the global batch divide, so that no parallel layout changes the mean.
    'microbatch': the sum over a microbatch is divided by the sum of its weights, (N - j) / N each, as in the authors'
    code; the mean then depends on how the batch is split."""
    noise_seed: int = 1234
    """Seed of the noise, which depends only on (seed, sample, anchor, draw). Default 1234."""

    def __post_init__(self) -> None:
        if not 1 <= self.draws <= 1024:
            raise ValueError(f"`draws` = {self.draws}: choose 1 to 1024")
        if self.source == "zero" and self.time != "zero" and self.loss == "flow":
            raise ValueError(
                f"`source` = zero with `time` = {self.time} leaks the target (x_1 = x_t / t): "
                "set `time` to zero, or `source` to normal"
            )

    @property
    def stochastic(self) -> bool:
        """Whether the loss uses noise."""
        return self.loss == "flow" and (self.source == "normal" or self.time != "zero")


def position_weights(ordinal: np.ndarray, length: np.ndarray) -> np.ndarray:
    """(N - j) / N, the paper's w_t = (N - pos_t + 1) / N with pos = j + 1; float64 [A]."""
    weights: np.ndarray = (length - ordinal) / np.maximum(length, 1)
    return weights


def anchor_weights(ordinal: np.ndarray, length: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Weights of one sample's anchors: `position_weights`, scaled to sum to N over each response.

    N is the response's number of supervised tokens, so dividing the sum over the global batch by its supervised tokens
    gives SFR's mean on any parallel layout. A response without anchors has weight 0.

    Args:
        ordinal: j, the 0-based index of the predicted token in its response; int [A].
        length: N; int [A].
        response: index of the response in the sample; int [A].
    Returns:
        float32 [A].
    Raises:
        ValueError: the arrays have different shapes.
    Example:
        >>> import numpy as np, megatron_sfr as sfr
        >>> ordinal, length = np.array([0, 32, 64]), np.full(3, 80)  # anchors of a reply of 80 tokens
        >>> sfr.anchor_weights(ordinal, length, np.zeros(3, np.int64)).tolist()
        [44.44444274902344, 26.66666603088379, 8.88888931274414]
    """
    if not ordinal.shape == length.shape == response.shape == (len(ordinal),):
        shapes = ", ".join(str(x.shape) for x in (ordinal, length, response))
        raise ValueError(f"ordinal, length and response have shapes {shapes}: give [A] each")
    raw = position_weights(ordinal, length)
    total = np.zeros(int(response.max(initial=-1)) + 1)
    np.add.at(total, response, raw)
    return (raw * length / total[response]).astype(np.float32)


def mean_over_microbatch(weight_BA: Tensor, total_weight: Tensor, tokens: Tensor) -> Tensor:
    """Weights for sfr_mean = microbatch: sum w l / max(1, sum w) times the microbatch's supervised tokens.

    The training loop divides by the tokens of the global batch, so a batch of one microbatch has the authors' mean.

    Args:
        weight_BA: raw weights of this rank's anchors.
        total_weight: sum of the weights of all anchors of the microbatch.
        tokens: number of its supervised tokens.
    """
    return weight_BA * tokens / total_weight.clamp(min=1)


def draw_noise(
    sample_BA: Tensor, position_BA: Tensor, horizon_BA: Tensor, dim: int, first_draw: int, options: SFROptions
) -> tuple[Tensor, Tensor]:
    """Source points x_0 [B, A, K, D] and times t [B, A, K, 1] in fp32. Stateless: the same keys give the same numbers.

    Args:
        sample_BA: number of the anchor's conversation in the run, int64.
        position_BA: token position of the anchor in that conversation, int64.
        horizon_BA: horizon of the anchor, int64.
        first_draw: index of the first of the K draws; another value gives an independent set.
    """
    if not options.stochastic:  # one deterministic pair, at the start of the path
        start_BA1 = torch.zeros(*position_BA.shape, 1, dtype=torch.float32, device=position_BA.device)
        return start_BA1[..., None].expand(-1, -1, -1, dim), start_BA1[..., None]
    draw_K = torch.arange(first_draw, first_draw + options.draws, device=sample_BA.device)
    sample, position = sample_BA[:, :, None], (position_BA + (horizon_BA << HORIZON_BITS))[:, :, None]
    seed = options.noise_seed
    x_0 = noise.normal(seed, sample, position, draw_K, dim, stream=SOURCE_STREAM)
    if options.time == "zero":
        return x_0, torch.zeros_like(x_0[..., :1])
    position = position if options.time_per == "anchor" else torch.zeros_like(position)
    t = noise.uniform(seed, sample, position, draw_K, stream=TIME_STREAM)
    if options.time == "logit_normal":
        t = torch.special.ndtri(t).sigmoid()
    return x_0, t[..., None]


def flow_matching_error(velocity: Velocity, h_BAH: Tensor, x_1_BAD: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
    """mean_d (v(x_t, t, h) - (x_1 - x_0))^2 of each anchor and draw [B, A, K], in the dtype of the noise (fp32).

    A head that predicts 0 has the loss E|x_1 - x_0|^2 / D: 1 + 1/D for unit-length targets, 2 for sqrt_d. The optimum
    is v* = E[x_1 - x_0 | x_t, h]: a stochastic x_0 makes the head model the distribution of futures, not their mean.

    Args:
        velocity: (x_t [B, A, K, D], t [B, A, K, 1], h [B, A, 1, H]) -> [B, A, K, D].
        x_0, t: noise from `draw_noise`.
    """
    x_t, v = interpolate(x_0, x_1_BAD[:, :, None], t)
    return (velocity(x_t, t, h_BAH[:, :, None]).to(v.dtype) - v).square().mean(-1)


def anchor_errors(
    velocity: Velocity | None,
    h_BAH: Tensor,
    x_1_BAD: Tensor,
    weight_BA: Tensor,
    x_0: Tensor,
    t: Tensor,
    options: SFROptions,
) -> tuple[Tensor, Tensor]:
    """Errors [B, A, K] and their weights [B, A, 1] for options.loss; padding has weight 0.

    cka has one error per sample, [B, 1, 1], and no velocity network: only there may `velocity` be None.
    """
    if options.loss == "cka":
        return linear_cka_error(h_BAH, x_1_BAD, weight_BA)
    assert velocity is not None
    if options.loss == "cosine":
        answer = velocity(x_0, t, h_BAH[:, :, None]).to(x_1_BAD.dtype)
        return cosine_error(answer, x_1_BAD[:, :, None]), weight_BA[..., None]
    return flow_matching_error(velocity, h_BAH, x_1_BAD, x_0, t), weight_BA[..., None]


def weighted_sum(error_BAK: Tensor, weight_BA1: Tensor) -> Tensor:
    """sum_a w_a mean_k error: a scalar."""
    return (weight_BA1 * error_BAK).sum() / error_BAK.shape[-1]


def flow_matching_loss(
    velocity: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    samples: Tensor,
    positions: Tensor,
    horizons: Tensor | None = None,
    options: SFROptions | None = None,
    *,
    first_draw: int = 0,
) -> Tensor:
    """SFR's loss of each anchor (arXiv 2605.27971), for a training loop of your own.

    A head that predicts 0 has a loss of about 2 for targets of length sqrt(D). The noise is a function of its keys, so
    the result does not depend on the batch or the parallel layout; use new sample numbers in each epoch.

    Args:
        velocity: a `FlowHead`, or any function of x_t [B, A, K, D], t [B, A, K, 1] in [0, 1], h [B, A, 1, H] and
            horizons [B, A] that returns velocities [B, A, K, D].
        hidden: hidden states of the backbone at the anchors, [B, A, H]. Detach them to train only the head.
        targets: embeddings of the text that follows each anchor, at the flow's scale: unit length times sqrt(D) by
            default in training (`scale_targets`). fp32, [B, A, D].
        samples: number of each anchor's sample in the run, int64 [B, A] or [B, 1]. A key of the noise.
        positions: token position of each anchor in its sample, int64 [B, A]. A key of the noise.
        horizons: index of each anchor's horizon, int64 [B, A]. Default: 0.
        options: the kind of loss, the source and the times. Default: flow matching with 4 draws per anchor.
        first_draw: index of the first draw; another value gives independent noise.

    Returns:
        The loss of each anchor, averaged over noise draws: fp32 [B, A]. Weight it by `anchor_weights`, and 0 for
        padding.

    Raises:
        ValueError: shapes or dtypes do not fit, or options.loss is cka, which has no loss of one anchor.

    Example:
        >>> import torch, megatron_sfr as sfr
        >>> def velocity(x_t, t, h, horizons):
        ...     return torch.zeros_like(x_t)  # a new head
        >>> B, A, H, D = 2, 3, 8, 4
        >>> targets = D**0.5 * torch.nn.functional.normalize(torch.ones(B, A, D), dim=-1)
        >>> samples, positions = torch.arange(B)[:, None], torch.arange(A).expand(B, A)
        >>> loss = sfr.flow_matching_loss(velocity, torch.zeros(B, A, H), targets, samples, positions)
        >>> loss.shape
        torch.Size([2, 3])
    """
    options = SFROptions() if options is None else options
    if options.loss == "cka":
        raise ValueError("loss = cka compares all anchors of a sample and has no loss of one anchor")
    horizon_BA = torch.zeros_like(positions) if horizons is None else horizons
    _check_anchors(hidden, targets, samples, positions, horizon_BA)
    sample_BA = samples.expand_as(positions)
    x_0, t = draw_noise(sample_BA, positions, horizon_BA, targets.shape[-1], first_draw, options)

    def at_horizons(x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        return velocity(x_t, t, h, horizon_BA)

    weight_BA = torch.ones_like(positions, dtype=x_0.dtype)
    error_BAK, _ = anchor_errors(at_horizons, hidden, targets, weight_BA, x_0, t, options)
    return error_BAK.mean(-1)


def _check_anchors(hidden: Tensor, targets: Tensor, samples: Tensor, positions: Tensor, horizons: Tensor) -> None:
    anchors = tuple(positions.shape)
    same = hidden.shape[:-1] == targets.shape[:-1] == horizons.shape == positions.shape
    keyed = len(anchors) == 2 and tuple(samples.shape) in (anchors, (*anchors[:1], 1))
    if not (same and keyed) or {samples.dtype, positions.dtype, horizons.dtype} != {torch.int64}:
        given = {"hidden": hidden, "targets": targets, "samples": samples, "positions": positions, "horizons": horizons}
        shapes = ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in given.items())
        raise ValueError(
            f"{shapes} do not fit: give [B, A, H], [B, A, D] and int64 [B, A], for samples also [B, 1]".replace(
                "torch.", ""
            )
        )
