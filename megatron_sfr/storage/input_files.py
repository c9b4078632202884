"""From what a user names as input to files of records: files, folders of shards, `datasets` folders, and the hub.

A dataset that `datasets` has saved or downloaded is a list of Arrow files; they are read like all others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sfr.storage.model_folders import offline
from megatron_sfr.storage.user_files import has_type, loading, read_json_object

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SPLIT = re.compile(r"[\w.-]+")
_STATE, _DICT = "state.json", "dataset_dict.json"
_ABOUT = ("dataset_info.json", "dataset_infos.json")  # describe files beside them: of `datasets`, of LLaMA-Factory
_OF_PREPARED = "segment_offsets.bin"
"""A file that every prepared folder has."""


@dataclass(frozen=True)
class DatasetOptions:
    """Which part of a dataset of the `datasets` library is read, where an input is one."""

    split: str | None = None
    """None: the only one; of a name on the hub, train."""
    subset: str | None = None
    """Configuration of a name on the hub. None: its default."""
    revision: str | None = None
    """Branch, tag or commit of a name on the hub. None: the newest."""

    def __post_init__(self) -> None:
        if self.split is not None and not _SPLIT.fullmatch(self.split):
            raise ValueError(f"split {self.split!r} is not the name of a split; give one, such as train")


def record_files(inputs: Sequence[Path], options: DatasetOptions = DatasetOptions()) -> tuple[Path, ...]:
    """The files of all inputs, in order.

    Args:
        inputs: files; folders of them, also nested, taken in the order of their names; folders that
            `Dataset.save_to_disk` wrote; names of datasets on the hub.
        options: the split and the revision of datasets.
    Raises:
        ValueError: an input is none of these, or a folder has no file of records.
    """
    files: list[Path] = []
    used = False
    for path in inputs:
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            saved = (path / _DICT).is_file() or (path / _STATE).is_file()
            used |= saved
            files += _saved_files(path, options) if saved else _shards(path)
        elif _HUB_NAME.fullmatch(str(path)) and not path.parent.is_dir():
            used = True
            files += _hub_files(str(path), options)
        else:
            raise ValueError(f"{path} does not exist; give a file, a folder, or the name of a dataset on the hub")
    if options != DatasetOptions() and not used:
        raise ValueError("--split, --subset and --revision are for datasets, and no input is one; leave them out")
    return tuple(files)


def _shards(folder: Path) -> list[Path]:
    """The files of records in a folder, but for those of prepared folders in it: an output may be inside its input."""
    files = sorted(_files_in(folder, set()))
    if saved := next((path.parent for path in files if path.name in (_STATE, _DICT)), None):
        raise ValueError(f"{folder} has a saved dataset inside; give {saved} as a separate input")
    prepared = {path.parent for path in files if path.name == _OF_PREPARED}
    found = [path for path in files if _is_record_file(path.relative_to(folder)) and not prepared & set(path.parents)]
    if not found:
        raise ValueError(f"{folder} has no file whose name ends in {', '.join(SUFFIXES)}, .gz or .zst; add one")
    return found


def _files_in(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """The files of a folder and of those in it, also of links to folders, each folder once."""
    if (real := folder.resolve()) not in seen:
        seen.add(real)
        for path in sorted(folder.iterdir()):
            yield from _files_in(path, seen) if path.is_dir() else [path]


def _is_record_file(path: Path) -> bool:
    name = path.with_suffix("").name if path.suffix in COMPRESSED else path.name
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return name.lower().endswith(SUFFIXES) and not hidden and name not in _ABOUT


def _saved_files(folder: Path, options: DatasetOptions) -> list[Path]:
    """The Arrow files of a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    if options.revision is not None or options.subset is not None:
        raise ValueError(f"--subset and --revision are for names on the hub, and {folder} is a folder; leave them out")
    if (folder / _DICT).is_file():
        splits: Any = read_json_object(folder / _DICT).get("splits")
        if not has_type(splits, list[str]):
            raise ValueError(f"{folder / _DICT} is damaged; save the dataset again")
        split = options.split or (splits[0] if len(splits) == 1 else None)
        if split is None or split not in splits:
            asked = "" if options.split is None else f" and no {options.split}"
            raise ValueError(f"{folder} has the splits {', '.join(splits)}{asked}; choose one with --split")
        folder = folder / split
    elif options.split is not None:
        raise ValueError(f"{folder} is a dataset without splits; leave --split out")
    files: Any = read_json_object(folder / _STATE).get("_data_files")
    if not has_type(files, list[dict[str, Any]]) or not all(isinstance(file.get("filename"), str) for file in files):
        raise ValueError(f"{folder / _STATE} is damaged; save the dataset again")
    paths = [folder / file["filename"] for file in files]
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(f"{missing[0]} is missing; save the dataset again")
    return paths


def _hub_files(name: str, options: DatasetOptions) -> list[Path]:
    """The Arrow files of a dataset in the cache of `datasets`, which downloads and converts what is missing."""
    why = offline()  # before datasets copies HF_HUB_OFFLINE
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{name} is not a file here; as a name on the hub it is read by the library datasets, which is not "
            "installed; run: pip install 'megatron-sfr[datasets]'"
        ) from error
    hint = "give the name of a dataset on the hub, and its --subset, --split and --revision"
    if why is not None:
        hint = f"{why}: give files, or a folder that datasets has saved"
    with loading(f"cannot load the dataset {name}", hint):
        loaded = datasets.load_dataset(name, options.subset, split=options.split or "train", revision=options.revision)
    return [Path(file["filename"]) for file in loaded.cache_files]
