"""GGUF file -> Hugging Face folder with config, weights, tokenizer and chat template, which all commands read."""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_sfr.hf.config_values import Config
from megatron_sfr.hf.end_tokens import GENERATION
from megatron_sfr.hf.export_hf import SHARD_BYTES, write_index
from megatron_sfr.hf.gguf.gguf_file import GGUFHeader, GGUFWeights, read_gguf, read_header, read_model_config
from megatron_sfr.hf.hf_folder import CONFIG, INDEX, is_up_to_date, new_folder
from megatron_sfr.hf.safetensors_writer import Header, ShardWriter, plan_shards
from megatron_sfr.storage.model_folders import find_gguf
from megatron_sfr.storage.provenance import contents_of
from megatron_sfr.storage.user_files import loading

MACHINE_KEYS = ("_name_or_path", "transformers_version", "quantization_config")
"""Keys of a config that say where and how it was read, or that the weights are quantized."""


@dataclass(frozen=True)
class DequantizeReport:
    """What was written, and from which file."""

    output: Path
    gguf: GGUFHeader
    tensors: int
    bytes: int
    up_to_date: bool


def dequantize_gguf(source: Path, output: Path, *, force: bool = False) -> DequantizeReport:
    """Writes the model of a GGUF file as a Hugging Face folder.

    Args:
        source: the file, or a folder that holds one.
        output: the folder to write. One that the same call has written stays as it is.
        force: replace the output of another call.
    Raises:
        ValueError: there is no such file, it is damaged, or transformers would read it incompletely.
    """
    if (path := find_gguf(source)) is None:
        raise ValueError(f"{source} is not a GGUF file and holds none")
    header = read_header(path)
    identity = {"command": "convert dequantize", "gguf": contents_of(path.parent, (path.name,))}
    config = read_model_config(path)
    weights = read_gguf(path, config)
    headers = {name: Header(weights.shape(name), weights.dtype(name)) for name in weights.files}
    size = sum(x.bytes for x in headers.values())
    if not (done := is_up_to_date(output, identity, force=force)):
        with new_folder(output, force=force, size=size, identity=identity) as folder:
            _write(folder, config, header, weights, headers)
    return DequantizeReport(output, header, len(headers), size, done)


def _write(folder: Path, config: Config, header: GGUFHeader, weights: GGUFWeights, headers: dict[str, Header]) -> None:
    from transformers import AutoTokenizer

    shards = plan_shards(headers, SHARD_BYTES)
    for shard in shards:
        with ShardWriter(folder, shard) as writer:
            for name in shard.tensors:
                writer.write(name, weights[name])
    if len(shards) > 1:
        write_index(shards, sum(x.bytes for x in headers.values()), folder / INDEX)
    dtype = str(header.dtype).removeprefix("torch.")
    kept = {key: value for key, value in config.items() if key not in MACHINE_KEYS}
    ends = {"eos_token_id": list(header.end_tokens)} if header.end_tokens else {}
    for name, content in ((CONFIG, kept | {"dtype": dtype}), (GENERATION, ends)):
        if content:
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    path = header.path
    with loading(f"{path}: its tokenizer cannot be read", "start from the model's safetensors"):
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
