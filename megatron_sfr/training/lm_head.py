"""The LM head and the token objective of one microbatch: over all logits at once, or over chunks of positions.

Shapes: S positions (this rank's, under sequence parallelism), B samples, T = S B, N supervised positions, C of a chunk,
H hidden size, V vocabulary columns of the shard, A anchors, K layers of multi-token prediction (MTP).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.objectives.token.chunked_head import ChunkPlan, LMHead, chunked_loss
from megatron_sfr.objectives.token.closed_form import TokenValues
from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
from megatron_sfr.objectives.token.loss_base import IGNORED, TokenLoss
from megatron_sfr.objectives.token.token_loss import entropy_and_max_prob, token_values
from megatron_sfr.runtime.parallel import all_positions, sum_over_tensor, tensor_group, tensor_rank
from megatron_sfr.training.data.multi_token_labels import LABELS, MASK, SHARE
from megatron_sfr.training.gradient_ratio import token_power

CHUNK_TOKENS = 4096
"""Default of loss_chunk_tokens. Smaller chunks spend a growing share of their time on the weight's gradient, which each
chunk reads and writes."""
REMEDY = "set loss_chunk_tokens to 0"


@dataclass(frozen=True)
class LastStage:
    """What a model passes to an output processor, as far as the token objective reads it."""

    hidden_SBH: Tensor
    """After the final norm; this rank's positions under sequence parallelism."""
    layer: Any
    """The output layer."""
    tied_VH: Tensor | None
    """The weight that it shares with the embedding; None: it has its own."""
    gathers: bool | None
    """Upstream's runtime_gather_output."""
    scale: Callable[[Tensor], Tensor]
    """MuP's scaling of the logits."""
    config: Any
    """The model's TransformerConfig."""

    @property
    def weight_VH(self) -> Tensor:
        return self.layer.weight if self.tied_VH is None else self.tied_VH

    def project(self, h: Tensor) -> Tensor:
        """Raw logits."""
        return self.layer(h, weight=self.tied_VH, runtime_gather_output=self.gathers)[0]


@dataclass(frozen=True)
class Measured:
    """Which measurements a microbatch needs."""

    power: bool = False
    """The squared norm of the objective's gradient at h."""
    entropy: bool = False
    """Entropy and largest probability of each position."""


@dataclass(frozen=True)
class TokenResult:
    """The token objective of one microbatch."""

    total: Tensor
    """The sum to differentiate."""
    values: TokenValues
    """Of each position, [B, S] each; detached, and 0 at positions that are not supervised."""
    power: Tensor | None = None
    entropy_BS: Tensor | None = None
    """In nats; with chunks 0 at positions that get no logits."""
    max_prob_BS: Tensor | None = None


