"""Names of a hybrid model's tensors in its checkpoints, and the layers of GPTModel that its pattern describes.

HybridModel numbers attention and MLP as separate layers: layer i of GPTModel is its layers 2 i and 2 i + 1. Families of
equal layers have GPTModel's names, families of different layers have HybridModel's.
"""

import re
from collections.abc import Mapping
from typing import Any

PATTERN = "hybrid_layer_pattern"
"""Upstream's argument with the layers of a hybrid model; None for GPTModel."""
_IN_A_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(\w+)")
_OF_ATTENTION = ("self_attention", "input_layernorm")


def paired_layers(pattern: str) -> int:
    """How many layers of GPTModel a pattern describes. Raises ValueError if GPTModel does not compute what it does."""
    if not re.fullmatch(r"(\*-)+|(\*E)+", layers := pattern.replace("|", "")):
        raise ValueError(
            f"hybrid_layer_pattern {pattern}: the families of Hugging Face that are converted have an MLP after each "
            "attention (*-*-...) or experts after each (*E*E...)"
        )
    return len(layers) // 2


def is_hybrid(flags: Mapping[str, object]) -> bool:
    """Whether a family has HybridModel's names. flags: the family's, from a config."""
    return PATTERN in flags


def comparable(arguments: Mapping[str, Any], flags: Mapping[str, object]) -> Mapping[str, Any]:
    """The arguments of a run, to be compared with a family's flags. Raises ValueError for layers that no family has.

    A pattern has no ends of stages, or is the number of the layers of GPTModel.
    """
    pattern = arguments.get(PATTERN)
    if pattern is None:
        return arguments
    if is_hybrid(flags):
        return {**arguments, PATTERN: pattern.replace("|", "")}
    return {**arguments, "num_layers": paired_layers(pattern)}


def hybrid_name(name: str) -> str:
    """HybridModel's name of a tensor, from GPTModel's."""

    def numbered(found: re.Match[str]) -> str:
        return f"decoder.layers.{2 * int(found[1]) + (found[2] not in _OF_ATTENTION)}.{found[2]}"

    return _IN_A_LAYER.sub(numbered, name).replace("decoder.final_layernorm.", "decoder.final_norm.")
