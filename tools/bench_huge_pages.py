"""Measures what huge pages change on CPU (`python -m tools.bench_huge_pages`): training steps with and without
THP_MEM_ALLOC_ENABLE=1, torch's switch for transparent huge pages of large tensors.

Alternates processes of `tools.bench_overhead`, which have one seed and one shape. Prints the time of each kind of step,
the ratio of neighbouring processes with its quartiles, and page faults. Other arguments are bench_overhead's.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sfr.runtime.lifetime import tied
from tools.bench_overhead import ratios

SWITCH = "THP_MEM_ALLOC_ENABLE"
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True)
class Process:
    """What one process of the benchmark measured."""

    ms: dict[str, float]
    """Median time of each kind of step."""
    faults: int
    """Page faults of the process, minor and major."""


def measure(flags: Sequence[str], *, huge: bool) -> Process:
    """Runs bench_overhead once."""
    environment = os.environ | {SWITCH: "1"}
    if not huge:
        del environment[SWITCH]
    before = _faults()
    with tempfile.TemporaryDirectory() as folder:
        numbers = Path(folder, "numbers.json")
        program = [sys.executable, "-W", "ignore", "-m", "tools.bench_overhead", *flags, "--json", str(numbers)]
        command = tied(program)  # ends with this process
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        rows = json.loads(numbers.read_text())["rows"]
    return Process({row["step"]: row["ms"] for row in rows}, _faults() - before)


def _faults() -> int:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_minflt + usage.ru_majflt


def report(pairs: Sequence[tuple[Process, Process]]) -> list[str]:
    """A table: without and with huge pages, and the ratio within each pair."""
    lines = [f"{'step':26}{'without, ms':>13}{'with, ms':>11}{'ratio':>8}{'quartiles':>18}"]
    for step in pairs[0][0].ms:
        plain, huge = ([process.ms[step] for process in side] for side in zip(*pairs, strict=True))
        low, ratio, high = ratios(huge, plain)
        medians = f"{statistics.median(plain):13.1f}{statistics.median(huge):11.1f}"
        lines.append(f"{step:26}{medians}{ratio:8.3f}{f'{low:.3f} to {high:.3f}':>18}")
    without, with_them = (statistics.median(process.faults for process in side) for side in zip(*pairs, strict=True))
    lines.append(f"page faults of a process: {without:,.0f} without, {with_them:,.0f} with")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--pairs", type=int, default=5, help="processes of each kind (%(default)s)")
    args, flags = parser.parse_known_args()
    print(f"{KERNEL}: {KERNEL.read_text().strip()}; load {os.getloadavg()[0]:.2f}", flush=True)
    pairs = []
    for i in range(args.pairs):  # which of the two comes first alternates too
        order = (False, True) if i % 2 == 0 else (True, False)
        found = {huge: measure(flags, huge=huge) for huge in order}
        pairs.append((found[False], found[True]))
    print("\n".join(report(pairs)))


if __name__ == "__main__":
    main()
