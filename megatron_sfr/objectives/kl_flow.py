"""What KL-flow (Logit-KL Flow Matching, arXiv 2411.16821) shows its denoiser: which tokens of a text are free, and the
point of the simplex between noise and text. Its loss is the cross-entropy of the clean tokens at the free positions.

Letters: B samples, S positions of a row of tokens, N of a text, V vocabulary columns of the shard, T positions in all.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sfr.flow.simplex import Simplex, log_dirichlet
from megatron_sfr.objectives.vocab import Vocab
from megatron_sfr.runtime.noise import uniform

SOURCE_STREAM, TIME_STREAM, CHOICE_STREAM = 6, 7, 8  # SFR and what looks at it have lower ones
REPLY, INFILL, LENGTH, BEGIN = range(4)  # what is chosen of a text


@dataclass(frozen=True)
class KLFlowOptions:
    """Flow matching on the simplex of tokens (--training-task kl-flow)."""

    kl_flow_smoothing: float = 0.01
    """b: mass that the target's smoothed one-hot spreads evenly over all tokens; the paper's 0.01."""
    kl_flow_t_max: float = 0.3
    """t is drawn from U[0, t_max], one a text; the paper's 0.3, beyond which the token is all but certain."""
    kl_flow_noise_seed: int = 1234
    """Key of the noise, which is a function of (key, sample, position, token) alone."""
    kl_flow_infill: float = 0.0
    """Share of the texts of which only one span is free, its length uniform from 1 to all that was free, its place
    uniform; the rest is given as it is."""

    def __post_init__(self) -> None:
        if not 0 < self.kl_flow_smoothing < 1:
            raise ValueError(f"kl_flow_smoothing = {self.kl_flow_smoothing}: choose above 0 and below 1")
        if not 0 < self.kl_flow_t_max < 1:
            raise ValueError(f"kl_flow_t_max = {self.kl_flow_t_max}: choose above 0 and below 1")
        if not 0 <= self.kl_flow_infill <= 1:
            raise ValueError(f"kl_flow_infill = {self.kl_flow_infill}: a share is from 0 to 1")


def draw_time(sample_B: Tensor, options: KLFlowOptions) -> Tensor:
    """t ~ U[0, t_max] of each sample, fp32 [B]."""
    zero = torch.zeros_like(sample_B)
    return options.kl_flow_t_max * uniform(options.kl_flow_noise_seed, sample_B, zero, zero, stream=TIME_STREAM)


def free_text(
    tokens_BS: Tensor, labels_BS: Tensor, loss_mask_BS: Tensor, sample_B: Tensor, length: int, options: KLFlowOptions
) -> tuple[Tensor, Tensor]:
    """The first `length` tokens of each row, int64 [B, N], and which of them are to be found, bool [B, N].

    A row of documents is free altogether. Of a conversation one reply is, drawn afresh each epoch; what comes before is
    given, and what comes after is free too and filled with the reply's last token, its end, as LLaDA (arXiv 2502.09992)
    does: a model that knew where the text ends would not learn to end it. Rows without supervised tokens are not free.
    """
    text_BN = torch.cat([tokens_BS[:, :1], labels_BS], dim=1)[:, :length]
    mask_BS = loss_mask_BS > 0  # of the labels; before the first token of a conversation nothing could ask for it
    mask_BN = torch.cat([mask_BS.all(-1, keepdim=True), mask_BS], dim=1)[:, :length]
    place_N = torch.arange(length, device=text_BN.device)
    reply_BN = (mask_BN & ~F.pad(mask_BN, (1, 0))[:, :-1]).cumsum(-1)  # counts them from 1, at them and after
    chosen_B1 = _choice(REPLY, reply_BN[:, -1:], sample_B, options)
    free_BN = mask_BN & (reply_BN == 1 + chosen_B1)
    last_B1 = torch.where(free_BN, place_N, -1).amax(-1, keepdim=True)
    after_BN = (place_N > last_B1) & (last_B1 >= 0)
    text_BN = torch.where(after_BN, text_BN.gather(-1, last_B1.clamp(min=0)), text_BN)
    free_BN = free_BN | after_BN
    return text_BN, _infilled(free_BN, place_N, sample_B, options) if options.kl_flow_infill > 0 else free_BN


