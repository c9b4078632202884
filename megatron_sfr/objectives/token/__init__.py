"""Losses of one token, one file each. Importing this package registers them; a new one needs a line here."""

from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
from megatron_sfr.objectives.token.dft import DFT
from megatron_sfr.objectives.token.eaft import EAFT
from megatron_sfr.objectives.token.gem import GEM
from megatron_sfr.objectives.token.sed import SED
from megatron_sfr.objectives.token.tofu import TOFU

__all__ = ["DFT", "EAFT", "GEM", "SED", "TOFU", "CrossEntropy"]
