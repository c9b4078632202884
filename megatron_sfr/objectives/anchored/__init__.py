"""Losses of a token that also compare the model with a frozen reference model, from stored probabilities."""

from megatron_sfr.objectives.anchored.asft import ASFT
from megatron_sfr.objectives.anchored.reference import Reference

__all__ = ["ASFT", "Reference"]