def _infilled(free_BN: Tensor, place_N: Tensor, sample_B: Tensor, options: KLFlowOptions) -> Tensor:
    """What is free, which reaches from some place to the end, or a span of it."""
    size_B1 = free_BN.sum(-1, keepdim=True)
    length_B1 = 1 + _choice(LENGTH, size_B1, sample_B, options)
    begin_B1 = free_BN.shape[-1] - size_B1 + _choice(BEGIN, size_B1 - length_B1 + 1, sample_B, options)
    span_BN = (place_N >= begin_B1) & (place_N < begin_B1 + length_B1)
    infill_B1 = _number(INFILL, sample_B, options) < options.kl_flow_infill
    return free_BN & (span_BN | ~infill_B1)


def _number(what: int, sample_B: Tensor, options: KLFlowOptions) -> Tensor:
    place_B = torch.full_like(sample_B, what)
    number_B = uniform(options.kl_flow_noise_seed, sample_B, place_B, torch.zeros_like(place_B), stream=CHOICE_STREAM)
    return number_B[:, None]


def _choice(what: int, count_B1: Tensor, sample_B: Tensor, options: KLFlowOptions) -> Tensor:
    """0 to count - 1, evenly: int64 [B, 1]; 0 where the count is 0."""
    chosen_B1 = (_number(what, sample_B, options).double() * count_B1).long()
    return torch.minimum(chosen_B1, (count_B1 - 1).clamp(min=0))


def noisy_point(
    text_BN: Tensor, free_BN: Tensor, t_B: Tensor, sample_B: Tensor, vocab: Vocab, width: int, options: KLFlowOptions
) -> Tensor:
    """The shard [B, N, V] of x_t = softmax((1 - t) ln x_0 + t l_1), x_0 ~ Dirichlet(1), at the free positions; of the
    token's own one-hot at the others. fp32; columns that only pad the vocabulary are 0.

    Args: width: columns V of the shard, padding among them. One collective, of two numbers a position; one tensor of
        the size of the result.
    """
    place_N = torch.arange(text_BN.shape[1], device=text_BN.device)
    key = options.kl_flow_noise_seed, sample_B[:, None], place_N, torch.zeros_like(place_N)
    l_BNV = log_dirichlet(*key, width, start=vocab.start, stream=SOURCE_STREAM)
    real = vocab.real(l_BNV.flatten(0, 1)).shape[-1]
    column_BN = vocab.local(text_BN, real)
    l_BNV = Simplex(vocab.size, options.kl_flow_smoothing).between(l_BNV, column_BN, t_B[:, None])
    l_BNV[..., real:] = -torch.inf
    x_BNV = sharded_softmax(l_BNV.flatten(0, 1), vocab).view_as(l_BNV)
    given_BN = ~free_BN
    one_BN = (given_BN & (column_BN >= 0)).to(x_BNV.dtype)
    return x_BNV.masked_fill_(given_BN[..., None], 0).scatter_add_(
        -1, column_BN.clamp(min=0)[..., None], one_BN[..., None]
    )


def sharded_softmax(l_TV: Tensor, vocab: Vocab) -> Tensor:
    """softmax over the whole vocabulary of a shard [T, V], in place; -inf becomes 0, and may fill a shard."""
    m_T1 = l_TV.amax(-1, keepdim=True).clamp(min=torch.finfo(l_TV.dtype).min)
    l_TV.sub_(m_T1).exp_()
    m_RT1, u_RT1 = vocab.gather(torch.cat([m_T1, l_TV.sum(-1, keepdim=True)], dim=-1)).split(1, dim=-1)
    top_T1 = m_RT1.amax(0)
    u_T1 = (u_RT1 * (m_RT1 - top_T1).exp()).sum(0)
    return l_TV.mul_((m_T1 - top_T1).exp() / u_T1)
