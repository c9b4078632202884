"""This process's pipeline stage, shards and process groups: all that the package asks upstream about the layout."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_sfr.runtime.backend import device


def is_first_stage(vp_stage: int | None) -> bool:
    """Whether this chunk of the model embeds tokens."""
    return parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)


def is_last_stage(vp_stage: int | None) -> bool:
    """Whether this chunk of the model (or, without a chunk named, any chunk of this rank) computes the loss."""
    return parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)


def tensor_group() -> dist.ProcessGroup | None:
    """The tensor-parallel group; None if it has one rank."""
    one = parallel_state.get_tensor_model_parallel_world_size() == 1
    return None if one else parallel_state.get_tensor_model_parallel_group()


def tensor_rank() -> int:
    """This process's rank in its tensor-parallel group."""
    return parallel_state.get_tensor_model_parallel_rank()


def tensor_size() -> int:
    """Ranks of the tensor-parallel group."""
    return parallel_state.get_tensor_model_parallel_world_size()


def context_size() -> int:
    """Ranks of the context-parallel group, which share a sequence."""
    return parallel_state.get_context_parallel_world_size()


def context_rank() -> int:
    """This process's rank among those that share a sequence."""
    return parallel_state.get_context_parallel_rank()


def zigzag(bounds: Tensor, ranks: int, rank: int) -> Tensor:
    """Positions in the sequence of one context-parallel rank, in upstream's order: int64 [bounds[-1] / ranks].

    Each text of the sequence has 2 R equal parts for R ranks, and rank r has parts r and 2 R - 1 - r of each text. This
    is `thd_get_partitioned_indices` of Transformer Engine 2.20.2, which computes it on CUDA only.

    Args:
        bounds: where the texts start, and the end of the last one, in host memory: int [n + 1]. [0, S] divides the
            sequence as one text.
    Raises:
        ValueError: a text does not have 2 R equal parts.
    """
    bounds, length = bounds.long(), bounds.diff().long()
    if ranks == 1:
        return torch.arange(int(bounds[-1]))
    if len(uneven := length[length % (2 * ranks) != 0]):
        raise ValueError(
            f"{ranks} context-parallel ranks cannot share a text of {int(uneven[0])} tokens: pad each text of a packed "
            f"sequence to a multiple of {2 * ranks}"
        )
    local = torch.arange(int(bounds[-1]) // ranks)
    text = torch.searchsorted(bounds // ranks, local, right=True) - 1
    start, part = bounds[text], length[text] // (2 * ranks)
    offset = local - start // ranks
    return start + offset + part * torch.where(offset < part, rank, 2 * ranks - 2 - rank)


def sequence_positions(bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in the sequence of this context-parallel rank, and of all ranks in turn; see `zigzag`."""
    each = [zigzag(bounds, context_size(), rank) for rank in range(context_size())]
    return each[context_rank()], torch.cat(each)


def data_rank() -> int:
    """This process's rank among the replicas of its part of the model."""
    return parallel_state.get_data_parallel_rank()


def data_size() -> int:
    """Replicas of the model."""
    return parallel_state.get_data_parallel_world_size()


def broadcast_over_tensor(x: Tensor) -> Tensor:
    """x of the first rank of the tensor-parallel group, in place."""
    if (group := tensor_group()) is not None:
        dist.broadcast(x, parallel_state.get_tensor_model_parallel_src_rank(), group=group)
    return x


def broadcast_over_context(x: Tensor) -> Tensor:
    """x of the first rank of the context-parallel group, in place."""
    if context_size() > 1:
        group = parallel_state.get_context_parallel_group()
        dist.broadcast(x, dist.get_process_group_ranks(group)[0], group=group)
    return x


def sum_over_context(x: Tensor) -> Tensor:
    """In-place sum over the ranks that share a sequence. No gradient passes."""
    if context_size() > 1:
        dist.all_reduce(x, group=parallel_state.get_context_parallel_group())
    return x


def sum_over_data(x: Tensor) -> Tensor:
    """In-place sum over the data-parallel (and context-parallel) group."""
    dist.all_reduce(x, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return x


def sum_over_tensor(x: Tensor) -> Tensor:
    """In-place sum over the tensor-parallel group. No gradient passes."""
    if (group := tensor_group()) is not None:
        dist.all_reduce(x, group=group)
    return x


def sum_parts(x: Tensor) -> Tensor:
    """Sum over the tensor-parallel group whose backward is the identity: each rank holds a part of x."""
    return reduce_from_tensor_model_parallel_region(x.clone(), group=parallel_state.get_tensor_model_parallel_group())


def sum_parts_over_context(x: Tensor) -> Tensor:
    """Sum over the context-parallel group whose backward is the identity."""
    return reduce_from_tensor_model_parallel_region(x.clone(), group=parallel_state.get_context_parallel_group())


def spread_rows(x: Tensor) -> Tensor:
    """Sums [n, ...] over the tensor-parallel group and keeps this rank's n / ranks rows; backward gathers them."""
    return reduce_scatter_to_sequence_parallel_region(
        x.contiguous(), group=parallel_state.get_tensor_model_parallel_group()
    )


def all_positions(h_SBH: Tensor, *, sharded: bool) -> Tensor:
    """The hidden states of all positions on every tensor-parallel rank; backward sums the ranks' gradients.

    sharded: whether h holds only this rank's positions.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if sharded:
        return gather_from_sequence_parallel_region(h_SBH, group=group)
    return copy_to_tensor_model_parallel_region(h_SBH, group=group)


def gather_over_context(x: Tensor) -> Tensor:
    """[S, ...] of all context-parallel ranks in turn, [R S, ...]; backward sums the ranks' gradients."""
    return gather_from_sequence_parallel_region(x, group=parallel_state.get_context_parallel_group())


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return torch.where(factor == 0, torch.zeros_like(grad), grad * factor.to(grad.dtype)), None


def scale_gradient(x: Tensor, factor: Tensor | float) -> Tensor:
    """x, whose gradient is multiplied by a factor. At 0 it is exactly 0, even where it would be NaN or infinite.

    Args:
        factor: a number, or a tensor [1] that stays on the device, so that nothing waits for it.
    """
    if isinstance(factor, float):
        return x if factor == 1 else _ScaleGradient.apply(x, torch.full((1,), factor, device=x.device))
    return _ScaleGradient.apply(x, factor)


def largest_of_all(values: list[float]) -> list[float]:
    """The largest of each value over all ranks."""
    if not dist.is_initialized():
        return values
    x = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x.tolist()


def sum_of_all(value: float) -> float:
    """The sum of a value over all ranks."""
    x = torch.tensor(value, dtype=torch.float64, device=device())
    dist.all_reduce(x)
    return x.item()


def union_over_stages(names: set[str]) -> set[str]:
    """The names of this rank and of the other stages of its pipeline."""
    group = parallel_state.get_pipeline_model_parallel_group()
    found: list[set[str]] = [set()] * dist.get_world_size(group)
    dist.all_gather_object(found, names, group=group)
    return set().union(*found)


def print_on_last_rank(line: str) -> None:
    """Prints a line on the rank whose output has Megatron's losses."""
    if not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1:
        print(line, flush=True)
