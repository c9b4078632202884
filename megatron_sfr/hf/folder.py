"""A Hugging Face folder: its config, its safetensors by name; and a new folder that appears whole or not at all."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_sfr.hf.rows import Config

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read_config(folder: Path) -> Config:
    """config.json of an HF folder."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name the folder of a Hugging Face model")
    config = _read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not a JSON object")
    return config


class Weights:
    """The tensors of an HF folder by name, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files(folder)
        self._open = {file: _safe_open(folder / file) for file in sorted(set(self.files.values()))}
        for name, file in self.files.items():
            if name not in self._open[file].keys():  # noqa: SIM118 (safe_open is no mapping)
                raise ValueError(f"{folder / INDEX}: {name} is not in {file}: the index is of other files")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open[self.files[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        kind = self._open[self.files[name]].get_slice(name).get_dtype()
        if kind not in DTYPES:
            raise ValueError(f"{self.folder}: {name} is {kind}; weights are converted as {', '.join(DTYPES)}")
        return DTYPES[kind]

    def __getitem__(self, name: str) -> Tensor:
        return self._open[self.files[name]].get_tensor(name)


@contextmanager
def new_folder(output: Path, *, mark: str, force: bool) -> Iterator[Path]:
    """A folder to fill, which becomes `output` when all went well and is removed when not.

    An existing `output` is refused, or with `force` replaced at the end, if it holds the file `mark` (so that a
    mistyped path does not cost another folder).
    """
    if output.exists() or output.is_symlink():
        if not force:
            raise ValueError(f"{output} exists: choose another --output, or replace it with --force")
        if not (output / mark).is_file():
            raise ValueError(f"{output} has no {mark}: --force replaces only what a conversion has written")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    replaced = output.with_name(f".{output.name}.replaced")
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if output.exists():
            output.rename(replaced)
        partial.rename(output)
    finally:
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def _files(folder: Path) -> dict[str, str]:
    """Tensor name -> file, from the index or from the single file."""
    if (folder / INDEX).is_file():
        index = _read_json(folder / INDEX)
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not files:
            raise ValueError(f"{folder / INDEX}: no weight_map")
        missing = sorted({file for file in files.values() if not (folder / file).is_file()})
        if missing:
            raise ValueError(f"{folder}: missing {', '.join(missing)}, which {INDEX} names: download it again")
        return dict(files)
    if (folder / SINGLE).is_file():
        return dict.fromkeys(_safe_open(folder / SINGLE).keys(), SINGLE)
    raise ValueError(f"{folder}: neither {SINGLE} nor {INDEX}: only safetensors are read (save_pretrained writes them)")


def _safe_open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as e:
        raise ValueError(f"{path}: damaged or cut off ({e}): download it again") from e


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not JSON ({e})") from e
