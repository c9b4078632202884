"""nvidia-resiliency-ext, the package that writes asynchronous saves by default: which version is there.

megatron-core 0.19.2 selects the writer by `async_strategy`: nvrx, its default, is that package's; mcore is upstream's
older one, which it calls deprecated. It does not import beside a version of the package before 0.6.
"""

import re

from megatron_sfr.doctor.finding import Finding
from megatron_sfr.doctor.required_packages import installed

NAME = "nvidia-resiliency-ext"
OLDEST = (0, 6)
"""Upstream's minimum, strategies/nvrx.py of 0.19.2."""
INSTALL = "pip install -e '.[resilience]'"


def is_usable(found: str | None) -> bool:
    """Whether megatron-core works with this version of the package."""
    return found is not None and tuple(map(int, re.findall(r"\d+", found)[:2])) >= OLDEST


def has_usable_version() -> bool:
    """Whether asynchronous saves can use the package."""
    return is_usable(installed(NAME))


def resilience_finding() -> Finding:
    """Which writer asynchronous saves would use."""
    found = installed(NAME)
    if found is None:
        return Finding("note", f"{NAME} is not installed: async_save needs it or async_strategy mcore; {INSTALL}")
    if not is_usable(found):
        remedy = f"pip uninstall {NAME}, or {INSTALL} (its wheels need glibc 2.39)"
        return Finding("problem", f"{NAME} {found}: Megatron does not import beside a version before 0.6; {remedy}")
    return Finding("ok", f"{NAME} {found}: async_save uses it (async_strategy nvrx)")
