"""Measures the speed of `prepare` against the tokenizer alone on the same text (`python -m tools.bench_prepare`).

The bound is one call of the tokenizer for each conversation, on the text that its tokens spell, in one process without
threads: it parses no JSON, renders no template, computes no mask, cuts no segments and writes nothing. Rates are per
second of wall time and, in brackets, per second of CPU time of all processes, which other work on the machine does not
change. Medians of the repetitions. Without --input, conversations of three turns of made-up words are written, and a
byte-level BPE tokenizer is trained on them; give --input and --tokenizer for numbers of your own data.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.demo.train_tokenizer import save_tokenizer, train_tokenizer

STEMS = "riv stone clou bird song wint summ ligh shado gent brig old new quie harb lant mead fros copp vell".split()
ENDS = "er y d s ing ed ly ness ful ter low ven ard ish".split()


@dataclass(frozen=True)
class Row:
    """One row of the table: what ran, for how long, over how many tokens and records."""

    name: str
    wall: float
    cpu: float
    tokens: int
    records: int

    def __str__(self) -> str:
        rates = [f"{count / s:>12,.0f}" for count in (self.tokens, self.records) for s in (self.wall, self.cpu)]
        return f"{self.name:<28}{rates[0]} [{rates[1].strip()}]{rates[2]} [{rates[3].strip()}]"


def write_corpus(folder: Path, records: int) -> Path:
    """Conversations of three questions and replies of 20 to 200 words, of a vocabulary of 280 words."""
    rng = random.Random(0)
    words = [stem + end for stem in STEMS for end in ENDS]

    def text(low: int, high: int) -> str:
        chosen = rng.choices(words, k=rng.randint(low, high))
        return ". ".join(" ".join(chosen[i : i + 9]).capitalize() for i in range(0, len(chosen), 9)) + "."

    path = folder / "chats.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(records):
            turns = [text(*size) for _ in range(3) for size in ((5, 30), (20, 200))]
            roles = ("user", "assistant") * 3
            messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
            file.write(json.dumps({"persona": "poet", "messages": messages}) + "\n")
    return path


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median seconds of wall time, and of CPU time with the children that have ended."""
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), _cpu()
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append(_cpu() - cpu)
    return statistics.median(walls), statistics.median(cpus)


def _cpu() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(inputs: Sequence[Path], tokenizer: Path, folder: Path, seq_length: int, repeats: int) -> list[Row]:
    """The bound, and prepare by one process and two."""
    options = PrepareOptions(seq_length=seq_length, too_long="truncate", skip_bad_rows=True)
    manifest = prepare(inputs, folder / "out", tokenizer, options, progress=False)
    data, loaded = PreparedData.open(folder / "out"), load_tokenizer(str(tokenizer))
    texts = [loaded.decode(data[i].tokens, clean_up_tokenization_spaces=False) for i in range(len(data))]

    def plain() -> None:
        for text in texts:
            loaded(text, add_special_tokens=False, verbose=False)

    def run(workers: int) -> Callable[[], Any]:
        how = {"workers": workers, "progress": False, "force": True}
        return lambda: prepare(inputs, folder / "out", tokenizer, options, **how)  # type: ignore[arg-type]

    arms = [("plain encoding, 1 process", plain)]
    arms += [(f"prepare, {n} process{'es' * (n > 1)}", run(n)) for n in (1, 2)]
    return [Row(name, *timed(work, repeats), manifest.tokens, len(data)) for name, work in arms]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", type=Path, metavar="FILE", help="as of prepare (default: made here)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="of the input (default: trained here)")
    parser.add_argument("--records", type=int, default=2000, help="conversations to make (default: %(default)s)")
    parser.add_argument("--seq-length", type=int, default=4096, help="as of prepare (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each row (default: %(default)s)")
    args = parser.parse_args()
    if (args.input is None) != (args.tokenizer is None):
        raise SystemExit("give --input and --tokenizer, or neither")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs, tokenizer = args.input, args.tokenizer
        if inputs is None:
            inputs, tokenizer = [write_corpus(folder, args.records)], folder / "tokenizer"
            save_tokenizer(train_tokenizer([inputs[0].read_text(encoding="utf-8")], 2000), tokenizer)
        rows = measure(inputs, tokenizer, folder, args.seq_length, args.repeats)
    print(
        f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores; {args.repeats} runs each"
    )
    print(f"{rows[0].tokens:,} tokens in {rows[0].records:,} records")
    print(f"{'':<28}{'tokens/s [CPU]':>24}{'records/s [CPU]':>24}")
    print(*rows, sep="\n")
    print(f"share of the bound, 1 process: {rows[0].wall / rows[1].wall:.2f} [{rows[0].cpu / rows[1].cpu:.2f}]")


if __name__ == "__main__":
    main()
