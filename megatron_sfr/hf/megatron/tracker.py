"""The newest complete checkpoint of a --save folder, even if a crash damaged its tracker file.

A torch_dist save writes the tensors, then `.metadata`, then `metadata.json`, then the folder's tracker, which names the
checkpoint to load. A kill in between leaves an incomplete checkpoint, or a tracker that does not name the newest one.
Upstream trusts the tracker: if it is empty, a run ends without a step and with exit code 0.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_sfr.hf.megatron.inert_pickle import file_ends
from megatron_sfr.storage.user_files import read_json_object, shown

TRACKER, CONFIG, METADATA = "latest_checkpointed_iteration.txt", "metadata.json", ".metadata"
RELEASE = "release"
"""Megatron's name for a checkpoint without training state: training starts at step 0 with a new optimizer."""
_CUT_OFF = "still being written, or its save was cut off"


@dataclass(frozen=True)
class Newest:
    """The checkpoint that a folder's next reader should load."""

    folder: Path
    note: str | None = None
    """One line about a wrong tracker and what is used instead, or about a newer checkpoint; None otherwise."""
    repair: str | None = None
    """The correct content of the tracker, if it does not name this checkpoint."""

    @property
    def step(self) -> int:
        """The training step of the checkpoint."""
        return 0 if self.folder.name == RELEASE else int(self.folder.name.removeprefix("iter_"))


def newest(save: Path, *, any_format: bool = False) -> Newest | None:
    """The checkpoint that the tracker names, if it is complete; else the newest complete one, or None.

    Args:
        save: a folder of checkpoints.
        any_format: trust the tracker for existing folders; completeness can be checked for torch_dist only.

    Raises:
        ValueError: the tracker names no complete checkpoint, and there is no other.
    """
    tracker = save / TRACKER
    named, wrong = _read(tracker)
    steps = _steps(save)
    if named is not None:
        wrong = None if any_format and (save / named).is_dir() else incomplete(save / named)
        if wrong is None:
            newer = [name for step, name in steps if step > Newest(save / named).step and named != RELEASE]
            complete = next((name for name in newer if incomplete(save / name) is None), None) if newer else None
            note = f"{tracker} names {named}, which is used; {complete} is newer and complete" if complete else None
            return Newest(save / named, note)
        wrong = f"names {named}, which {wrong}"
    for step, name in steps:
        if incomplete(save / name) is None and not _is_foreign(save / name):
            note = f"{tracker} {wrong}: {name} is used, the newest complete checkpoint"
            return Newest(save / name, note, repair=str(step))
    if tracker.exists():
        raise ValueError(
            f"{tracker} {wrong}, and no iter_* folder beside it is known to be complete: remove this file to start "
            "from the beginning, or write the iteration to load into it"
        )
    return None


def locate(path: Path) -> Newest:
    """The checkpoint that a path names: a checkpoint's folder, or a --save folder, whose newest one is used.

    Raises:
        ValueError: there is no complete checkpoint.
    """
    is_checkpoint = path.name == RELEASE or path.name.startswith("iter_") or (path / METADATA).is_file()
    if is_checkpoint and not (path / TRACKER).is_file():
        if wrong := incomplete(path):
            complete = sorted(other.name for other in path.parent.glob("iter_*") if incomplete(other) is None)
            raise ValueError(f"{path} {wrong}{f'; complete: {", ".join(complete)}' if complete else ''}")
        return Newest(path)
    found = newest(path)
    if found is None:
        raise ValueError(f"{path}: no checkpoint here (no {TRACKER}): wrong folder, or its first save is not finished")
    return found


def incomplete(folder: Path) -> str | None:
    """What a checkpoint lacks, as the end of a sentence; None if it is complete or has another format."""
    if not folder.is_dir():
        return "does not exist"
    if _is_foreign(folder):
        return None
    for name in (METADATA, CONFIG):  # upstream writes metadata.json last, also after an asynchronous save
        if not (folder / name).is_file():
            return f"has no {name}: {_CUT_OFF}"
    try:
        backend = read_json_object(folder / CONFIG).get("sharded_backend")
        if not isinstance(backend, str):  # upstream's own loader ends there in a TypeError
            return f"is damaged ({folder / CONFIG}: sharded_backend is {shown(backend)})"
        ends = file_ends(folder / METADATA)
    except ValueError as error:
        return f"is damaged ({error})"
    for name, end in ends.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if size < end:
            return f"is not complete ({name} has {size} of {end} bytes)"
    return None


def complete_steps(save: Path, besides: Collection[int] = ()) -> list[int]:
    """The steps of the complete torch_dist checkpoints in a folder, newest first.

    besides: steps to leave out, whose checkpoints are not read.
    """
    return [step for step, name in _steps(save) if step not in besides and _is_complete(save / name)]


def _is_complete(folder: Path) -> bool:
    """Whether a torch_dist checkpoint is complete; False for one that is deleted meanwhile."""
    try:
        return not _is_foreign(folder) and incomplete(folder) is None
    except FileNotFoundError:
        return False


def step_folder(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"iter_{step:07d}"


def _read(tracker: Path) -> tuple[str | None, str | None]:
    """(folder name, None) from a tracker, or (None, what is wrong with it)."""
    if not tracker.is_file():
        return None, "is missing"
    text = tracker.read_bytes()[:100].decode("utf-8", "replace").strip()
    if text == RELEASE:
        return RELEASE, None
    if re.fullmatch("[0-9]{1,12}", text):
        return step_folder(int(text)), None
    return None, f"holds {text[:20]!r}, which is not an iteration" if text else "is empty"


def _steps(save: Path) -> list[tuple[int, str]]:
    """(step, name) of each checkpoint folder, newest first."""
    names = [path.name for path in save.glob("iter_*") if re.fullmatch("iter_[0-9]{7,12}", path.name)]
    return sorted(((int(name.removeprefix("iter_")), name) for name in names), reverse=True)


def _is_foreign(folder: Path) -> bool:
    """Whether a checkpoint was saved with --ckpt-format torch."""
    return any(folder.glob("mp_rank_*"))
