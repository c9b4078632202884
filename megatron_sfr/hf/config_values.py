"""Values of an HF config.json, read with a check of their type and range; ValueError names the key and the value."""

from typing import Any

from megatron_sfr.storage.user_files import shown

LARGEST = 100_000_000
"""Of any size or number in config.json."""
Config = dict[str, Any]
"""An HF config.json as read."""


def need(config: Config, key: str) -> Any:
    """A value of config.json that has no default."""
    if config.get(key) is None:
        raise ValueError(f"config.json has no {key!r}: is it the config of the whole model?")
    return config[key]


def size(config: Config, key: str, default: int | None = None) -> int:
    """A size of config.json: a whole number, at least 1. It may be missing or null where there is a default."""
    value = config.get(key) if default is not None else need(config, key)
    if value is None:
        assert default is not None
        return default
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise ValueError(f"config.json: {key} is {shown(value)}; it has to be a whole number from 1 to {LARGEST:,}")
    return value


def number(config: Config, key: str, default: float) -> float:
    """A number of config.json, at least 0, that has a default."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST:
        raise ValueError(f"config.json: {key} is {shown(value)}; it has to be a number, at least 0")
    return value


def is_true(config: Config, key: str) -> bool:
    """A truth value of config.json; false where it is missing or null."""
    value = config.get(key)
    if not isinstance(value, bool | None):
        raise ValueError(f"config.json: {key} is {shown(value)}; it has to be true or false")
    return bool(value)


def mapping(config: Config, key: str) -> Config:
    """An object inside config.json; empty where it is missing or null."""
    value = config.get(key)
    if not isinstance(value, dict | None):
        raise ValueError(f"config.json: {key} is {shown(value)}; it has to be an object")
    return value or {}
