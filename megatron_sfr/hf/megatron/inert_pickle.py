"""Reads pickles without executing code from them and without torch: objects of unknown classes do nothing.

Also the sizes of a checkpoint's files from its `.metadata`, for commands that have to start quickly.
"""

import pickle
from pathlib import Path
from typing import Any

from megatron_sfr.storage.user_files import loading

HINT = "use another checkpoint of the run, or copy this one again"
_PLAIN = {("argparse", "Namespace"), ("types", "SimpleNamespace"), ("collections", "OrderedDict")}
_CHECKPOINT = "torch.distributed.checkpoint"
_RECORDS = {(f"{_CHECKPOINT}.metadata", "Metadata"), (f"{_CHECKPOINT}.filesystem", "_StorageInfo")}


class Inert:
    """Replaces objects of all other classes: accepts any state and does nothing."""

    def __new__(cls, *_: object, **__: object) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...

    def __setitem__(self, _: object, __: object) -> None: ...

    def append(self, _: object) -> None: ...


class InertUnpickler(pickle.Unpickler):
    """Restores plain values and namespaces only."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if (module, name) in _PLAIN else Inert


class _Record:
    """An object of which only the attributes are of interest."""


class _SizesUnpickler(InertUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _Record if (module, name) in _RECORDS else Inert


def unpickled[T](path: Path, unpickler: type[pickle.Unpickler], kind: type[T]) -> T:
    """The object in a checkpoint's `.metadata`. Raises ValueError if the file is damaged or holds another kind."""
    with path.open("rb") as file, loading(f"{path} is damaged", HINT):
        try:
            found = unpickler(file).load()
        except MemoryError:
            raise pickle.UnpicklingError("a length in it is garbled") from None
        if not isinstance(found, kind):
            raise ValueError("not the metadata of torch.distributed.checkpoint")
    return found


def file_ends(path: Path) -> dict[str, int]:
    """The minimum size in bytes of each tensor file of a checkpoint, from its `.metadata`.

    Raises:
        ValueError: the file is damaged.
    """
    ends: dict[str, int] = {}
    metadata: Any = unpickled(path, _SizesUnpickler, _Record)
    with loading(f"{path} is damaged", HINT):
        for info in metadata.storage_data.values():
            name = str(Path(info.relative_path))
            ends[name] = max(ends.get(name, 0), int(info.offset) + int(info.length))
    return ends
