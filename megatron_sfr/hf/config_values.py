"""Reads values of an HF config.json and checks their type and range. Errors name the key and the value."""

from typing import Any

from megatron_sfr.storage.user_files import shown

LARGEST = 100_000_000
"""Upper bound of any size or number in config.json."""
MOST = 10_000
COUNTED = frozenset(["num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts"])
"""Sizes of which there are at most MOST: each layer and each expert has separate tensors, which are listed."""
Config = dict[str, Any]
"""An HF config.json as read."""


def need(config: Config, key: str) -> Any:
    """A required value of config.json."""
    if config.get(key) is None:
        raise ValueError(f"config.json has no {key!r}: is it the config of the whole model?")
    return config[key]


def size(config: Config, key: str, default: int | None = None) -> int:
    """A size in config.json: an integer of at least 1. It may be missing or null if there is a default."""
    value = config.get(key) if default is not None else need(config, key)
    if value is None:
        assert default is not None
        return default
    most = MOST if key in COUNTED else LARGEST
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"config.json: {key} is {shown(value)}; it has to be a whole number from 1 to {most:,}")
    return value


def number(config: Config, key: str, default: float) -> float:
    """A number in config.json, at least 0, with a default."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST:
        raise ValueError(f"config.json: {key} is {shown(value)}; it has to be a number, at least 0")
    return value


def is_true(config: Config, key: str) -> bool:
    """A boolean in config.json; false if it is missing or null."""
    value = config.get(key)
    if not isinstance(value, bool | None):
        raise ValueError(f"config.json: {key} is {shown(value)}; it has to be true or false")
    return bool(value)


def mapping(config: Config, key: str) -> Config:
    """An object in config.json; empty if it is missing or null."""
    value = config.get(key)
    if not isinstance(value, dict | None):
        raise ValueError(f"config.json: {key} is {shown(value)}; it has to be an object")
    return value or {}
