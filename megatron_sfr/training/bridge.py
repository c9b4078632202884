"""The forward step as one function, for Megatron-Bridge and for any other training loop around Megatron Core.

Shapes: B samples, S positions, P anchors, R targets, D embedding dimension.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model

from megatron_sfr.model.flow_head import FlowHeadPlan
from megatron_sfr.objectives.sfr.schedule import ScheduleOptions
from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
from megatron_sfr.objectives.token.loss_base import TokenLoss
from megatron_sfr.objectives.token.registry import LOSSES
from megatron_sfr.objectives.token.token_loss import check_loss
from megatron_sfr.training.auxiliary_loss import Batch, FlowTerm, TermOptions
from megatron_sfr.training.forward_step import ForwardStep
from megatron_sfr.training.lm_head import CHUNK_TOKENS
from megatron_sfr.training.step_context import StepContext, bridge_context, megatron_context

TEXT = ("tokens", "labels", "loss_mask", "position_ids")
ANCHORS = ("anchor_position", "anchor_sample", "anchor_weight", "anchor_place", "anchor_row", "anchor_horizon")


def flow_head_plan(
    dim: int,
    sfr: TermOptions | None = None,
    schedule: ScheduleOptions | None = None,
    *,
    horizons: int = 1,
    seed: int = 1234,
    fresh: bool = False,
    statistics: tuple[np.ndarray, np.ndarray] | None = None,
) -> FlowHeadPlan:
    """The flow head that a forward step with these options needs, for `attach_head`.

    Args:
        dim: dimension D of the target embeddings.
        sfr: as in `forward_step`.
        schedule: as in `forward_step`.
        horizons: number of futures per anchor.
        seed: of the initial weights.
        fresh: whether the checkpoint to load may lack the head; the head then keeps its initial weights.
        statistics: mean and standard deviation of the targets, [D] each, for targets.scale = whiten.
    Returns:
        The plan of the head.
    Raises:
        ValueError: dim or horizons is below 1, or targets.scale = whiten lacks its statistics.
    Example:
        >>> import megatron_sfr as sfr
        >>> options = sfr.TermOptions(gate=sfr.GateOptions(kind="dynamic"))
        >>> hook = sfr.attach_head(sfr.flow_head_plan(384, options))
        >>> sfr.flow_head_plan(384, options).gate_bins
        8
    """
    sfr, schedule = sfr or TermOptions(), schedule or ScheduleOptions()
    if dim < 1 or horizons < 1:
        raise ValueError(f"dim = {dim} and horizons = {horizons}: give at least 1 of each")
    if (sfr.targets.scale, sfr.targets.whiten) == ("whiten", "store") and statistics is None:
        raise ValueError("targets.scale = whiten needs `statistics` of the targets; or set targets.whiten to ema")
    return FlowHeadPlan(
        sfr.head,
        dim=dim,
        horizons=horizons,
        has_network=sfr.sfr.loss != "cka",
        gate_bins=sfr.gate.bins,
        clipped_apart=schedule.weight_on == "hidden",
        weight=schedule.weight,
        seed=seed,
        fresh=fresh,
        statistics=statistics,
    )


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

    Megatron-Bridge's `pretrain` and `finetune` accept it, and pass their GlobalState as its first argument. Under
    `pretrain` of megatron.training the first argument is None, for its global arguments: functools.partial(step, None).
    Another loop passes a StepContext. The loss is a sum that the number of tokens divides: set calculate_per_token_loss
    in the model's configuration.

    Args:
        vocab_size: number of tokens, without the columns that pad the vocabulary.
        loss: the loss of each token. Default: cross-entropy.
        sfr: options of the auxiliary loss. The model then needs a flow head (`attach_head`), and the batches anchors
            and targets. None trains on the token loss alone.
        schedule: the weight of the auxiliary loss.
        resets_attention: whether attention stays within the documents that `document` [B, S] of a batch numbers. With
            Transformer Engine B is 1, and R context-parallel ranks need documents of a multiple of 2 R positions.
        chunk_tokens: largest number of positions whose logits exist at a time. LM head and loss are computed in chunks
            of supervised positions. 0 computes all logits at once.
    Returns:
        A function (state, data_iterator, model) -> (output, loss_func). Batches are dictionaries of tensors, which
        docs/training.md lists: tokens, labels, position_ids (int64) and loss_mask (fp32), [B, S] each, and for `sfr`
        anchor_position, anchor_sample (int64), anchor_weight (fp32), [B, P] each, and target [B, P, D].
        loss_func(output) returns the summed loss, the number of tokens that divides it, and {name: [sum, count]} for
        the log.
    Raises:
        ValueError: an argument has another type; by the function: the model has no flow head or one of other options,
            or a batch lacks an entry, has other shapes, or supervises a label outside the vocabulary (if it is on CPU).
    Example:
        >>> import inspect, megatron_sfr as sfr
        >>> step = sfr.forward_step(151_936, loss=sfr.GEM(beta=0.7), sfr=sfr.TermOptions())
        >>> list(inspect.signature(step).parameters)  # pretrain(config, step)
        ['state', 'data_iterator', 'model']
    """
    loss = loss or CrossEntropy()
    check_loss(loss)
    for given, kind in ((sfr, TermOptions), (schedule, ScheduleOptions)):
        if not isinstance(given, kind | None):
            raise ValueError(f"{given!r} is not a {kind.__name__}: give one, or leave it out")
    term = FlowTerm(sfr) if sfr is not None else None
    name = next((name for name, known in LOSSES.items() if known.loss is type(loss)), type(loss).__name__)
    forward = ForwardStep(
        vocab_size, name, loss, term, schedule or ScheduleOptions(), resets_attention, chunk_tokens=chunk_tokens
    )
    check = partial(
        check_batch, vocab_size=vocab_size, resets_attention=resets_attention, reads_anchors=sfr is not None
    )

    def step(state: Any, data_iterator: Iterator[Any], model: MegatronModule) -> tuple[Any, Any]:
        if isinstance(state, StepContext):
            context = state
        else:
            context = megatron_context() if state is None else bridge_context(state)
        inner = unwrap_model(model)
        if inner.post_process and sfr is not None:
            check_head(inner, sfr)
        return forward(iter(lambda: check(next(data_iterator), inner), None), model, context)

    return step


