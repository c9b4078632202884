"""The input of KL-flow's denoiser (Logit-KL Flow Matching, arXiv 2411.16821): which tokens of a text are free, and the
point of the simplex between noise and text. The loss is the cross-entropy of the clean tokens at the free positions.

Shapes: B samples, S positions of a sequence, N positions of a text, V vocabulary columns of the shard, T = B N.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import Vocab, sharded_softmax
from megatron_sfr.kl_flow.simplex_path import Simplex, log_dirichlet
from megatron_sfr.option_names import named
from megatron_sfr.runtime.noise import uniform

SOURCE_STREAM, TIME_STREAM, CHOICE_STREAM = 6, 7, 8  # SFR and its diagnostics use lower streams
REPLY, INFILL, LENGTH, BEGIN, GAPS, PADDING = range(6)  # the random choices made for a text; for gap g: 6 g more
CHOICES, MOST_GAPS = 6, 64


@named("kl_flow_")
@dataclass(frozen=True)
class KLFlowOptions:
    """Flow matching on the simplex of tokens (--training-task kl-flow)."""

    smoothing: float = 0.01
    """b: probability mass of the target's one-hot that is spread evenly over all tokens. Default 0.01, as in the
    paper."""
    t_max: float = 0.3
    """Each text draws one t from U[0, t_max]. Default 0.3, as in the paper; at larger t the token is almost certain."""
    noise_seed: int = 1234
    """Seed of the noise, which depends only on (seed, sample, position, token). Default 1234."""
    infill: float = 0.0
    """Fraction of the texts that are trained on infilling: one or several spans (gaps) are free, with uniform length
    and position within what would have been free; the rest of the text is given. Default 0."""
    infill_gaps: int = 1
    """Largest number of gaps of an infilled text, drawn uniformly from 1. Each lies in its own equal part of what would
    have been free. Default 1."""
    infill_padding: int = 0
    """Largest number of end tokens, drawn uniformly from 0, that fill up a gap after its text. A model trained this way
    fills gaps of unknown length (`at_most` in flow-generate). Default 0."""
    loss: Literal["free", "all"] = "free"
    """Positions in the mean of the cross-entropy. 'free' (default): those that are not given. 'all': given ones too, as
    in the authors' code."""

    def __post_init__(self) -> None:
        if not 0 < self.smoothing < 1:
            raise ValueError(f"`smoothing` = {self.smoothing}: choose above 0 and below 1")
        if not 0 < self.t_max < 1:
            raise ValueError(f"`t_max` = {self.t_max}: choose above 0 and below 1")
        if not 0 <= self.infill <= 1:
            raise ValueError(f"`infill` = {self.infill}: choose a fraction from 0 to 1")
        if not 1 <= self.infill_gaps <= MOST_GAPS:
            raise ValueError(f"`infill_gaps` = {self.infill_gaps}: choose 1 to {MOST_GAPS}")
        if self.infill_padding < 0:
            raise ValueError(f"`infill_padding` = {self.infill_padding}: must not be negative")
        if self.infill == 0 and (self.infill_gaps > 1 or self.infill_padding):
            raise ValueError("`infill_gaps` and `infill_padding` need `infill` above 0")


def draw_time(sample_B: Tensor, options: KLFlowOptions) -> Tensor:
    """t ~ U[0, t_max] of each sample, fp32 [B]."""
    zero = torch.zeros_like(sample_B)
    return options.t_max * uniform(options.noise_seed, sample_B, zero, zero, stream=TIME_STREAM)


