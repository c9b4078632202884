"""The anchors of a row of tokens as arrays of the same shapes in a whole run: targets once, and who is to foresee them.

Letters: S positions of a row, which holds one conversation or several; R rows of targets and P entries of the loss,
each the most of any row of tokens in a run; D dimension of the embeddings. An entry is a position that is to foresee
one row of targets at one horizon.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_sfr.data.prepared import Anchors
from megatron_sfr.data.targets import TargetStore
from megatron_sfr.data.texts import HasSegments
from megatron_sfr.objectives.sfr import anchor_weights

Fill = Literal["anchors_only", "nearest"]


@dataclass(frozen=True)
class AnchorSizes:
    """R and P: what no row of tokens exceeds."""

    rows: int = 0
    entries: int = 0


@dataclass
class AnchorPlan:
    """How the datasets of one run make arrays of their anchors.

    store    folder of the store inside each prepared folder
    fill     which positions have targets
    folders  the prepared folders, as online targets number them; empty where the datasets read stored ones
    sizes    what fits every row of all datasets, known when all are built
    """

    store: str
    fill: Fill
    folders: Sequence[Path] = ()
    sizes: AnchorSizes = AnchorSizes()


@dataclass(frozen=True)
class RowAnchors:
    """The anchors of one row of tokens, their positions and responses counted over the row.

    sample  number of the conversation or row that an anchor is of, among all of a run: it keys the noise; int64 [A]
    start   position in the row that the noise counts places from; int64 [A]
    falling whether the weight falls from the first token of a response to its last, or all weigh alike
    """

    anchors: Anchors
    sample: np.ndarray
    start: np.ndarray
    falling: bool = True


def join_anchors(parts: Sequence[Anchors], samples: np.ndarray, starts: np.ndarray) -> RowAnchors:
    """The anchors of conversations `samples` [n] that stand at positions `starts` [n] of one row."""
    counts = [len(part.position) for part in parts]
    responses = np.cumsum([0, *(int(part.response.max(initial=-1)) + 1 for part in parts)])[:-1]
    columns = {
        field.name: np.concatenate([getattr(part, field.name).astype(np.int64) for part in parts])
        for field in fields(Anchors)
    }
    start = np.repeat(starts, counts)
    columns["position"] += start
    columns["response"] += np.repeat(responses, counts)
    return RowAnchors(Anchors(**columns), np.repeat(samples, counts), start)


class TargetReader:
    """Adds the anchors of a row and their targets to its arrays."""

    def __init__(self, prepared: HasSegments, plan: AnchorPlan) -> None:
        self.plan = plan
        self.number = plan.folders.index(prepared.folder) if plan.folders else None
        self.store = None if plan.folders else TargetStore.open(prepared.folder / plan.store, prepared)

    def arrays(self, row: RowAnchors) -> dict[str, Any]:
        """`anchor_arrays`, and fp16 `target` [R, D]; for online targets where they will be: `target_row` [R], -1 being
        padding, of `target_store`."""
        sizes, segment = self.plan.sizes, row.anchors.segment
        arrays = anchor_arrays(row, self.plan.fill, sizes)
        if self.store is None:
            return arrays | {"target_row": padded(segment + 1, sizes.rows, np.int64) - 1, "target_store": self.number}
        return arrays | {"target": padded(self.store[segment], sizes.rows, np.float16)}


def anchor_arrays(row: RowAnchors, fill: Fill, sizes: AnchorSizes) -> dict[str, np.ndarray]:
    """Of each entry [P] its position and its row of targets, its horizon, and what keys its noise: the conversation and
    the position there (int64); its weight (fp32).

    Padding is 0 everywhere; its weight of 0 removes it from the loss.
    """
    anchors = row.anchors
    of, ordinal = entries_at_anchors(anchors) if fill == "anchors_only" else entries_of_nearest(anchors)
    place = ordinal if row.falling else np.zeros_like(ordinal)
    weight = anchor_weights(place, anchors.length[of], anchors.response[of])
    position = (anchors.position - anchors.ordinal)[of] + ordinal
    columns = {
        "position": position,
        "row": of,
        "horizon": anchors.horizon[of],
        "sample": row.sample[of],
        "place": position - row.start[of],
    }
    arrays = {f"anchor_{name}": padded(values, sizes.entries, np.int64) for name, values in columns.items()}
    return arrays | {"anchor_weight": padded(weight, sizes.entries, np.float32)}


def entries_at_anchors(anchors: Anchors) -> tuple[np.ndarray, np.ndarray]:
    """Row and ordinal of each entry, int64 [n]: each row at the anchor it was made for."""
    return np.arange(len(anchors.ordinal)), anchors.ordinal.astype(np.int64)


def entries_of_nearest(anchors: Anchors) -> tuple[np.ndarray, np.ndarray]:
    """Row and ordinal of each entry, int64 [n]: for every ordinal of a reply the nearest anchor of that horizon.

    The earlier one of two that are equally near. Where a reply has no anchor at a horizon, there is no entry. As in the
    paper's code; note that the target of an earlier anchor begins before the position, at tokens it has already read.
    """
    order = np.lexsort((anchors.ordinal, anchors.horizon, anchors.response))
    response, horizon = anchors.response[order], anchors.horizon[order]
    at, length = anchors.ordinal[order].astype(np.int64), anchors.length[order].astype(np.int64)
    same = (response[1:] == response[:-1]) & (horizon[1:] == horizon[:-1])  # as the anchor before
    # Each anchor serves the ordinals [begin, end): up to the middle between two anchors, which is the earlier one's.
    middle = (at[1:] + at[:-1]) // 2 + 1
    begin, end = np.zeros_like(at), length.copy()
    begin[1:] = np.where(same, middle, 0)
    end[:-1] = np.where(same, middle, length[:-1])
    count = end - begin
    first = np.cumsum(count) - count  # entry of each anchor's first ordinal
    return np.repeat(order, count), np.arange(count.sum()) + np.repeat(begin - first, count)


def padded(values: np.ndarray, size: int, dtype: type[np.generic]) -> np.ndarray:
    """values [n, ...] as [size, ...], 0 after them."""
    whole = np.zeros((size, *values.shape[1:]), dtype)
    whole[: len(values)] = values
    return whole