def check_head(model: MegatronModule, sfr: TermOptions) -> None:
    """ValueError if the model of the last stage has no flow head, or one with another network, average or gate."""
    head = getattr(model, "flow_head", None)
    if head is None:
        raise ValueError(
            "the model has no flow_head: run attach_head(plan) on its chunks before they are wrapped in DDP"
        )
    has = head.net is not None, head.ema is not None, len(head.state.baseline)
    has_network, bins = sfr.sfr.loss != "cka", has[2] if sfr.gate.kind == "none" else sfr.gate.bins
    if has != (has_network, has_network and sfr.head.stores_ema, bins):
        raise ValueError("the flow head was built with other options than the loss: build its plan by flow_head_plan")


def check_batch(
    batch: Any, model: MegatronModule, vocab_size: int, *, resets_attention: bool, reads_anchors: bool
) -> Batch:
    """The batch of a stage, with the anchors' default entries. Raises ValueError if it does not fit."""
    if not isinstance(batch, dict) or not all(isinstance(x, torch.Tensor) for x in batch.values()):
        raise ValueError(f"a batch has to be a dictionary of tensors, and this one is {batch!r:.60}")
    last = model.post_process
    needs = [*(["tokens"] if model.pre_process else []), *(["labels", "loss_mask"] if last else [])]
    needs += ["document"] if resets_attention else []
    needs += ["target", *ANCHORS[:3]] if reads_anchors and last else []
    if missing := [name for name in needs if name not in batch]:
        raise ValueError(f"the batch has no {', '.join(missing)}; it has {', '.join(batch)}")
    check_shapes({name: batch[name] for name in TEXT if name in batch}, "[B, S]")
    if last and batch["labels"].is_cpu:  # a GPU would have to wait for the answer
        check_labels(batch["labels"], batch["loss_mask"], vocab_size)
    return with_anchors(batch) if reads_anchors and last else batch


def check_labels(labels: torch.Tensor, loss_mask: torch.Tensor, vocab_size: int) -> None:
    """ValueError for a supervised label outside the vocabulary, such as -100."""
    wrong = labels[(loss_mask > 0) & ((labels < 0) | (labels >= vocab_size))]
    if len(wrong):
        raise ValueError(
            f"a label with loss_mask 1 is {int(wrong[0])}: give tokens from 0 to {vocab_size - 1}, or loss_mask 0"
        )


def with_anchors(batch: Batch) -> Batch:
    """A batch with all entries of its anchors: by default each has its own target, of horizon 0."""
    position = batch["anchor_position"]
    rows = torch.arange(position.shape[-1], device=position.device).expand_as(position)
    default = {"anchor_place": position, "anchor_row": rows, "anchor_horizon": torch.zeros_like(position)}
    batch, target = default | batch, batch["target"]
    check_shapes({name: batch[name] for name in ANCHORS}, "[B, P]")
    fewer = batch["anchor_row"] is rows and target.shape[1:2] != rows.shape[1:]
    if target.ndim != 3 or len(target) != len(position) or fewer:
        raise ValueError(f"target has shape {tuple(target.shape)}: give [B, P, D], or [B, R, D] and anchor_row")
    return batch


def check_shapes(tensors: Batch, what: str) -> None:
    """ValueError unless all tensors are matrices of one shape."""
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"give {what} each: {', '.join(f'{name} is {list(shape)}' for name, shape in shapes.items())}")