@dataclass(frozen=True)
class TokenObjective:
    """The token loss with its options, as a function of the last hidden states."""

    vocab_size: int
    loss: TokenLoss
    chunk_tokens: int = CHUNK_TOKENS
    """Largest number of positions whose logits exist at a time; 0: all positions, supervised or not."""

    def positions(self, batch: dict[str, Tensor], anchors: bool) -> Tensor | None:
        """The positions of a batch that get logits, as indices into [S, B]: int64 [N]. None without chunks.

        To be called before the batch moves to the device: on the host their number is known without waiting.

        Args:
            anchors: whether to include the anchors.
        """
        if not self.chunk_tokens:
            return None
        mask_BS = batch["loss_mask"] > 0
        if anchors and "anchor_position" in batch:
            sample_BA, used_BA = torch.arange(len(mask_BS), device=mask_BS.device)[:, None], batch["anchor_weight"] > 0
            mask_BS[sample_BA.expand_as(used_BA)[used_BA], batch["anchor_position"][used_BA]] = True
        return mask_BS.t().reshape(-1).nonzero()[:, 0]

    def __call__(
        self,
        stage: LastStage,
        labels: Tensor,
        batch: dict[str, Tensor],
        measured: Measured,
        *,
        counts: bool,
        weight: Tensor | float = 1.0,
    ) -> TokenResult:
        """The objective of one microbatch.

        Args:
            batch: with `logit_position`, from `positions`, where there are chunks.
            counts: whether the objective has a weight above 0 in this step.
            weight: by what the caller multiplies the total. Chunks compute the gradient for it.
        """
        y_T = torch.where(batch["loss_mask"] > 0, labels, IGNORED).t().reshape(-1)
        if self.chunk_tokens:
            loss, index_N = self.loss.of_batch(batch, batch["logit_position"]), batch["logit_position"]
            return self._chunked(stage, labels, y_T, index_N, loss, measured, counts, weight)
        z_TV = stage.scale(stage.project(stage.hidden_SBH)).flatten(0, 1)
        vocab, shape = self._vocab(z_TV.shape[-1]), labels.shape[::-1]
        seen = [x.view(shape).t() for x in entropy_and_max_prob(z_TV, vocab)] if measured.entropy else [None, None]
        loss = self.loss.of_batch(batch, None)
        power = token_power(z_TV, y_T, loss, vocab, stage.weight_VH) if measured.power else None
        if power is not None:  # it is of the scaled logits, so far
            power = stage.scale(stage.scale(power))
        values = token_values(z_TV, y_T, loss, vocab, overwrite=True)
        values_BS = TokenValues(*(x_T.detach().view(shape).t() for x_T in values))
        return TokenResult(values.loss.sum(), values_BS, power, *seen)

    def _chunked(
        self,
        stage: LastStage,
        labels: Tensor,
        y_T: Tensor,
        index_N: Tensor,
        loss: TokenLoss,
        measured: Measured,
        counts: bool,
        weight: Tensor | float,
    ) -> TokenResult:
        check_layer(stage.layer, stage.config)
        weight_VH, grads = stage.weight_VH, torch.is_grad_enabled()
        vocab, factor = self._vocab(len(weight_VH)), loss_scale(stage.config, weight_VH.device) * weight
        watch = _Watch(vocab)
        head = LMHead(
            partial(_project, stage),
            weight_VH,
            vocab,
            stage.scale,
            weight_accumulator(weight_VH, stage.config) if grads else None,
        )
        plan = ChunkPlan(
            self.chunk_tokens,
            grads and (counts or measured.power),
            counts,
            factor,
            watch.see_logits if measured.entropy else None,
            watch.see_gradient if measured.power else None,
        )
        h_TH = all_positions(stage.hidden_SBH, sharded=stage.config.sequence_parallel).flatten(0, 1)
        total, values = chunked_loss(h_TH, index_N, y_T[index_N], loss, head, plan)

        def place(x_N: Tensor) -> Tensor:
            x_T = x_N.new_zeros(len(y_T)).index_copy(0, index_N, x_N)
            return x_T.view(labels.shape[::-1]).t()

        power = watch.power / factor**2 if measured.power else None
        seen = [place(torch.cat(x)) for x in zip(*watch.seen, strict=True)] if measured.entropy else [None, None]
        return TokenResult(total, TokenValues(*map(place, values)), power, *seen)

    def _vocab(self, width: int) -> Vocab:
        return Vocab(self.vocab_size, tensor_rank() * width, tensor_group())


class MultiTokenResult(NamedTuple):
    """The losses of the MTP layers in one microbatch."""

    total: Tensor
    """Their weighted sum, to be differentiated beside the objective."""
    sums_K3: Tensor
    """Of each layer: the sum of cross-entropy, the correct predictions, and the tokens."""


