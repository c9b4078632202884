"""Checks this machine's GPU from tests to benchmarks: `python -m tools.gpu_check`, or `make gpu`.

Prints one line per step and writes OUTPUT/report.md; each step has a log in OUTPUT/logs and a time limit. A failed
step stops only the steps that need it. The exit code is 1 if a step failed, 2 if there is no GPU.
"""

import argparse
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from megatron_sfr.runtime.devices import gpus
from tools.gpu_check.plan import Machine, plan
from tools.gpu_check.steps import markdown, run_all

PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "transformers")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("runs/gpu-check"), help="folder to write, emptied first (%(default)s)"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="run only these steps, on existing data")
    parser.add_argument(
        "--slow", type=float, default=1.0, metavar="FACTOR", help="factor on every time limit (%(default)s)"
    )
    parser.add_argument(
        "--encoder", default="minilm", help="folder or name of the targets' encoder (%(default)s, of the demo extra)"
    )
    parser.add_argument("--dry-run", action="store_true", help="the same steps on the CPU, to check this program")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    found = gpus()
    if not found and not args.dry_run:
        print("gpu_check: error: torch sees no GPU; megatron-sfr doctor says why (--dry-run takes a CPU)")
        return 2
    no_gpu = "" if found else "no GPU"
    no_engine = no_gpu or ("" if find_spec("transformer_engine") else "Transformer Engine is not installed")
    output = args.output.resolve()
    steps = plan(Machine(output, args.dry_run, no_gpu, "" if args.dry_run else no_engine, args.encoder))
    names = {step.name for step in steps}
    if unknown := [name for name in args.only if name not in names]:
        print(f"gpu_check: error: no step {unknown[0]}; there are {', '.join(sorted(names))}")
        return 2
    for name in ("data", "runs") if not args.only else ():
        shutil.rmtree(output / name, ignore_errors=True)
    for name in args.only:
        shutil.rmtree(output / "runs" / name, ignore_errors=True)
    about = [f"- device: {', '.join(gpu.name for gpu in found) or 'CPU (dry run)'}"]
    about += [f"- {package} {installed(package)}" for package in PACKAGES]
    results = run_all(steps, output / "logs", only=frozenset(args.only), slow=args.slow)
    report = output / "report.md"
    report.write_text(markdown("Check of a GPU", about, results), encoding="utf-8")
    failed = [result.name for result in results if result.mark == "FAIL"]
    print(f"{len(failed)} failed{': ' if failed else ''}{', '.join(failed)}; {report}")
    return 1 if failed else 0


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
