"""What a plan reads from prepared folders, where they are: an epoch, anchors, segments, dimension of the targets."""

import argparse
from dataclasses import dataclass
from typing import Any

from megatron_sfr.data.prepared.open import open_prepared
from megatron_sfr.data.targets.store import TargetManifest
from megatron_sfr.storage.manifest import read_manifest
from megatron_sfr.training.data.epochs import read_epoch, split_blend

STRIDE = 32
"""Tokens between anchors where no data are prepared: the default of `megatron-sfr prepare`."""
DIM = 1024
"""Dimension of the targets where no store exists: bge-large's."""


@dataclass(frozen=True)
class RunData:
    """The training data of a run, as far as they are known."""

    sequences: int | None
    """Sequences of an epoch; None without prepared data."""
    anchors: float
    """Anchors of a sequence."""
    segments: int | None
    """Distinct segments of all folders; None without prepared data."""
    dim: int
    horizons: int
    assumed: tuple[str, ...]
    """What is assumed because no data say it."""


def read_run_data(args: argparse.Namespace, anchors: float | None = None, dim: int | None = None) -> RunData:
    """The data of a run's parsed arguments.

    Args:
        anchors: of a sequence; None: the mean over the prepared folders, or one for each stride of the sequence.
        dim: of the targets; None: that of the target store.
    Raises:
        ValueError: a prepared folder is damaged.
    """
    found, assumed = _of_folders(args), list[str]()
    if anchors is None:
        anchors = found.get("anchors")
    if anchors is None:
        step = 1 if args.sfr_anchors == "nearest" else STRIDE
        anchors = args.seq_length / step
        assumed.append(
            f"an anchor every {step} tokens (--anchors)" if step > 1 else "an anchor at each token (--anchors)"
        )
    if dim is None:
        dim = args.sfr_target_dim or found.get("dim")
    if dim is None:
        dim = DIM
        assumed.append(f"targets of dimension {DIM} (--target-dim)")
    told = tuple(assumed) if args.sfr else ()
    return RunData(found.get("sequences"), anchors, found.get("segments"), dim, found.get("horizons", 1), told)


def _of_folders(args: argparse.Namespace) -> dict[str, Any]:
    """Numbers of the prepared folders; none where not all of a run's folders are here."""
    blend = args.train_data_path or args.data_path
    paths = split_blend(blend)[0] if blend else []
    epoch = read_epoch(vars(args)) if paths and all(path.is_dir() for path in paths) else None
    if epoch is None:
        return {}
    manifests = [open_prepared(path).manifest for path in paths]
    anchors = sum(manifest.anchors for manifest in manifests)
    if args.sfr_anchors == "nearest":  # every supervised token; documents have no others
        anchors = sum(getattr(manifest, "supervised_tokens", manifest.tokens) for manifest in manifests)
    found: dict[str, Any] = {
        "sequences": epoch.total,
        "anchors": anchors / epoch.total,
        "segments": sum(manifest.segments for manifest in manifests),
        "horizons": len(manifests[0].horizons),
    }
    stores = [path / args.sfr_target_store for path in paths]
    if args.sfr and all((store / "manifest.json").is_file() for store in stores):
        found["dim"] = read_manifest(stores[0], TargetManifest).dim
    return found
