"""KL-flow's three samplers (Logit-KL Flow Matching, arXiv 2411.16821), for any denoiser.

Shapes: B sequences, S positions, F free positions of all sequences, W columns of the vocabulary's shard.
l: log-probabilities up to a constant; x = softmax(l): a point of the simplex; t: time; t' = -ln(1 - t).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_sfr.kl_flow.sampling.sampler_options import MOST_STEPS, SamplerOptions
from megatron_sfr.kl_flow.sampling.vocab_shard import Keys, Shard
from megatron_sfr.kl_flow.simplex_path import Simplex

NOISE_STREAM, TOKEN_STREAM = 9, 10  # streams of the noise

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_BSW, t_B) -> logits_BSW of the clean tokens; x and logits are this rank's columns."""


@dataclass(frozen=True)
class Canvas:
    """A batch of sequences with given and free positions."""

    tokens_BS: Tensor
    """int64; ignored at free positions."""
    free_BS: Tensor
    """bool; the positions to generate."""
    sample_B: Tensor
    """int64; keys the noise, so that a sequence does not depend on the rest of its batch."""

    def __getitem__(self, rows: Tensor) -> "Canvas":
        return Canvas(self.tokens_BS[rows], self.free_BS[rows], self.sample_B[rows])


class Moment(NamedTuple):
    """The state passed to `watch` before step `number` of `steps`, and at number = steps when tokens are decoded."""

    number: int
    steps: int
    t: float
    """Time of the longest sequence."""
    logits_FW: Tensor
    """The denoiser's logits at the free positions; -inf in padding columns."""


@torch.inference_mode()
def sample(
    denoiser: Denoiser,
    canvas: Canvas,
    shard: Shard,
    simplex: Simplex,
    options: SamplerOptions,
    watch: Callable[[Moment], object] | None = None,
) -> Tensor:
    """Generates the free positions. Returns tokens int64 [B, S], with the canvas's tokens at given positions.

    Every rank of the shard's group must call this with the same canvas and gets the same tokens. Sequences may take
    different numbers of steps; `watch` is called at each step of the longest one, on every rank.
    """
    steps_B = options.steps_of(canvas.free_BS)
    order_B = steps_B.argsort(descending=True, stable=True)  # unfinished sequences come first
    canvas, steps_B = canvas[order_B], steps_B[order_B]
    state = _State(canvas, shard, options)
    most = int(steps_B[0])
    for number in range(most):
        logits_FW = state.denoise(denoiser, options.time(number, steps_B), int((steps_B > number).sum()))
        if watch is not None:
            watch(Moment(number, most, float(options.time(number, steps_B[:1])), logits_FW))
        state.step(logits_FW, number, steps_B, simplex)
    logits_FW = state.denoise(denoiser, options.time(1, torch.ones_like(steps_B)), len(steps_B))
    if watch is not None:
        watch(Moment(most, most, options.t_max, logits_FW))
    tokens_BS = canvas.tokens_BS.masked_scatter(canvas.free_BS, state.decode(logits_FW))
    return tokens_BS[order_B.argsort()]


class _State:
    """The points x of all positions, the denoiser's input, and the log-probabilities l of the free ones."""

    def __init__(self, canvas: Canvas, shard: Shard, options: SamplerOptions) -> None:
        self.shard, self.options = shard, options
        self.row_F, position_F = canvas.free_BS.nonzero(as_tuple=True)
        self.index_F = self.row_F * canvas.free_BS.shape[1] + position_F
        self.keys = Keys(options.seed, canvas.sample_B[self.row_F], position_F)
        self.l_FW = self._noise(self.keys, 0)
        self.x_BSW = self.l_FW.new_zeros(*canvas.free_BS.shape, shard.width)
        column_BS = shard.vocab.local(canvas.tokens_BS, shard.width).masked_fill(canvas.free_BS, -1)
        self.x_BSW.scatter_(-1, column_BS.clamp(min=0)[..., None], (column_BS >= 0)[..., None].float())

    def _noise(self, keys: Keys, draw: int) -> Tensor:
        """l0 = ln x0 with x0 ~ Dirichlet(1): [F, W]."""
        width, start = self.shard.width, self.shard.vocab.start
        return self.shard.without_padding(keys.log_exponentials(draw, width, start=start, stream=NOISE_STREAM))

    def denoise(self, denoiser: Denoiser, t_B: Tensor, rows: int) -> Tensor:
        """The denoiser's logits at the free positions of the first `rows` sequences: [F, W]."""
        free = self._free_of(rows)
        self.x_BSW.flatten(0, 1)[self.index_F[free]] = self.shard.softmax(self.l_FW[free])
        logits_BSW = denoiser(self.x_BSW[:rows], t_B[:rows].float())
        return self.shard.without_padding(logits_BSW.flatten(0, 1)[self.index_F[free]].float())

    def _free_of(self, rows: int) -> slice:
        return slice(int((self.row_F < rows).sum()))

    def step(self, logits_FW: Tensor, number: int, steps_B: Tensor, simplex: Simplex) -> None:
        """Moves the unfinished sequences from time step `number` to the next."""
        here_B, next_B = (self.options.time(n, steps_B) for n in (number, number + 1))
        split = {"basic": 1.0, "sampling": 0.0, "hybrid": self.options.t_split}[self.options.method]
        row_F = self.row_F[: len(logits_FW)]
        flows_F = (here_B < split)[row_F]
        flow, draws = flows_F.nonzero()[:, 0], (~flows_F).nonzero()[:, 0]
        if len(flow):
            h_F = (self.options.length / steps_B.double())[row_F[flow]].float()
            p_FW = self.shard.softmax(logits_FW[flow])
            self.l_FW[flow] = simplex.euler(self.l_FW[flow], p_FW, h_F[:, None])
        if len(draws):
            keys = self.keys[draws]
            token_F = self._tokens(logits_FW[draws], self.options.top_k, keys, number)
            column_F = self.shard.vocab.local(token_F, self.shard.width)
            l_0_FW = self._noise(keys, number + 1)
            self.l_FW[draws] = simplex.between(l_0_FW, column_F, next_B[row_F[draws]].float())

    def decode(self, logits_FW: Tensor) -> Tensor:
        """The final tokens, int64 [F]."""
        return self._tokens(logits_FW, self.options.final_top_k, self.keys, MOST_STEPS)

    def _tokens(self, logits_FW: Tensor, top_k: int, keys: Keys, number: int) -> Tensor:
        return self.shard.draw(logits_FW, top_k, self.options.temperature, keys, number, TOKEN_STREAM)
