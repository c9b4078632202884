"""The forward step as one function, for Megatron-Bridge and for any other training loop around Megatron Core."""

from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.transformer.module import MegatronModule

from megatron_sfr.objectives.sfr.schedule import ScheduleOptions
from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
from megatron_sfr.objectives.token.loss_base import TokenLoss
from megatron_sfr.objectives.token.registry import LOSSES
from megatron_sfr.training.auxiliary_loss import FlowTerm, TermOptions
from megatron_sfr.training.forward_step import ForwardStep
from megatron_sfr.training.lm_head import CHUNK_TOKENS
from megatron_sfr.training.step_context import StepContext, bridge_context


def forward_step(
    vocab_size: int,
    *,
    loss: TokenLoss | None = None,
    sfr: TermOptions | None = None,
    schedule: ScheduleOptions | None = None,
    resets_attention: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Callable[[Any, Iterator[Any], MegatronModule], tuple[Any, Any]]:
    """Returns a forward step: one microbatch through the model, with token loss and auxiliary loss.

    Megatron-Bridge's `pretrain` and `finetune` accept it, and pass their GlobalState as its first argument. Another
    loop passes a StepContext. The loss is a sum that the number of tokens divides: set calculate_per_token_loss in the
    model's configuration.

    Args:
        vocab_size: number of tokens, without the columns that pad the vocabulary.
        loss: the loss of each token. Default: cross-entropy.
        sfr: options of the auxiliary loss. The model then needs a flow head (`attach_head`), and the batches the
            targets and anchors of our datasets. None trains on the token loss alone.
        schedule: the weight of the auxiliary loss.
        resets_attention: whether attention stays within the documents that `document` [B, S] of a batch numbers. With
            Transformer Engine B is 1, and R context-parallel ranks need documents of a multiple of 2 R positions.
        chunk_tokens: largest number of positions whose logits exist at a time. LM head and loss are computed in chunks
            of supervised positions. 0 computes all logits at once.
    Returns:
        A function (state, data_iterator, model) -> (output, loss_func). Batches are dictionaries of tokens, labels,
        position_ids (int64) and loss_mask (fp32), [B, S] each. loss_func(output) returns the summed loss, the number
        of tokens that divides it, and {name: [sum, count]} for the log.
    Raises:
        RuntimeError: by the function, if `sfr` is given and the model has no flow head.
    Example:
        >>> import inspect, megatron_sfr as sfr
        >>> step = sfr.forward_step(151_936, loss=sfr.GEM(beta=0.7), sfr=sfr.TermOptions())
        >>> list(inspect.signature(step).parameters)  # pretrain(config, step)
        ['state', 'data_iterator', 'model']
    """
    loss, term = loss or CrossEntropy(), FlowTerm(sfr) if sfr is not None else None
    name = next((name for name, known in LOSSES.items() if known.loss is type(loss)), type(loss).__name__)
    forward = ForwardStep(
        vocab_size, name, loss, term, schedule or ScheduleOptions(), resets_attention, chunk_tokens=chunk_tokens
    )

    def step(state: Any, data_iterator: Iterator[Any], model: MegatronModule) -> tuple[Any, Any]:
        context = state if isinstance(state, StepContext) else bridge_context(state)
        return forward(data_iterator, model, context)

    return step
