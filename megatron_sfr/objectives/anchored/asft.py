"""ASFT (Anchored Supervised Fine-Tuning, arXiv 2509.23753): DFT plus a KL divergence from the model of the start.

L = -sg(p_y) ln p_y + lambda KL(r || p), r the probabilities of a frozen reference model, sg = stop gradient. The paper
sums over the whole vocabulary (equation 6). Here the reference's k most likely tokens count separately and all others
as one, so that r can be stored: a lower bound of the paper's KL, equal to it if k is the vocabulary. With the rest R:
dL/dz_i = p_y (p_i - [i = y]) + lambda (p_i - r_i) for the k tokens, and lambda p_i (1 - r_R / p_R) in the rest.
Shapes: T tokens, V tokens of the whole vocabulary, K tokens of the reference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import LogitStatistics, StatisticsSpec
from megatron_sfr.objectives.anchored.reference import LOG_P, TOKEN, Reference, merged_kl, merged_log_softmax
from megatron_sfr.objectives.token.dft import DFT
from megatron_sfr.objectives.token.loss_base import ClosedFormLoss, LossAndCoefficients, TokenLoss
from megatron_sfr.objectives.token.registry import register

LARGEST_LOG_RATIO = 60.0
"""Bound of ln(r_R / p_R) in the gradient, so that exp of it times a loss scale is finite in fp32. Only a model that
gives the rest less than exp(-60) reaches it."""


@register("asft")
@dataclass(frozen=True)
class ASFT(TokenLoss):
    """ASFT (arXiv 2509.23753), for --objective asft. `megatron-sfr reference` stores what it needs.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> import torch, megatron_sfr as sfr
        >>> reference = sfr.Reference(torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.25, 0.5]]).log())
        >>> logits, labels = torch.zeros(1, 4), torch.tensor([2])
        >>> loss, cross_entropy = sfr.token_loss(logits, labels, sfr.ASFT(weight=0.05).at(reference))
        >>> round((loss / cross_entropy).item(), 4)  # the model is the reference: DFT alone
        0.25
    """

    weight: float = 0.05
    """Weight lambda of the KL divergence from the reference model. Default 0.05, as in the paper. 0 is DFT."""
    store: str = "reference"
    """Folder of the reference store inside each prepared folder, written by `megatron-sfr reference`. Default:
    reference."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"`weight` = {self.weight}: choose at least 0")

    def at(self, reference: Reference) -> "AnchoredDFT":
        """The loss of the tokens whose reference distribution this is. Leading dimensions are those of the labels."""
        token, log_p = (x.flatten(0, -2) for x in reference)
        return AnchoredDFT(self.weight, Reference(token.long(), log_p))

    def of_batch(self, batch: Mapping[str, Tensor], index_N: Tensor | None) -> "AnchoredDFT":
        """The loss of positions whose reference distributions the batch has."""
        if TOKEN not in batch:
            raise ValueError(
                f"objective asft reads {TOKEN} and {LOG_P} of each batch, and this one has {sorted(batch)}"
            )
        given = (batch[name].transpose(0, 1).flatten(0, 1) for name in (TOKEN, LOG_P))
        return self.at(Reference(*(x if index_N is None else x[index_N] for x in given)))

    def loss(self, z_TV: Tensor, y_T: Tensor) -> Tensor:
        """Raises ValueError: the loss is not a function of logits and labels alone."""
        raise ValueError("ASFT needs the reference model's probabilities of each token: ASFT(...).at(reference)")

    def logged(self, loss: Tensor, cross_entropy: Tensor) -> dict[str, Tensor]:
        """The KL divergence from the reference, over its stored outcomes."""
        if not self.weight:
            return {}
        return {"asft kl": (loss - (-cross_entropy).exp() * cross_entropy) / self.weight}


@dataclass(frozen=True, eq=False)
class AnchoredDFT(ClosedFormLoss):
    """ASFT's loss of some tokens, made by `ASFT.at`."""

    weight: float
    reference: Reference

    def split(self, chunks: int) -> Sequence["AnchoredDFT"]:
        """The loss of each chunk of the tokens."""
        parts = zip(*(x.tensor_split(chunks) for x in self.reference), strict=True)
        return [AnchoredDFT(self.weight, Reference(*part)) for part in parts]

    def loss(self, z_TV: Tensor, y_T: Tensor) -> Tensor:
        """-sg(p_y) ln p_y + lambda KL(r || p)."""
        log_p_TN = merged_log_softmax(z_TV, self.reference.token)
        return DFT().loss(z_TV, y_T) + self.weight * merged_kl(self.reference.log_p, log_p_TN)

    @property
    def statistics(self) -> StatisticsSpec:
        """Only the sum at temperature 1."""
        return StatisticsSpec()

    @property
    def columns(self) -> Tensor:
        """The reference's tokens."""
        return self.reference.token

    def finalize(self, stats: LogitStatistics) -> LossAndCoefficients:
        """Loss; gradient (p_y + lambda (1 - r_R / p_R)) p_i - p_y [i = y] in the rest R."""
        log_u, log_r_TN = stats.u.log(), self.reference.log_p
        p_y = stats.x_y.exp() / stats.u
        log_rest = stats.log_rest - log_u
        log_p_TN = torch.cat([stats.x_columns - log_u[:, None], log_rest[:, None]], dim=-1)
        loss = p_y * (log_u - stats.x_y) + self.weight * merged_kl(log_r_TN, log_p_TN)
        log_r = log_r_TN[:, -1]
        ratio = torch.where(log_r > -torch.inf, (log_r - log_rest).clamp(max=LARGEST_LOG_RATIO).exp(), 0)
        return LossAndCoefficients(loss, (p_y + self.weight * (1 - ratio)) / stats.u, p_y)

    def columns_gradient(self, stats: LogitStatistics) -> Tensor:
        """(p_y + lambda) p_i - lambda r_i, without the label's term."""
        p_TK, r_TK = stats.x_columns.exp() / stats.u[:, None], self.reference.log_p[:, :-1].exp()
        p_y = stats.x_y.exp() / stats.u
        return (p_y + self.weight)[:, None] * p_TK - self.weight * r_TK