@dataclass(frozen=True)
class MultiTokenLoss:
    """The loss of Megatron's MTP layers: cross-entropy with Megatron's weights, through the same LM head."""

    vocab_size: int
    chunk_tokens: int

    def positions(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The positions of each layer that get logits, as `TokenObjective.positions`; {} without MTP or chunks."""
        if MASK not in batch or not self.chunk_tokens:
            return {}
        masks = batch[MASK].unbind(-1)
        return {f"mtp_position_{k}": mask_BS.t().reshape(-1).nonzero()[:, 0] for k, mask_BS in enumerate(masks)}

    def __call__(
        self, stage: LastStage, predicted: Sequence[Tensor], batch: dict[str, Tensor], *, counts: bool
    ) -> MultiTokenResult | None:
        """The losses of one microbatch; None without MTP.

        Args:
            predicted: the hidden states [S, B, H] of each layer.
            batch: with what `multi_token_labels` and `positions` add.
            counts: whether the losses of tokens have a weight above 0 in this step.
        """
        if not predicted:
            return None
        config, objective = stage.config, TokenObjective(self.vocab_size, CrossEntropy(), self.chunk_tokens)
        factor = config.mtp_loss_scaling_factor / len(predicted)
        totals, sums = [], []
        for k, h_SBH in enumerate(predicted):
            layer = replace(stage, hidden_SBH=h_SBH)
            if config.mtp_detach_heads:
                layer = replace(layer, tied_VH=stage.weight_VH.detach())
            given = {"loss_mask": batch[MASK][..., k]}
            if self.chunk_tokens:
                given["logit_position"] = batch[f"mtp_position_{k}"]
            weight = factor * batch[SHARE][k]
            labels, used = batch[LABELS][..., k], counts and factor != 0
            result = objective(layer, labels, given, Measured(), counts=used, weight=weight)
            totals.append(result.total * weight)
            logged = result.values.cross_entropy, result.values.correct, given["loss_mask"]
            sums.append(torch.stack([x.sum().float() for x in logged]))
        return MultiTokenResult(torch.stack(totals).sum(), torch.stack(sums))


@dataclass
class _Watch:
    """Measurements of a pass over chunks."""

    vocab: Vocab
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    power: Tensor | float = 0.0

    def see_logits(self, z_CV: Tensor) -> None:
        self.seen.append(entropy_and_max_prob(z_CV, self.vocab))

    def see_gradient(self, dh_CH: Tensor) -> None:
        self.power = self.power + sum_over_tensor(dh_CH.clone()).float().square().sum()


def _project(stage: LastStage, h_CH: Tensor) -> Tensor:
    """Raw logits [C, V] of positions that every tensor-parallel rank has, without autograd.

    Calls the module: with overlap_param_gather its hook waits for the weight of this step.
    """
    with torch.no_grad(), _undivided_input(stage.layer):
        return stage.project(h_CH[:, None])[:, 0]


@contextmanager
def _undivided_input(layer: Any) -> Iterator[None]:
    """Context in which the output layer takes its input as it is, without gathering it over sequence-parallel ranks.

    Upstream's models do the same where only a few positions get logits (megatron-core 0.19.2).
    """
    divided, layer.sequence_parallel = layer.sequence_parallel, False
    try:
        yield
    finally:
        layer.sequence_parallel = divided


def check_layer(layer: Any, config: Any) -> None:
    """ValueError for an output layer whose gradient the chunks cannot compute."""
    if type(layer) is not ColumnParallelLinear or layer.bias is not None or layer.gtp_remat_size > 1:
        raise ValueError(f"chunks of the LM head need a plain output layer, not {type(layer).__name__}: {REMEDY}")
    if config.defer_embedding_wgrad_compute:
        raise ValueError(f"defer_embedding_wgrad_compute has no effect on chunks: turn it off, or {REMEDY}")


def loss_scale(config: Any, device: torch.device) -> Tensor:
    """The gradient with which upstream's schedule starts the backward pass: fp16's loss scale, or 1."""
    one = torch.ones((), device=device)
    return one if config.grad_scale_func is None else config.grad_scale_func(one).view(())


def weight_accumulator(weight_VH: Tensor, config: Any) -> Tensor | None:
    """Megatron's buffer for the weight's gradient, if the gradient that the loss will receive is known.

    It is `loss_scale` in upstream's schedules, which set grad_scale_func, if the loss is a sum. Upstream zeroes the
    buffer before the first forward pass of a step and reduces it after the last backward pass.
    """
    known = config.calculate_per_token_loss and config.grad_scale_func is not None
    return getattr(weight_VH, "main_grad", None) if known else None
