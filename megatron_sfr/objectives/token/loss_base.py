"""The two forms of a token loss: any loss in plain torch, and losses whose gradient has a closed form.

Shapes: T tokens, V tokens of the whole vocabulary, C chosen columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import LogitStatistics, StatisticsSpec

IGNORED = -100
"""The label of tokens without a loss, as in torch. Every negative label is ignored."""


class TokenLoss(ABC):
    """A loss of one token, as a function of its logits and its label.

    Subclasses are frozen dataclasses whose fields are the options; `register` gives them a name. Only `loss` is
    needed: the gradient then comes from autograd. Over a sharded vocabulary the logits are gathered, in blocks of
    tokens, and every rank computes the loss of the whole vocabulary.

    Example:
        >>> import torch, megatron_sfr as sfr
        >>> class Brier(sfr.TokenLoss):
        ...     def loss(self, z_TV, y_T):
        ...         one_TV = torch.nn.functional.one_hot(y_T, z_TV.shape[-1])
        ...         return (z_TV.softmax(-1) - one_TV).square().sum(-1)
        >>> loss, _ = sfr.token_loss(torch.zeros(1, 4), torch.tensor([2]), Brier())
        >>> loss
        tensor([0.7500])
    """

    @abstractmethod
    def loss(self, z_TV: Tensor, y_T: Tensor) -> Tensor:
        """The loss in plain torch, with stop-gradients where the paper has them.

        The loss of a token may only depend on its own logits and label, because tokens are processed in blocks.

        Args:
            z_TV: logits of the whole vocabulary without padding, fp32 (or float64): [T, V].
            y_T: labels, int64 in [0, V): [T]. The results of ignored tokens are discarded.

        Returns:
            The loss of each token: [T].
        """

    def logged(self, loss: Tensor, cross_entropy: Tensor) -> dict[str, Tensor]:
        """Further values of each token, whose means over the supervised tokens are logged under these names.

        Args:
            loss: the loss of each token, as computed for training, in any shape.
            cross_entropy: its cross-entropy, in the same shape.

        Returns:
            Tensors of that shape; by default none.
        """
        return {}

    def of_batch(self, batch: Mapping[str, Tensor], index_N: Tensor | None) -> "TokenLoss":
        """The loss of the positions of a microbatch, with what it reads of the batch; by default the loss itself.

        Args:
            batch: the microbatch of a training, [B, S, ...] each.
            index_N: the positions, as indices into [S, B]; None: all.
        """
        return self

    def split(self, chunks: int) -> Sequence["TokenLoss"]:
        """The loss of each chunk of the tokens, divided as by `Tensor.tensor_split`; by default the same for all."""
        return [self] * chunks


class LossAndCoefficients(NamedTuple):
    """The loss of each token and the coefficients of its gradient with respect to the logits.

    dL/dz_i = softmax_coef w_i exp(x_i / beta) - label_coef [i = y], with x_i, w_i and beta as in `StatisticsSpec`.

    Example:
        >>> import torch, megatron_sfr as sfr
        >>> u = torch.tensor([4.0])  # sum of exp(x_i), of which the label has 1
        >>> sfr.LossAndCoefficients(loss=u.log(), softmax_coef=1 / u, label_coef=torch.ones(1)).softmax_coef
        tensor([0.2500])
    """

    loss: Tensor
    """[T]."""
    softmax_coef: Tensor
    """[T]."""
    label_coef: Tensor
    """[T]."""


class ClosedFormLoss(TokenLoss):
    """A token loss whose gradient is a weighted softmax minus a one-hot vector.

    Loss and gradient come from a few sums over the logits. Two passes of fused kernels compute them; the logits are
    never gathered or copied. `loss` defines what they compute, and the tests compare both.

    Example:
        >>> import torch, megatron_sfr as sfr
        >>> class Halved(sfr.ClosedFormLoss):  # half of cross-entropy
        ...     def loss(self, z_TV, y_T):
        ...         return 0.5 * torch.nn.functional.cross_entropy(z_TV, y_T, reduction="none")
        ...     @property
        ...     def statistics(self):
        ...         return sfr.StatisticsSpec()
        ...     def finalize(self, stats):
        ...         half = torch.full_like(stats.u, 0.5)
        ...         return sfr.LossAndCoefficients(half * (stats.u.log() - stats.x_y), half / stats.u, half)
        >>> loss, cross_entropy = sfr.token_loss(torch.zeros(1, 4), torch.tensor([2]), Halved())
        >>> (loss / cross_entropy).item()
        0.5
    """

    @property
    @abstractmethod
    def statistics(self) -> StatisticsSpec:
        """The statistics of the logits that `finalize` needs."""

    @abstractmethod
    def finalize(self, stats: LogitStatistics) -> LossAndCoefficients:
        """Loss and gradient coefficients of each token, from the statistics of its logits."""

    @property
    def columns(self) -> Tensor | None:
        """Tokens of the vocabulary, chosen for each token, whose gradient is not that of `LossAndCoefficients`.

        int64 [T, C], or None (the default). The statistics of such a loss must be `StatisticsSpec()`.
        """
        return None

    def columns_gradient(self, stats: LogitStatistics) -> Tensor:
        """dL/dz of the chosen columns, [T, C], without the term of the label, -label_coef [i = y]."""
        raise NotImplementedError(f"{type(self).__name__} has chosen columns: define their gradient")
