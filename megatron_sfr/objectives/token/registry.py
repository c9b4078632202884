"""The token objectives by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
from megatron_sfr.objectives.token.dft import DFT
from megatron_sfr.objectives.token.gem import GEM, GEMOptions
from megatron_sfr.objectives.token.sed import SED, SEDOptions
from megatron_sfr.objectives.token.token_loss import TokenObjective


@dataclass(frozen=True)
class ObjectiveOptions:
    """The loss of each token."""

    objective: Literal["ce", "gem", "sed", "dft"] = "ce"
    """Loss of each token: cross-entropy (default), GEM (arXiv 2408.16673), SED-SFT (arXiv 2602.07464) or DFT (arXiv
    2508.05629). --sfr adds the flow-matching loss to it. The log's `lm loss` is always cross-entropy."""


OBJECTIVES: dict[str, Callable[[GEMOptions, SEDOptions], TokenObjective]] = {
    "ce": lambda gem, sed: CrossEntropy(),
    "gem": lambda gem, sed: GEM(gem),
    "sed": lambda gem, sed: SED(sed),
    "dft": lambda gem, sed: DFT(),
}