def free_text(
    tokens_BS: Tensor,
    labels_BS: Tensor,
    loss_mask_BS: Tensor,
    sample_B: Tensor,
    length: int,
    options: KLFlowOptions,
    end_token: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The first `length` tokens of each sequence, int64 [B, N], and which of them are free, bool [B, N].

    A sequence of documents is entirely free. Of a conversation one reply is free, drawn again each epoch. The tokens
    before it are given. The positions after it are free too and hold the reply's last token, which ends it, as in LLaDA
    (arXiv 2502.09992): a model that saw where the text ends would not learn to end it. A sequence without supervised
    tokens has no free positions.

    Args:
        end_token: fills up gaps, for `infill_padding`. None: the reply's last token.
    """
    text_BN = torch.cat([tokens_BS[:, :1], labels_BS], dim=1)[:, :length]
    mask_BS = loss_mask_BS > 0  # of the labels; the first token has none
    mask_BN = torch.cat([mask_BS.all(-1, keepdim=True), mask_BS], dim=1)[:, :length]
    position_N = torch.arange(length, device=text_BN.device)
    reply_BN = (mask_BN & ~F.pad(mask_BN, (1, 0))[:, :-1]).cumsum(-1)  # number of replies begun
    chosen_B1 = _choice(REPLY, reply_BN[:, -1:], sample_B, options)
    free_BN = mask_BN & (reply_BN == 1 + chosen_B1)
    last_B1 = torch.where(free_BN, position_N, -1).amax(-1, keepdim=True)
    after_BN = (position_N > last_B1) & (last_B1 >= 0)
    text_BN = torch.where(after_BN, text_BN.gather(-1, last_B1.clamp(min=0)), text_BN)
    free_BN = free_BN | after_BN
    if options.infill == 0:
        return text_BN, free_BN
    end_B1 = text_BN.gather(-1, last_B1.clamp(min=0)) if end_token is None else torch.full_like(last_B1, end_token)
    return _infilled(text_BN, free_BN, end_B1, sample_B, options)


def _infilled(
    text_BN: Tensor, free_BN: Tensor, end_B1: Tensor, sample_B: Tensor, options: KLFlowOptions
) -> tuple[Tensor, Tensor]:
    """Text and free positions, which reach to the end of the text; or gaps in these, filled up by end tokens."""
    position_N = torch.arange(free_BN.shape[-1], device=free_BN.device)
    infill_B1 = _number(INFILL, sample_B, options) < options.infill
    size_B1 = free_BN.sum(-1, keepdim=True)
    first_B1 = free_BN.shape[-1] - size_B1
    count_B1 = 1 + _choice(GAPS, torch.full_like(size_B1, options.infill_gaps), sample_B, options)
    gaps_BN, padding_BN = torch.zeros_like(free_BN), torch.zeros_like(text_BN)
    for g in range(options.infill_gaps):
        start_B1, stop_B1 = (size_B1 * k // count_B1 for k in (g, g + 1))
        here_B1 = infill_B1 & (g < count_B1) & (start_B1 < stop_B1)
        length_B1 = 1 + _choice(LENGTH + CHOICES * g, stop_B1 - start_B1, sample_B, options)
        shift_B1 = _choice(BEGIN + CHOICES * g, stop_B1 - start_B1 - length_B1 + 1, sample_B, options)
        begin_B1 = first_B1 + start_B1 + shift_B1
        last_B1 = torch.minimum(begin_B1 + length_B1, first_B1 + stop_B1) - 1
        gaps_BN |= here_B1 & (position_N >= begin_B1) & (position_N <= last_B1)
        most_B1 = torch.full_like(size_B1, options.infill_padding + 1)
        padding_BN += _choice(PADDING + CHOICES * g, most_B1, sample_B, options) * (here_B1 & (position_N == last_B1))
    free_BN = free_BN & (gaps_BN | ~infill_B1)
    if options.infill_padding == 0:
        return text_BN, free_BN
    # Each token moves right by the padding before it; positions that no token moves to are padding, and free.
    to_BN = position_N + padding_BN.cumsum(-1) - padding_BN
    N = text_BN.shape[-1]
    padding = end_B1.expand_as(text_BN), torch.ones_like(free_BN)
    text_BN, free_BN = (
        F.pad(x, (0, 1)).scatter(-1, to_BN.clamp(max=N), moved)[:, :N]
        for x, moved in zip(padding, (text_BN, free_BN), strict=True)
    )
    return text_BN, free_BN


def _number(what: int, sample_B: Tensor, options: KLFlowOptions) -> Tensor:
    choice_B = torch.full_like(sample_B, what)
    number_B = uniform(options.noise_seed, sample_B, choice_B, torch.zeros_like(choice_B), stream=CHOICE_STREAM)
    return number_B[:, None]


def _choice(what: int, count_B1: Tensor, sample_B: Tensor, options: KLFlowOptions) -> Tensor:
    """Uniform from 0 to count - 1: int64 [B, 1]; 0 where the count is 0 or less."""
    chosen_B1 = (_number(what, sample_B, options).double() * count_B1).long()
    return torch.minimum(chosen_B1, (count_B1 - 1).clamp(min=0))


def noisy_point(
    text_BN: Tensor, free_BN: Tensor, t_B: Tensor, sample_B: Tensor, vocab: Vocab, width: int, options: KLFlowOptions
) -> Tensor:
    """This rank's columns [B, N, V] of the denoiser's input, fp32: x_t at the free positions, one-hot at the others.

    x_t = softmax((1 - t) ln x_0 + t l_1) with x_0 ~ Dirichlet(1). Padding columns of the vocabulary are 0. Needs one
    collective of two numbers per position and allocates one tensor of the size of the result.

    Args: width: columns V of the shard, including padding.
    """
    position_N = torch.arange(text_BN.shape[1], device=text_BN.device)
    key = options.noise_seed, sample_B[:, None], position_N, torch.zeros_like(position_N)
    l_BNV = log_dirichlet(*key, width, start=vocab.start, stream=SOURCE_STREAM)
    real = vocab.real(l_BNV.flatten(0, 1)).shape[-1]
    column_BN = vocab.local(text_BN, real)
    l_BNV = Simplex(vocab.size, options.smoothing).between(l_BNV, column_BN, t_B[:, None])
    l_BNV[..., real:] = -torch.inf
    x_BNV = sharded_softmax(l_BNV.flatten(0, 1), vocab).view_as(l_BNV)
    given_BN = ~free_BN
    one_BN = (given_BN & (column_BN >= 0)).to(x_BNV.dtype)
    return x_BNV.masked_fill_(given_BN[..., None], 0).scatter_add_(
        -1, column_BN.clamp(min=0)[..., None], one_BN[..., None]
    )
