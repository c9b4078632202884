"""The anchors of a row of tokens as arrays of the same shapes in a whole run: targets once, and who is to foresee them.

Letters: S positions of a row, which holds one conversation or several; R rows of targets and P entries of the loss,
each the most of any row of tokens; D dimension of the embeddings. An entry is a position that is to foresee one row of
targets at one horizon.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from megatron_sfr.data.packing import most_in_a_row
from megatron_sfr.data.prepared import Anchors, PreparedData
from megatron_sfr.objectives.sfr import anchor_weights

Fill = Literal["anchors_only", "nearest"]


@dataclass(frozen=True)
class AnchorSizes:
    """R and P: what no row of tokens of a run exceeds."""

    rows: int = 0
    entries: int = 0


@dataclass(frozen=True)
class RowAnchors:
    """The anchors of one row of tokens, positions and responses counted over the row; int64 [A] each but `anchors`.

    sample  number of the conversation that an anchor is of, among all of a run: it keys the noise
    start   where that conversation begins in the row
    """

    anchors: Anchors
    sample: np.ndarray
    start: np.ndarray


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


def anchor_sizes(folders: Sequence[PreparedData], fill: Fill, capacity: int | None = None) -> AnchorSizes:
    """The sizes that fit every row of these prepared folders, which share their horizons.

    A row is one sample, or samples packed into `capacity` positions.
    """
    horizons = len(folders[0].manifest.horizons)
    if capacity is None:
        rows = max(data.manifest.max_anchors for data in folders)
        tokens = max(data.manifest.max_response_tokens for data in folders)
    else:
        rows = max(most_in_a_row(data.anchor_counts, data.lengths, capacity) for data in folders)
        tokens = capacity
    return AnchorSizes(rows, rows if fill == "anchors_only" else tokens * horizons)


def anchor_arrays(row: RowAnchors, fill: Fill, sizes: AnchorSizes) -> dict[str, np.ndarray]:
    """Of each entry [P] its position and its row of targets, its horizon, and what keys its noise: the conversation and
    the position there (int64); its weight (fp32).

    Padding is 0 everywhere; its weight of 0 removes it from the loss.
    """
    anchors = row.anchors
    of, ordinal = entries_at_anchors(anchors) if fill == "anchors_only" else entries_of_nearest(anchors)
    weight = anchor_weights(ordinal, anchors.length[of], anchors.response[of])
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
