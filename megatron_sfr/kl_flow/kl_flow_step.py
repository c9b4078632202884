"""KL-flow's forward step (arXiv 2411.16821): from a noisy point of each text to the cross-entropy of its clean tokens.

Time and noise depend only on the sample, so every pipeline stage computes them itself.
Shapes: B samples, S positions of the model, N positions of the text, V vocabulary columns of the shard.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.kl_flow.corruption import KLFlowOptions, draw_time, free_text, noisy_point
from megatron_sfr.kl_flow.model import set_time, time_positions
from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
from megatron_sfr.objectives.token.loss_base import IGNORED
from megatron_sfr.objectives.token.token_loss import vocab_parallel_loss
from megatron_sfr.runtime.parallel import is_first_stage, is_last_stage, tensor_group, tensor_rank
from megatron_sfr.training.auxiliary_loss import DATASET_BITS, Batch
from megatron_sfr.training.forward_step import check_finite, next_batch, pair
from megatron_sfr.training.step_context import StepContext


@dataclass(frozen=True)
class TaskOptions:
    """The kind of model to train."""

    training_task: Literal["autoregressive", "kl-flow"] = "autoregressive"
    """'autoregressive' (default): predict each token from the previous ones. 'kl-flow': generate all tokens of a text
    at once by flow matching on the simplex (arXiv 2411.16821), with bidirectional attention. Both use the same data,
    parallel layouts and checkpoints."""


@dataclass(frozen=True)
class Texts:
    """A microbatch of KL-flow: clean tokens, free positions, times and sample numbers."""

    tokens_BN: Tensor
    free_BN: Tensor
    t_B: Tensor
    sample_B: Tensor
    counted_BN: Tensor
    """Positions in the loss."""


class KLFlowStep:
    """Upstream's forward_step_func. Stateless."""

    def __init__(
        self,
        vocab_size: int,
        seq_length: int,
        options: KLFlowOptions,
        time_everywhere: bool,
        end_token: int | None = None,
    ) -> None:
        """
        Args:
            time_everywhere: whether the intermediate pipeline stages need the time too.
            end_token: ends documents, and fills up their gaps. None for conversations: it is their replies' last token.
        """
        self.vocab_size, self.seq_length, self.options = vocab_size, seq_length, options
        self.time_everywhere, self.end_token = time_everywhere, end_token

    def __call__(self, data_iterator: Iterator[Batch], model: MegatronModule, context: StepContext) -> tuple[Any, Any]:
        """One microbatch: the stage's output and, on the last stage, the function that turns it into the loss."""
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        first, last = is_first_stage(vp_stage), is_last_stage(vp_stage)
        x_BNV, counted_BN, more = None, None, dict[str, Any]()
        if first or last or self.time_everywhere:
            device = next(model.parameters()).device
            batch = {name: x.to(device, non_blocking=True) for name, x in next_batch(data_iterator).items()}
            texts = self.texts(batch, self.seq_length - time_positions(model))
            set_time(model, texts.t_B)
            if first:
                table = get_attr_wrapped_model(model, "embedding").word_embeddings.weight
                x_BNV = self.points(texts, len(table)).to(table.dtype)
            if last:
                counted_BN = texts.counted_BN
                more = {"output_processor": self.losses, "output_processor_context": texts}
        output = model(input_ids=x_BNV, position_ids=None, attention_mask=None, **more)
        return output, partial(self.loss, counted_BN, context)

    def texts(self, batch: Batch, length: int) -> Texts:
        """The clean tokens, which of them are free, and the times."""
        sample_B = batch["sample"]
        if "dataset_id" in batch:  # in a blend each dataset numbers its samples from 0
            sample_B = sample_B + (batch["dataset_id"] << DATASET_BITS)
        sequences = batch["tokens"], batch["labels"], batch["loss_mask"]
        tokens_BN, free_BN = free_text(*sequences, sample_B, length, self.options, self.end_token)
        counted_BN = free_BN
        if self.options.loss == "all":  # a text without free positions has nothing to learn from
            counted_BN = free_BN.any(-1, keepdim=True).expand_as(free_BN)
        return Texts(tokens_BN, free_BN, draw_time(sample_B, self.options), sample_B, counted_BN)

    def points(self, texts: Texts, width: int) -> Tensor:
        """x_t in this rank's shard of the vocabulary: [B, N, V]."""
        of = texts.tokens_BN, texts.free_BN, texts.t_B, texts.sample_B
        return noisy_point(*of, self._vocab(width), width, self.options)

    def _vocab(self, width: int) -> Vocab:
        return Vocab(self.vocab_size, tensor_rank() * width, tensor_group())

    def losses(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        context: Texts,
        runtime_gather_output: bool | None,
        scale_logits: Any,
        **_: Any,
    ) -> Tensor:
        """Upstream's output_processor: the denoiser's cross-entropy [B, S], 0 outside the counted positions."""
        logits_SBV, _bias = output_layer(
            hidden_states, weight=output_weight, runtime_gather_output=runtime_gather_output
        )
        y_BN = torch.where(context.counted_BN, context.tokens_BN, IGNORED)
        y_SB = F.pad(y_BN, (len(logits_SBV) - y_BN.shape[1], 0), value=IGNORED).t()
        z_TV = scale_logits(logits_SBV).flatten(0, 1)
        loss_T, _cross_entropy_T = vocab_parallel_loss(
            z_TV, y_SB.reshape(-1), CrossEntropy(), self._vocab(z_TV.shape[-1]), overwrite=True
        )
        return loss_T.view(y_SB.shape).t()

    def loss(self, counted_BN: Tensor | None, context: StepContext, loss_BS: Tensor) -> tuple[Tensor, Tensor, dict]:
        """Upstream's loss_func: the sum to differentiate, the positions that divide it, {name: [sum, count]}."""
        assert counted_BN is not None
        total, tokens = loss_BS.sum(), counted_BN.sum()
        if context.checks_nan:
            check_finite(total)
        return total, tokens.to(torch.int), {"kl-flow loss": pair(total, tokens)}
