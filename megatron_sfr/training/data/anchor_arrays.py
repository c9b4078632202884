"""The anchors of a sequence as arrays of fixed shape: each target embedding once, and the positions that predict it.

An entry is a position that predicts one target embedding at one horizon. Shapes: S positions of a sequence, which holds
one or more conversations; R target embeddings and P entries, padded to the maximum over all sequences of the run; D
embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_sfr.data.prepared.conversations import Anchors
from megatron_sfr.data.prepared.segment_texts import HasSegments
from megatron_sfr.data.targets.store import TargetStore
from megatron_sfr.objectives.sfr.sfr_loss import anchor_weights, position_weights

Fill = Literal["anchors_only", "nearest"]


@dataclass(frozen=True)
class EntryOptions:
    """Which positions have targets, and with what weights."""

    fill: Fill = "anchors_only"
    raw_weights: bool = False
    """(N - j) / N itself, for sfr_mean = microbatch, instead of scaled to sum to N over each response."""
    zero_targets: bool = False
    """Whether supervised tokens without a target get the target 0; for a stream with a single horizon."""


@dataclass(frozen=True)
class AnchorSizes:
    """R (targets) and P (entries): upper bounds over all sequences of the run."""

    targets: int
    entries: int


@dataclass(frozen=True)
class AnchorPlan:
    """How the datasets of a run build the arrays of their anchors."""

    store: str
    """Name of the target store's folder inside each prepared folder."""
    entries: EntryOptions = EntryOptions()
    folders: Sequence[Path] = ()
    """The prepared folders, in the numbering of online targets; empty if the datasets read stored targets."""


@dataclass(frozen=True)
class Stream:
    """The supervised tokens of a sequence, which are the inputs that SFR's public code reads (anchor_rule reference).

    C conversations with T supervised tokens in all.
    """

    position: np.ndarray
    """Of each token in the sequence, one conversation after another; int64 [T]."""
    first: np.ndarray
    """Index of each conversation's first token, and T; int64 [C + 1]."""
    sample: np.ndarray
    """Of each conversation, as in SequenceAnchors; int64 [C]."""
    start: np.ndarray
    """Of each conversation, as in SequenceAnchors; int64 [C]."""


@dataclass(frozen=True)
class SequenceAnchors:
    """The anchors of one sequence. Positions and responses are counted over the sequence."""

    anchors: Anchors
    sample: np.ndarray
    """Number of the anchor's conversation or sequence in the run, which keys the noise; int64 [A]."""
    start: np.ndarray
    """Position in the sequence from which the noise counts positions; int64 [A]."""
    falling: bool = True
    """Whether the weight falls from the first token of a response to its last, or is constant."""
    stream: Stream | None = None
    """For anchors of the rule 'reference', whose responses are the conversations."""


def join_anchors(parts: Sequence[Anchors], samples: np.ndarray, starts: np.ndarray) -> SequenceAnchors:
    """Joins the anchors of the conversations `samples` [n], which start at positions `starts` [n] of one sequence."""
    counts = [len(part.position) for part in parts]
    responses = np.cumsum([0, *(int(part.response.max(initial=-1)) + 1 for part in parts)])[:-1]
    columns = {
        field.name: np.concatenate([getattr(part, field.name).astype(np.int64) for part in parts])
        for field in fields(Anchors)
    }
    start = np.repeat(starts, counts)
    columns["position"] += start
    columns["response"] += np.repeat(responses, counts)
    return SequenceAnchors(Anchors(**columns), np.repeat(samples, counts), start)


def join_streams(
    parts: Sequence[Anchors], masks: Sequence[np.ndarray], samples: np.ndarray, starts: np.ndarray
) -> SequenceAnchors:
    """`join_anchors` for anchors of the rule 'reference'; masks: the loss mask of each conversation's tokens."""
    joined = join_anchors(parts, samples, starts)
    response = np.repeat(np.arange(len(parts)), [len(part.position) for part in parts])
    supervised = [np.flatnonzero(mask) for mask in masks]
    stream = Stream(
        position=np.concatenate([tokens + start for tokens, start in zip(supervised, starts, strict=True)]),
        first=np.cumsum([0, *map(len, supervised)]),
        sample=np.asarray(samples),
        start=np.asarray(starts),
    )
    return replace(joined, anchors=replace(joined.anchors, response=response), stream=stream)


