"""End tokens: `eos_token_id` of generation_config.json and config.json, which stops engines, kept and extended.

A base model fine-tuned on a chat template ends its replies on a token that its configuration does not list. A
checkpoint's arguments have the ids (`reply_end_tokens`), and an export adds them.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sfr.hf.gguf.gguf_file import read_header
from megatron_sfr.hf.hf_folder import CONFIG
from megatron_sfr.storage.model_folders import TOKENIZER, find_gguf
from megatron_sfr.storage.user_files import read_json_object, shown

GENERATION = "generation_config.json"
CARRIED = ("bos_token_id", "pad_token_id")
"""Other keys that transformers takes from config.json if there is no generation_config.json."""


def end_tokens_of(folder: Path) -> tuple[int, ...]:
    """The end tokens of a folder: from generation_config.json, else config.json, else its GGUF file, else none."""
    for name in (GENERATION, CONFIG):
        if (folder / name).is_file() and (ids := _ids(folder / name)):
            return ids
    gguf = find_gguf(folder)
    return () if gguf is None else read_header(gguf).end_tokens


def keep_tokens(source: Path, folder: Path) -> None:
    """Keeps the end tokens and the tokenizer of an HF folder beside a checkpoint, so that `megatron_sfr.train` can
    compare them with the data's."""
    if (source / TOKENIZER).is_file():
        shutil.copyfile(source / TOKENIZER, folder / TOKENIZER)
    if (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, folder / GENERATION)
    elif ids := end_tokens_of(source):
        _write(folder / GENERATION, {"eos_token_id": list(ids)})


def add_end_tokens(folder: Path, ids: Sequence[int]) -> tuple[int, ...]:
    """Adds ids to the end tokens of an HF folder. Returns the new ones."""
    known = end_tokens_of(folder) if ids else ()
    added = tuple(id for id in ids if id not in known)
    if not added:
        return ()
    config = read_json_object(folder / CONFIG)
    if (folder / GENERATION).is_file():
        generation = read_json_object(folder / GENERATION)
    else:
        generation = {name: config[name] for name in CARRIED if config.get(name) is not None}
    _write(folder / GENERATION, generation | {"eos_token_id": [*known, *added]})
    _write(folder / CONFIG, config | {"eos_token_id": [*dict.fromkeys((*(_ids(folder / CONFIG) or known), *added))]})
    return added


def _ids(path: Path) -> tuple[int, ...]:
    ids = read_json_object(path).get("eos_token_id")
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(id) is int and id >= 0 for id in listed):
        raise ValueError(f"{path}: eos_token_id is {shown(ids)}; give the id of a token, or a list of them")
    return tuple(listed)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
