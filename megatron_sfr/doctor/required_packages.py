"""Whether every package that the installation requires is there in a fitting version, from metadata alone.

Imports none of them: reading the metadata of 120 packages takes half a second, importing Megatron more than six.
"""

from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from megatron_sfr.doctor.finding import REINSTALL, Finding, Mark

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PACKAGE = "megatron-sfr"


def installed(name: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package_finding(name: str, mark_if_absent: Mark, remedy: str) -> Finding:
    found = installed(name)
    return Finding("ok", f"{name} {found}") if found else Finding(mark_if_absent, f"{name} is not installed; {remedy}")


def required_findings(root: str = PACKAGE) -> Iterator[Finding]:
    """One finding for each package that is missing (a problem) or has an unfit version (a note), else one line.

    A version outside its bounds is a note, because containers ship combinations that pip would not choose.
    """
    if find_spec("packaging") is None:  # which reads requirements, and which torch's own tools need too
        yield Finding("problem", f"packaging is not installed; {REINSTALL}")
        return
    if installed(root) is None:
        yield Finding("note", f"{root} is not installed, only importable: requirements were not checked; {REINSTALL}")
        return
    checked, faults = 0, False
    for requirement, asked_by in requirements_of(root):
        checked += 1
        found = installed(requirement.name)
        if found is None:
            faults = True
            yield Finding("problem", f"{requirement.name} is not installed, and {asked_by} requires it; {REINSTALL}")
        elif not requirement.specifier.contains(found, prereleases=True):
            faults = True
            bounds = f"{requirement.name}{requirement.specifier}"
            yield Finding("note", f"{requirement.name} {found}: {asked_by} requires {bounds}; {REINSTALL}")
    if not faults:
        yield Finding("ok", f"all {checked} requirements of {root} and of what it requires are installed")


def requirements_of(root: str) -> "Iterator[tuple[Requirement, str]]":
    """(requirement, the package that has it) for a package and all that it requires; each pair once."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    waiting: list[tuple[str, frozenset[str]]] = [(root, frozenset())]
    visited, given = set(waiting), set()
    while waiting:
        name, extras = waiting.pop()
        found = _distribution(name)
        for line in (found.requires if found else None) or ():
            requirement = Requirement(line)
            marker = requirement.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
                continue
            if (line, name) not in given:
                given.add((line, name))
                yield requirement, name
            following = canonicalize_name(requirement.name), frozenset(requirement.extras)
            if following not in visited:
                visited.add(following)
                waiting.append(following)


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None
