"""A sample's anchors as arrays of the same shapes in a whole run: its targets once, and who is to foresee them.

Letters: R rows of targets and P entries of the loss, each the most of any sample; D dimension of the embeddings.
An entry is a position that is to foresee one row at one horizon.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_sfr.data.prepared import Anchors, PreparedManifest
from megatron_sfr.data.targets import TargetStore
from megatron_sfr.objectives.sfr import anchor_weights

Fill = Literal["anchors_only", "nearest"]


@dataclass(frozen=True)
class AnchorSizes:
    """R and P: what no sample of a run exceeds."""

    rows: int = 0
    entries: int = 0


def anchor_sizes(manifests: Sequence[PreparedManifest], fill: Fill) -> AnchorSizes:
    """The sizes that fit every sample of these prepared folders, which share their horizons."""
    rows = max(manifest.max_anchors for manifest in manifests)
    if fill == "anchors_only":
        return AnchorSizes(rows, rows)
    tokens = max(manifest.max_response_tokens for manifest in manifests)
    return AnchorSizes(rows, tokens * len(manifests[0].horizons))


def anchor_arrays(anchors: Anchors, targets: TargetStore, fill: Fill, sizes: AnchorSizes) -> dict[str, np.ndarray]:
    """Targets fp16 [R, D], and of each entry [P] its position, row of targets, horizon (int64) and weight (fp32).

    Padding is 0 everywhere; its weight of 0 removes it from the loss.
    """
    row, ordinal = entries_at_anchors(anchors) if fill == "anchors_only" else entries_of_nearest(anchors)
    weight = anchor_weights(ordinal, anchors.length[row], anchors.response[row])
    entries = sizes.entries
    return {
        "target": _padded(targets[anchors.segment], sizes.rows, np.float16),
        "anchor_position": _padded((anchors.position - anchors.ordinal)[row] + ordinal, entries, np.int64),
        "anchor_row": _padded(row, entries, np.int64),
        "anchor_horizon": _padded(anchors.horizon[row], entries, np.int64),
        "anchor_weight": _padded(weight, entries, np.float32),
    }


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


def _padded(values: np.ndarray, size: int, dtype: type[np.generic]) -> np.ndarray:
    padded = np.zeros((size, *values.shape[1:]), dtype)
    padded[: len(values)] = values
    return padded