class TargetReader:
    """Reads the targets of a sequence's anchors."""

    def __init__(self, prepared: HasSegments, plan: AnchorPlan) -> None:
        self.plan = plan
        self.number = plan.folders.index(prepared.folder) if plan.folders else None
        self.store = None if plan.folders else TargetStore.open(prepared.folder / plan.store, prepared)

    def arrays(self, sequence: SequenceAnchors, sizes: AnchorSizes) -> dict[str, Any]:
        """`anchor_arrays` and the targets: fp16 `target` [R, D].

        For online targets, where to find them instead: `target_row` [R] (-1: padding) of `target_store`.
        """
        segment = sequence.anchors.segment
        arrays = anchor_arrays(sequence, self.plan.entries, sizes)
        if self.store is None:
            return arrays | {
                "target_row": padded(segment + 1, sizes.targets, np.int64) - 1,
                "target_store": self.number,
            }
        return arrays | {"target": padded(self.store[segment], sizes.targets, np.float16)}


def anchor_arrays(sequence: SequenceAnchors, options: EntryOptions, sizes: AnchorSizes) -> dict[str, np.ndarray]:
    """Arrays [P] with one value per entry.

    int64: `anchor_position` in the sequence, `anchor_row` of its target, `anchor_horizon`, and `anchor_sample` and
    `anchor_place`, which key the noise. fp32: `anchor_weight`. Padding is 0; weight 0 removes it from the loss.
    """
    anchors, stream = sequence.anchors, sequence.stream
    of, ordinal = entries_at_anchors(anchors) if options.fill == "anchors_only" else entries_of_nearest(anchors)
    response, horizon, length, target = anchors.response[of], anchors.horizon[of], anchors.length[of], of
    sample, start = sequence.sample[of], sequence.start[of]
    if options.zero_targets:
        assert stream is not None
        missing = tokens_without_entry(stream, response, ordinal)
        response, ordinal = (np.concatenate(pair) for pair in zip((response, ordinal), missing, strict=True))
        # The last embedding is padding, so it is 0.
        target = np.concatenate([of, np.full(len(missing[0]), sizes.targets - 1)])
        length, horizon = np.diff(stream.first)[response], np.zeros_like(response)
        sample, start = stream.sample[response], stream.start[response]
    if stream is not None:
        position = stream.position[stream.first[response] + ordinal]
    else:
        position = (anchors.position - anchors.ordinal)[of] + ordinal
    place = ordinal if sequence.falling else np.zeros_like(ordinal)
    weight = position_weights(place, length) if options.raw_weights else anchor_weights(place, length, response)
    columns = {"position": position, "row": target, "horizon": horizon, "sample": sample, "place": position - start}
    arrays = {f"anchor_{name}": padded(values, sizes.entries, np.int64) for name, values in columns.items()}
    return arrays | {"anchor_weight": padded(weight, sizes.entries, np.float32)}


def tokens_without_entry(stream: Stream, response: np.ndarray, ordinal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Response and ordinal of the supervised tokens that are not among these entries: int64 [n] each."""
    has_entry = np.zeros(stream.first[-1], bool)
    has_entry[stream.first[response] + ordinal] = True
    token = np.flatnonzero(~has_entry)
    missing = np.searchsorted(stream.first, token, side="right") - 1
    return missing, token - stream.first[missing]


def entries_at_anchors(anchors: Anchors) -> tuple[np.ndarray, np.ndarray]:
    """Target index and ordinal of each entry, int64 [n]: one entry per anchor."""
    return np.arange(len(anchors.ordinal)), anchors.ordinal.astype(np.int64)


def entries_of_nearest(anchors: Anchors) -> tuple[np.ndarray, np.ndarray]:
    """Target index and ordinal of each entry, int64 [n]: every ordinal of a reply takes its nearest anchor per horizon.

    Ties go to the earlier anchor. A reply without anchors at a horizon has no entries there. As in the paper's code.
    Note that the target of an earlier anchor starts before the position, with tokens that the model has already read.
    """
    order = np.lexsort((anchors.ordinal, anchors.horizon, anchors.response))
    response, horizon = anchors.response[order], anchors.horizon[order]
    at, length = anchors.ordinal[order].astype(np.int64), anchors.length[order].astype(np.int64)
    same = (response[1:] == response[:-1]) & (horizon[1:] == horizon[:-1])  # as the previous anchor
    # An anchor serves the ordinals [begin, end). The midpoint between two anchors belongs to the earlier one.
    middle = (at[1:] + at[:-1]) // 2 + 1
    begin, end = np.zeros_like(at), length.copy()
    begin[1:] = np.where(same, middle, 0)
    end[:-1] = np.where(same, middle, length[:-1])
    count = end - begin
    first = np.cumsum(count) - count  # index of each anchor's first entry
    return np.repeat(order, count), np.arange(count.sum()) + np.repeat(begin - first, count)


def padded(values: np.ndarray, size: int, dtype: type[np.generic]) -> np.ndarray:
    """Pads values [n, ...] with zeros to [size, ...]."""
    result = np.zeros((size, *values.shape[1:]), dtype)
    result[: len(values)] = values
    return result
