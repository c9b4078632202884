"""Hugging Face folders: reads config and tensors by name, and creates a new folder atomically."""

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_sfr.hf.config_values import Config
from megatron_sfr.storage import model_folders, provenance
from megatron_sfr.storage.atomic import link_target, sync_files, sync_folder
from megatron_sfr.storage.integrity import hint
from megatron_sfr.storage.lock import hold
from megatron_sfr.storage.user_files import loading, read_json_object, shown

CONFIG, INDEX, SINGLE = model_folders.CONFIG, model_folders.INDEX, model_folders.SINGLE
RECORD = "conversion.json"
"""Record of what made the folder: the identity of the conversion, and the sizes of its files."""
WEIGHT_FILES = (CONFIG, INDEX, "*.safetensors")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_OTHER = "choose another --output, or replace it with --force"
_STALE = "the index belongs to other files: download both again"
_ROOM = "the disk is full: free some space or choose another --output"
_ACCESS = "the location is not writable: choose another --output"
_NOT_WRITTEN = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _ACCESS),
}


def read_config(folder: Path) -> Config:
    """config.json of an HF folder."""
    return read_json_object(model_folders.check_config(folder))


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model of an HF folder, loaded by transformers on the CPU."""
    from transformers import AutoModelForCausalLM

    with loading(f"cannot load the model in {folder}", "give a folder that transformers loads"):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


class Weights:
    """The tensors of an HF folder by name, read one at a time. Raises ValueError if index and files disagree.

    A file is opened again for each tensor: safetensors maps it into memory, where pages would accumulate.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = _read_index(folder)
        self.files: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._kinds: dict[str, str] = {}
        for file in sorted(set(index.values())) if index else [SINGLE]:
            with _safe_open(folder / file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    header = tensors.get_slice(name)
                    self.files[name] = file
                    self._shapes[name], self._kinds[name] = tuple(header.get_shape()), header.get_dtype()
                    if index and index.get(name) != file:
                        said = index.get(name, "no file")
                        raise ValueError(f"{folder / INDEX}: {name} is in {file}, the index names {said}: {_STALE}")
        for name, file in (index or {}).items():
            if name not in self.files:
                raise ValueError(f"{folder / INDEX}: {name} is not in {file}: {_STALE}")

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        kind = self._kinds[name]
        if kind not in DTYPES:
            raise ValueError(
                f"{self.folder}: {name} is {kind}; weights are converted as {', '.join(DTYPES)}: "
                "start from the unquantized model"
            )
        return DTYPES[kind]

    def part(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """start..stop of a tensor along an axis. Reads only this part."""
        with _safe_open(self.folder / self.files[name]) as tensors:
            part: Tensor = tensors.get_slice(name)[(slice(None),) * axis + (slice(start, stop),)]
            return part

    def __getitem__(self, name: str) -> Tensor:
        with _safe_open(self.folder / self.files[name]) as tensors:
            return tensors.get_tensor(name)


def is_up_to_date(output: Path, identity: Mapping[str, object], *, force: bool) -> bool:
    """Whether a conversion of this identity has written `output`; False if it must be written or replaced.

    Raises:
        ValueError: another conversion wrote `output`, or its files have changed.
    """
    made = not force and (output / RECORD).is_file()
    with hint(_OTHER):
        return made and provenance.is_up_to_date(output, output / RECORD, identity)


@contextmanager
def new_folder(output: Path, *, force: bool, identity: Mapping[str, object], size: int = 0) -> Iterator[Path]:
    """A folder to fill, which becomes `output` on success and is removed on failure; for one process at a time.

    All of it is on the disk before it gets its name, so that a crash of the machine leaves no half-written output.

    Args:
        output: the folder to write, or a link to it. An existing one is refused.
        force: replace an existing folder that a conversion has written (a mistyped path deletes no other folder).
        identity: everything that determines the bytes, stored for `is_up_to_date` and `force`.
        size: bytes to be written, for which there must be room.
    """
    output = link_target(output)
    partial = output.with_name(f".{output.name}.partial")
    replaced = output.with_name(f".{output.name}.replaced")
    try:
        with hold(output):
            if replaced.exists() and not output.exists():
                replaced.rename(output)  # an earlier call was killed between the two renames below
            _check_replaceable(output, force)
            try:
                for leftover in (partial, replaced):
                    shutil.rmtree(leftover, ignore_errors=True)
                if (free := shutil.disk_usage(output.parent).free) < size:
                    raise ValueError(
                        f"{output}: {size:,} bytes to write, {free:,} free: make room or choose another --output"
                    )
                partial.mkdir()
                yield partial
                provenance.write_record(partial / RECORD, identity, provenance.sizes_of(partial))
                sync_files(partial)
                if output.exists():
                    output.rename(replaced)
                partial.rename(output)
                sync_folder(output.parent)
            finally:
                for leftover in (partial, replaced):
                    shutil.rmtree(leftover, ignore_errors=True)
    except OSError as e:
        if e.errno not in _NOT_WRITTEN or not _concerns(output, e):
            raise
        raise ValueError(f"{output} was not written and nothing is left of it; {_NOT_WRITTEN[e.errno]} ({e})") from e


def _concerns(output: Path, error: OSError) -> bool:
    """Whether an error is about the output, a temporary name of it or a folder above it, and not about an input."""
    if error.filename is None:
        return True
    failed, folder = Path(error.filename).absolute(), output.absolute()
    temporary = f"{folder.parent / f'.{folder.name}'}."
    return folder.is_relative_to(failed) or str(failed).startswith(temporary)


def _check_replaceable(output: Path, force: bool) -> None:
    if output.exists():
        if not force:
            raise ValueError(f"{output} exists: {_OTHER}")
        if not (output / RECORD).is_file():
            raise ValueError(f"{output} has no {RECORD}: --force replaces only folders that a conversion has written")


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file; None if one file holds all tensors."""
    single = (folder / SINGLE).is_file()
    if not (folder / INDEX).is_file():
        if single:
            return None
        if parts := sorted(path.name for path in folder.glob("*.safetensors")):
            raise ValueError(f"{folder}: {parts[0]} without {INDEX}, which names the file of each tensor: download it")
        raise ValueError(
            f"{folder}: neither {SINGLE} nor {INDEX}: only safetensors are read (save_pretrained writes them)"
        )
    files = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{folder / INDEX}: no weight_map: download it again")
    for file in files.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{folder / INDEX}: {shown(file)} is not the name of a file beside it: download it again")
    if single and SINGLE not in files.values():
        raise ValueError(f"{folder}: {SINGLE} beside {INDEX} of other files: which is the model? Remove the other")
    missing = sorted({file for file in files.values() if not (folder / file).is_file()})
    if missing:
        raise ValueError(f"{folder}: missing {', '.join(missing)}, which {INDEX} names: download it again")
    return files


def _safe_open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as e:
        raise ValueError(f"{path}: damaged or cut off ({e}): download it again") from e
    except OSError as e:
        if e.errno is not None:
            raise
        raise ValueError(f"{path}: cannot be read ({e}): is its disk sound?") from e  # safetensors names no file
