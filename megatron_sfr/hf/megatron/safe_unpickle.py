"""Reads the two pickles of a checkpoint without executing code from them.

A pickle can call any function, which is unsafe for checkpoints from others. Here `.metadata` may name only the classes
that it consists of, and in the common state every class except a namespace is replaced by one that does nothing.
"""

import pickle
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_sfr.hf.megatron.inert_pickle import InertUnpickler, unpickled

_METADATA_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, x in vars(torch).items() if isinstance(x, torch.dtype))},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
}


def read_metadata(path: Path) -> Metadata:
    """`.metadata` of torch.distributed.checkpoint: the tensors, and the positions of their chunks."""
    return unpickled(path, _MetadataUnpickler, Metadata)


def read_common_state(stored: BytesIO) -> dict[str, Any]:
    """Megatron-core's state besides the tensors. Only plain values are restored."""
    (common,) = torch.load(stored, map_location="cpu", weights_only=False, pickle_module=_INERT)
    if not isinstance(common, dict):
        raise ValueError("the common state is not a mapping")
    return common


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _METADATA_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _load(file: Any, **options: Any) -> Any:
    """pickle.load, with which torch reads its formats from before 1.6."""
    return InertUnpickler(file, **options).load()


_INERT = SimpleNamespace(__name__="inert", Unpickler=InertUnpickler, load=_load)
