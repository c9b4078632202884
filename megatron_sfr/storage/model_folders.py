"""Whether a folder can hold a Hugging Face model, checked without torch: commands refuse a wrong path at once."""

from pathlib import Path

CONFIG = "config.json"


def check_model_folder(folder: Path) -> None:
    """Raises ValueError if a folder cannot be a Hugging Face model that is sampled."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not a Hugging Face model ({CONFIG} is missing); run megatron-sfr convert export")


def check_config(folder: Path) -> Path:
    """The path of a Hugging Face folder's config.json. Raises ValueError if it does not exist."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name the folder of a Hugging Face model")
    return path


def check_source(source: Path) -> None:
    """Raises ValueError if a path is neither a GGUF file, nor a folder with one or with config.json."""
    if not source.is_file() and not any(source.glob("*.gguf")):
        check_config(source)
