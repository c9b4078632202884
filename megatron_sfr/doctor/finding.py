"""A finding of the doctor, and what its commands install to correct one."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Mark = Literal["ok", "note", "problem"]
REINSTALL = "pip install -c constraints.txt -e ."
INSTALL_TE = "pip install --no-build-isolation -c constraints.txt -e '.[gpu]'; docs/install.md"


@dataclass(frozen=True)
class Finding:
    mark: Mark
    """A note concerns an optional part; a problem prevents training."""
    text: str

    def __str__(self) -> str:
        return f"{self.mark:<8} {self.text}"


def print_findings(findings: Iterable[Finding]) -> int:
    """Prints each finding as it is made. Returns the number of problems."""
    problems = 0
    for finding in findings:
        print(finding, flush=True)
        problems += finding.mark == "problem"
    return problems
