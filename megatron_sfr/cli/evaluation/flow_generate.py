"""Sample text from a KL-flow checkpoint, all of its tokens at once.

Without an input it samples unconditional texts; --prompt and --prompts sample replies; --infill fills gaps, given as
records {"prefix": text, "suffix": text, "length": tokens between them}. Equal commands give equal samples for any batch
size and --nproc. --infill also takes {"parts": [text, gap, text, ...]}, where a gap is a number of tokens, or
{"at_most": n} if its length is not known. The same command resumes a stopped run and writes the same file.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sfr.hf.megatron.tracker import locate

if TYPE_CHECKING:
    from megatron_sfr.kl_flow.flow_generate import Job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="the --save folder of a run")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="the tokenizer of its data")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="one user turn to reply to")
    what.add_argument(
        "--prompts", type=Path, metavar="FILE", help="JSONL records with prompt or messages, and optionally persona"
    )
    what.add_argument(
        "--infill", type=Path, metavar="FILE", help="JSONL records with prefix, suffix and length, or parts"
    )
    parser.add_argument("--persona", metavar="NAME", help="persona that answers --prompt")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the JSONL file to write (default: the terminal)")
    parser.add_argument("--samples", type=int, default=1, help="samples per input (%(default)s)")
    parser.add_argument("--length", type=int, help="tokens of an unconditional text (default: all positions)")
    parser.add_argument(
        "--max-new-tokens", type=int, help="longest reply, in tokens (default: all positions after the prompt)"
    )
    parser.add_argument(
        "--method",
        choices=("basic", "sampling", "hybrid"),
        default="hybrid",
        help="basic solves the ODE, sampling draws tokens and fresh noise, hybrid does first one, then the other "
        "(%(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, help="sampling steps (default: one per free token if some tokens are given, else 512)"
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        help="draw from the k most likely tokens; 0: all (%(default)s), 1: as in the paper's code",
    )
    parser.add_argument("--final-top-k", type=int, default=1, help="the same for the final decoding (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="temperature of draws (%(default)s)")
    parser.add_argument(
        "--t-split", type=float, help="time at which hybrid starts to draw (default: 0.28 / 0.3 of t_max)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="samples per batch (%(default)s)")
    parser.add_argument("--nproc", type=int, default=1, help="processes that share the model (%(default)s)")
    parser.add_argument(
        "--backend", choices=("auto", "cpu", "cuda"), default="auto", help="device (default: a GPU if any)"
    )
    parser.add_argument(
        "--film", metavar="FILE.html", help="write the first sample's trajectory as a page; -: show it on the terminal"
    )


def run(args: argparse.Namespace) -> int:
    if args.persona is not None and args.prompt is None:
        raise ValueError("--persona goes with --prompt; in a file each record names its own")
    if (args.prompts or args.infill) and args.output is None:
        raise ValueError(f"{'--prompts' if args.prompts else '--infill'} needs --output FILE for the samples")
    locate(args.checkpoint)  # before torch is imported
    from megatron_sfr.kl_flow.flow_generate import is_up_to_date, notice, plan

    with _scratch() as scratch:
        job = _job(args, scratch)
        made = plan(job)  # reports errors before processes start
        if job.film is None and is_up_to_date(job, made):
            print(f"{args.output} is up to date")
            return 0
        if text := notice(made):
            print(text, file=sys.stderr)
        start(job, scratch / "log")
        lines = Path(job.output).read_text(encoding="utf-8").splitlines()
        if args.output is None:
            print(*(json.loads(line)["text"] for line in lines), sep="\n")
        else:
            print(f"{args.output}: {len(lines):,} samples")
        if job.film is not None:
            _show(Path(job.film), args.film)
    return 0


@contextmanager
def _scratch() -> Iterator[Path]:
    """A temporary folder for the processes' files; kept after a failure, because its log has the reason."""
    folder, stays = Path(tempfile.mkdtemp(prefix="flow-generate-")), False
    try:
        yield folder
    except ValueError:
        stays = (folder / "log").exists()
        raise
    finally:
        if not stays:
            shutil.rmtree(folder)


def _job(args: argparse.Namespace, scratch: Path) -> "Job":
    from dataclasses import fields

    from megatron_sfr.kl_flow.flow_generate import Job

    given = {field.name: getattr(args, field.name) for field in fields(Job)}
    given["output"] = args.output or scratch / "samples.jsonl"
    given["film"] = scratch / "film.json" if args.film else None
    as_text: dict[str, Any] = {name: str(x) if isinstance(x, Path) else x for name, x in given.items()}
    return Job(**as_text)


def start(job: "Job", log: Path) -> None:
    """Runs the job in its processes, with a progress bar on the terminal and other output in a log."""
    from dataclasses import asdict

    from megatron_sfr.kl_flow.flow_generate import ERROR
    from megatron_sfr.runtime.failures import failure
    from megatron_sfr.runtime.lifetime import tied

    file = log.with_name("job.json")
    file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.nproc)] if job.nproc > 1 else []
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // job.nproc))}
    with log.open("wb") as sink:
        done = subprocess.run(
            tied([sys.executable, *ranks, "-m", "megatron_sfr.kl_flow.flow_generate", str(file)]),
            stdout=sys.__stderr__,
            stderr=sink,
            env=threads | os.environ,
        )
    if done.returncode != 0:
        raise ValueError(failure(log, ERROR, "sampling", done.returncode))


def _show(frames: Path, film: str) -> None:
    """Shows the trajectory as a page or on the terminal; without a terminal it prints a few frames."""
    import time

    from megatron_sfr.kl_flow.sampling.trajectory import from_json, moving, stills
    from megatron_sfr.kl_flow.sampling.trajectory_html import page
    from megatron_sfr.storage.atomic import replacing

    made = from_json(frames.read_text(encoding="utf-8"))
    if film != "-":
        with replacing(Path(film)) as file:
            file.write(page(made))
        print(f"{film}: {len(made.frames)} frames")
    elif sys.stdout.isatty():
        for picture in moving(made, shutil.get_terminal_size().columns):
            print(picture, end="", flush=True)
            time.sleep(0.05)
    else:
        print(*stills(made), sep="\n")
