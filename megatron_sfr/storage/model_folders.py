"""Whether a path or name can be a Hugging Face model, checked without torch: commands refuse a wrong one at once."""

import functools
import os
import re
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from megatron_sfr.storage.user_files import cut, read_json_object, reason

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
ADAPTER, TOKENIZER = "adapter_config.json", "tokenizer.json"
GGUF = ".gguf"
SAMPLE_BYTES = 1 << 16
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def check_model_folder(folder: Path) -> None:
    """Raises ValueError if a folder cannot be a Hugging Face model that is sampled."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not a Hugging Face model ({CONFIG} is missing); run megatron-sfr convert export")


def check_config(folder: Path) -> Path:
    """The path of a Hugging Face folder's config.json. Raises ValueError if it does not exist."""
    path = folder / CONFIG
    if not path.is_file():
        hint = "name the folder of a Hugging Face model"
        if (folder / ADAPTER).is_file():
            hint = f"{folder} holds an adapter: name its base model here, and {folder} in --adapter"
        raise ValueError(f"{path} does not exist: {hint}")
    return path


def vocabulary_of(folder: Path) -> object:
    """The vocabulary in a folder's tokenizer.json, without added tokens; None if it is missing or cannot be read."""
    try:
        model = read_json_object(folder / TOKENIZER).get("model")
    except (OSError, ValueError):
        return None
    return model.get("vocab") if isinstance(model, dict) else None


def find_gguf(source: Path) -> Path | None:
    """The GGUF file that a path names, or that a folder without safetensors holds; None if there is none."""
    if source.is_file():
        return source if source.suffix.lower() == GGUF else None
    if not source.is_dir() or (source / INDEX).is_file() or (source / SINGLE).is_file():
        return None
    found = sorted(path for path in source.iterdir() if path.suffix.lower() == GGUF and path.is_file())
    if len(found) > 1:
        raise ValueError(f"{source} holds {cut(', '.join(path.name for path in found))}: name one of these files")
    return found[0] if found else None


def absent(name: str, cache: str | None = None) -> str | None:
    """Why there is no folder of this path or name on the hub, if that can be said without a download; None otherwise.

    cache: the folder of downloads. Default: the hub's.
    """
    if Path(name).is_dir():
        return None
    if Path(name).is_file():
        return "it is a file, not a folder"
    if name.startswith(".") or not _HUB_NAME.fullmatch(name):
        return "it does not exist"
    from huggingface_hub import constants

    cache, why = cache or constants.HF_HUB_CACHE, offline()
    if why is None or (Path(cache) / f"models--{name.replace('/', '--')}").is_dir():
        return None
    return f"it is neither a folder nor in the cache {cache}, and {why}"


@functools.cache
def offline() -> str | None:
    """Why nothing can be downloaded from the hub; None if it answers, with whatever status.

    The hub's libraries try each file of a model six times, for minutes where there is no network. So the hub is asked
    once in a process, with a timeout of HF_HUB_ETAG_TIMEOUT seconds (10). If it does not answer, HF_HUB_OFFLINE is set
    for this process and its children: the libraries then read their caches at once.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of httpx or httpx2, by version; a status never raises
        constants.HF_HUB_OFFLINE, os.environ["HF_HUB_OFFLINE"] = True, "1"
        return f"{constants.ENDPOINT} cannot be reached ({reason(error)})"
    return None


def weights_fingerprint(files: Iterable[Path]) -> str:
    """A hash of the name and size of each file, and of samples of its content."""
    found = sha256()
    for path in sorted(files):
        size = path.stat().st_size
        found.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for offset in (0, size // 3, size // 2, max(0, size - SAMPLE_BYTES)):
                file.seek(offset)
                found.update(file.read(SAMPLE_BYTES))
    return found.hexdigest()
