"""Imports in separate processes: a broken extension may end the process that loads it, or never return."""

import os
import subprocess
import sys
from collections.abc import Sequence

from megatron_sfr.doctor.finding import Finding, Mark
from megatron_sfr.runtime.lifetime import tied

LIMIT_S = 120.0  # an import from a slow network file system may take a minute


def begin_python(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """A Python process with piped output that ends with this one.

    Without Inductor, as a rank on CPU runs: Megatron's compiled functions would import it.
    """
    command = tied([sys.executable, "-W", "ignore", *arguments])
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def begin_import(module: str) -> subprocess.Popen[str]:
    """Starts to import a module, without garbage collection, which takes a seventh of the time."""
    return begin_python(["-c", f"import gc; gc.disable(); import {module}"])


def result_of(process: subprocess.Popen[str], limit_s: float = LIMIT_S) -> tuple[str, str | None]:
    """(standard output, why the process failed or None). Kills it at the limit."""
    with process:
        try:
            output, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return "", f"no result after {limit_s:.0f} seconds (slow file system, or a driver that hangs)"
    if process.returncode == 0:
        return output, None
    return output, (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]


def import_finding(
    module: str, mark_if_broken: Mark, remedy: str, process: subprocess.Popen[str] | None = None
) -> Finding:
    """Whether a module can be imported. process: of `begin_import`, if it was started before."""
    reason = result_of(process or begin_import(module))[1]
    if reason is None:
        return Finding("ok", f"import {module}")
    return Finding(mark_if_broken, f"import {module} fails: {reason}; {remedy}")
