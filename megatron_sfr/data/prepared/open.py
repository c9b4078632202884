"""Opens prepared folders of either kind, and checks that the folders of a run have the same horizons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_sfr.data.prepared.conversations import PreparedData, PreparedManifest
from megatron_sfr.data.prepared.documents import DocumentsManifest, PreparedDocuments
from megatron_sfr.data.segments.reference_anchors import AnchorRule
from megatron_sfr.data.segments.segmenters import Horizon, Segmenter, format_horizons
from megatron_sfr.storage.manifest import is_of_kind


def open_prepared(folder: str | Path) -> PreparedData | PreparedDocuments:
    """Opens a folder that `prepare` wrote, memory-mapped.

    Args:
        folder: the prepared folder.
    Returns:
        Conversations (`PreparedData`, a sequence of samples with tokens [L], loss_mask [L] and anchors) or documents.
    Raises:
        ValueError: the folder is not a prepared folder, or it is damaged.
    Example:
        >>> import megatron_sfr as sfr
        >>> data = sfr.open_prepared("prepared")
        >>> sample = data[0]
        >>> sample.tokens.shape == sample.loss_mask.shape
        True
    """
    folder = Path(folder)
    return PreparedDocuments.open(folder) if holds_documents(folder) else PreparedData.open(folder)


def holds_documents(folder: Path) -> bool:
    """Whether a prepared folder holds documents. False if its manifest cannot be read."""
    return is_of_kind(folder, DocumentsManifest)


def anchor_rule_of(path: str | Path) -> AnchorRule:
    """The rule by which a prepared folder's anchors were placed; documents are always 'replies'."""
    manifest = open_prepared(Path(path)).manifest
    return manifest.anchor_rule if isinstance(manifest, PreparedManifest) else "replies"


def check_anchor_rules(paths: Sequence[str | Path]) -> None:
    """ValueError where some of the folders were prepared with --preset reference and others were not."""
    rules = {anchor_rule_of(path): str(path) for path in paths}
    if len(rules) > 1:
        raise ValueError(
            f"{rules['reference']} was prepared with --preset reference and {rules['replies']} without: their anchors "
            "read other positions; prepare all folders of a run with the same options"
        )


def horizons_of(paths: Sequence[str | Path]) -> tuple[Horizon, ...]:
    """The horizons that all these prepared folders have; ValueError where they, or what they count, differ.

    One head has one meaning for each of its horizons. Strides may differ: they only decide where anchors are.
    """
    check_anchor_rules(paths)
    found: dict[tuple[Horizon, ...], str] = {}  # and the first folder that has them
    segmenters: dict[Segmenter, str] = {}
    for path in paths:
        manifest = open_prepared(Path(path)).manifest
        found.setdefault(tuple((offset, length) for offset, length in manifest.horizons), str(path))
        segmenters.setdefault(manifest.segmenter, str(path))
    if len(segmenters) > 1:
        differ = ", ".join(f"{path} counts by {segmenter}" for segmenter, path in segmenters.items())
        raise ValueError(
            f"prepared folders of one run differ in what their horizons count: {differ}; prepare them with the same "
            "--segments"
        )
    if len(found) > 1:
        differ = ", ".join(f"{path} has {format_horizons(horizons)}" for horizons, path in found.items())
        raise ValueError(
            f"prepared folders of one run differ in their horizons: {differ}; prepare them with the same --horizons"
        )
    (horizons,) = found
    return horizons
