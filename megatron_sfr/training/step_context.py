"""What the forward step needs from the training loop, and adapters for Megatron's loop and for Megatron-Bridge's.

The forward step itself reads no global arguments, so that it runs in any loop around Megatron Core.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.module import MegatronModule


@dataclass(frozen=True)
class StepContext:
    """The state of the training loop during one microbatch.

    Example:
        >>> import megatron_sfr as sfr
        >>> context = sfr.StepContext(iteration=0, train_iters=1000, num_microbatches=8, implementation="local")
        >>> context.checks_nan
        True
    """

    iteration: int
    """Number of the step, from 0."""
    train_iters: int
    """Steps of the whole run; the weight's decay ends there."""
    num_microbatches: int
    """Microbatches of this step on this data-parallel rank."""
    writer: Any = None
    """TensorBoard's SummaryWriter, on the rank that has one."""
    implementation: Literal["local", "transformer_engine"] = "transformer_engine"
    """Implementation of the layers. Attention within the documents of a packed sequence needs to know it."""
    checks_nan: bool = True
    """Whether a loss of NaN ends the run."""
    reports_personas: bool = False
    """Whether the metrics by persona since the last report are written after this step."""


class Step(Protocol):
    """A forward step that is given the state of the loop."""

    def __call__(self, data_iterator: Iterator[Any], model: MegatronModule, context: StepContext) -> tuple[Any, Any]:
        """One microbatch: the output of this pipeline stage, and the function that turns it into the loss."""


def megatron_context() -> StepContext:
    """Reads the context from the global arguments of Megatron's own training loop, megatron.training."""
    from megatron.training import get_args, get_tensorboard_writer

    args = get_args()
    # --skip-train evaluates before the loop has set curr_iteration.
    iteration = args.curr_iteration if hasattr(args, "curr_iteration") else args.iteration
    return StepContext(
        iteration=iteration,
        train_iters=args.train_iters,
        num_microbatches=get_num_microbatches(),
        writer=get_tensorboard_writer(),
        implementation=args.transformer_impl,
        checks_nan=args.check_for_nan_in_loss_and_grad,
        reports_personas=bool(args.eval_interval) and (iteration + 1) % args.eval_interval == 0,
    )


def for_megatron(
    step: Step, timed: Callable[[Iterator[Any]], Iterator[Any]] | None = None
) -> Callable[[Iterator[Any], MegatronModule], tuple[Any, Any]]:
    """The forward_step_func of megatron.training's `pretrain`. timed: wraps the batches of training steps."""

    def forward_step(data_iterator: Iterator[Any], model: MegatronModule) -> tuple[Any, Any]:
        if timed is not None and torch.is_grad_enabled():
            data_iterator = timed(data_iterator)
        return step(data_iterator, model, megatron_context())

    return forward_step


def bridge_context(state: Any) -> StepContext:
    """Reads the context from the GlobalState of Megatron-Bridge's training loop."""
    return StepContext(
        iteration=state.train_state.step,
        train_iters=state.cfg.train.train_iters,
        num_microbatches=get_num_microbatches(),
        writer=state.tensorboard_logger,
        implementation=state.cfg.model.transformer_impl,
        checks_nan=state.cfg.rerun_state_machine.check_for_nan_in_loss,
    )
