"""A GGUF file in the place of a Hugging Face folder: found, described by its header, and de-quantized by transformers.

The weights are the values that the file stores. A quantized file does not have the model's original weights.
"""

import re
from dataclasses import dataclass
from glob import escape
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_sfr.hf.config_values import Config
from megatron_sfr.hf.hf_folder import CONFIG, read_config
from megatron_sfr.storage.model_folders import find_gguf
from megatron_sfr.storage.provenance import contents_of
from megatron_sfr.storage.user_files import cut, loading

MAGIC = b"GGUF"
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of unquantized tensors, which keep their dtype."""
DEQUANTIZED = torch.bfloat16
_ORIGINAL = "start from the model's safetensors"


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says before its tensors.

    kinds: the types of its matrices. The vectors, which are norms and biases, are F32 in all files.
    """

    path: Path
    tensors: tuple[str, ...]
    kinds: tuple[str, ...]
    end_tokens: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights get: the file's if all matrices share one that is not quantized, else bfloat16."""
        return PLAIN.get(self.kinds[0], DEQUANTIZED) if len(self.kinds) == 1 else DEQUANTIZED

    @property
    def is_quantized(self) -> bool:
        return any(kind not in PLAIN for kind in self.kinds)

    def __str__(self) -> str:
        kinds, dtype = " and ".join(self.kinds), str(self.dtype).removeprefix("torch.")
        if not self.is_quantized:
            return f"{self.path}: {kinds}, read by transformers as {dtype}"
        return (
            f"{self.path}: {kinds}, de-quantized by transformers to {dtype}; these are not the weights that the model "
            "had before it was quantized"
        )


class GGUFWeights:
    """The tensors of a GGUF file under their Hugging Face names, all of them in memory; read like `Weights`."""

    def __init__(self, header: GGUFHeader, tensors: dict[str, Tensor]) -> None:
        self.header, self.folder = header, header.path
        self.files = dict.fromkeys(tensors, header.path.name)
        self._tensors = tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def part(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """start..stop of a tensor along an axis."""
        return self._tensors[name].narrow(axis, start, stop - start)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]


def is_model(source: Path) -> bool:
    """Whether a path is a model that can be opened: a GGUF file, or a folder with one or with a config.json."""
    return (source / CONFIG).is_file() or find_gguf(source) is not None


def model_contents(source: Path, patterns: tuple[str, ...]) -> list[tuple[str, int, int]]:
    """A fingerprint of a source: that of its GGUF file, or that of a folder's files that match the patterns."""
    if (file := find_gguf(source)) is not None:
        return contents_of(file.parent, (escape(file.name),))
    return contents_of(source, patterns)


def read_header(path: Path) -> GGUFHeader:
    """The header of a GGUF file. Raises ValueError for what transformers would leave out without an error."""
    if re.search(r"-\d{5}-of-\d{5}$", path.stem):
        raise ValueError(f"{path} is one part of a model: join the parts (llama-gguf-split --merge)")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path} does not begin as a GGUF file: download it again")
    gguf = _gguf()
    with loading(f"{path} cannot be read", "download it again"):
        reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items() if not _is_list(field)}
        tensors = tuple(tensor.name for tensor in reader.tensors)
        kinds = tuple(sorted({tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}))
    for name, value in values.items():
        if name.endswith(".expert_count") and value:
            raise ValueError(f"{path}: experts are not converted from GGUF: {_ORIGINAL}")
        if name.endswith(".rope.scaling.type") and value != "none":
            raise ValueError(f"{path}: {name} is {value}: transformers does not read it from GGUF: {_ORIGINAL}")
    if "rope_freqs.weight" in tensors:
        raise ValueError(f"{path}: scaled rotary frequencies: transformers does not read them from GGUF: {_ORIGINAL}")
    ends = (values.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot"))
    return GGUFHeader(path, tensors, kinds, tuple(dict.fromkeys(int(end) for end in ends if end is not None)))


def read_model_config(source: Path) -> Config:
    """The config of a model: config.json of a folder, or what transformers derives from the header of a GGUF file."""
    path = find_gguf(source)
    return read_config(source) if path is None else _config(path)


def _config(path: Path) -> Config:
    read_header(path)
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    with loading(f"{path} cannot be read", "give a GGUF file of a family that transformers de-quantizes"):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    values = {**config.to_dict(), "architectures": [architecture]}
    if isinstance(
        epsilon := values.get("rms_norm_eps"), float
    ):  # fp32 in the file: 1e-5 reads as 9.999999747378752e-06
        values["rms_norm_eps"] = float(str(np.float32(epsilon)))
    return values


def read_gguf(path: Path, config: Config) -> GGUFWeights:
    """De-quantizes a file. config: of `read_model_config`.

    Raises:
        ValueError: a weight is missing, or a tensor is not a weight of the model.
    """
    header = read_header(path)
    from transformers import AutoModelForCausalLM

    with loading(f"{path} cannot be de-quantized", "give a GGUF file of a family that transformers de-quantizes"):
        model, found = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        )
    tensors = {name: tensor.detach().to(header.dtype) for name, tensor in model.state_dict().items()}
    if config.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)  # the same tensor as the embedding
    missing = sorted(set(found["missing_keys"]) & tensors.keys())
    if missing:
        raise ValueError(f"{path}: missing {cut(', '.join(missing))}, which its header implies: {_ORIGINAL}")
    if len(header.tensors) != len(tensors):
        raise ValueError(
            f"{path} holds {len(header.tensors)} tensors, of which transformers reads {len(tensors)}: {_ORIGINAL}"
        )
    return GGUFWeights(header, tensors)


def _is_list(field: Any) -> bool:
    return bool(field.types[0].name == "ARRAY")


def _gguf() -> Any:
    """The package gguf, with which transformers reads these files, and accelerate, which it needs for that too."""
    try:
        import_module("accelerate")
        return import_module("gguf")
    except ImportError as e:
        raise ValueError(f'GGUF files need the extra gguf ({e}): pip install "megatron-sfr[gguf]"') from e
