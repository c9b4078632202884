"""Measures the speed of `prepare` against the tokenizer alone on the same text (`python -m tools.bench_prepare`).

The bound is one call of the tokenizer for each conversation, on the text that its tokens spell, in one process without
threads: it parses no JSON, renders no template, computes no mask, cuts no segments and writes nothing. The same is
measured for `prepare-text`, whose documents are the texts of these conversations without their control tokens.

Rates are per second of wall time and, in brackets, per second of CPU time of all processes, which other work on the
machine changes little. Medians of the repetitions. Start-up is measured apart, on two records for each process: loading
the tokenizer, starting the workers and what these import. It does not grow with the input, so the last table has the
shares of the bound with it, for an input of this size, and without it, for a long one.

Without --input, conversations of three turns of made-up words are written, and a byte-level BPE tokenizer is trained on
them; give --input and --tokenizer for numbers of your own data.
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
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.document_source import DocumentOptions
from megatron_sfr.data.prepare.pipeline import Options, prepare
from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.demo.train_tokenizer import train_tokenizer
from megatron_sfr.storage.jsonl import read_records

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


def measure(
    inputs: Sequence[Path], tokenizer: Path, folder: Path, options: Options[Any], texts: list[str], repeats: int
) -> list[Row]:
    """The bound, then prepare by one process and two, each after its start-up."""
    folder.mkdir(exist_ok=True)
    manifest = prepare(inputs, folder / "out", tokenizer, options, progress=False, force=True)
    loaded, command = load_tokenizer(str(tokenizer), chat=False), f"prepare{'' if is_chat(options) else '-text'}"
    rows = [
        Row("plain encoding, 1 process", *timed(lambda: encode(loaded, texts), repeats), manifest.tokens, len(texts))
    ]
    for n in (1, 2):
        few = first_records(inputs[0], 2 * n, folder / "few.jsonl")

        def start(few: Path = few, n: int = n) -> None:
            prepare([few], folder / "few", tokenizer, options, progress=False, force=True, workers=n, chunk_bytes=1)

        def whole(n: int = n) -> None:
            prepare(inputs, folder / "out", tokenizer, options, progress=False, force=True, workers=n)

        rows.append(Row(f"start-up, {n} process{'es' * (n > 1)}", *timed(start, repeats), 0, 2 * n))
        rows.append(Row(f"{command}, {n} process{'es' * (n > 1)}", *timed(whole, repeats), manifest.tokens, len(texts)))
    return rows


def encode(tokenizer: Any, texts: Sequence[str]) -> None:
    for text in texts:
        tokenizer(text, add_special_tokens=False, verbose=False)


def first_records(path: Path, n: int, output: Path) -> Path:
    """A file with the first records of another."""
    records = islice(read_records(path), n)
    output.write_bytes(b"".join(record.text.rstrip() + b"\n" for record in records))
    return output


def is_chat(options: Options[Any]) -> bool:
    return isinstance(options, PrepareOptions)


def texts_of(inputs: Sequence[Path], tokenizer: Path, folder: Path, options: PrepareOptions) -> tuple[list[str], Path]:
    """What the tokens of the conversations spell; and a file of documents, the same without control tokens."""
    prepare(inputs, folder / "out", tokenizer, options, progress=False)
    data, loaded = PreparedData.open(folder / "out"), load_tokenizer(str(tokenizer))
    chats, documents = [], []
    for i in range(len(data)):
        tokens = data[i].tokens
        chats.append(loaded.decode(tokens, clean_up_tokenization_spaces=False))
        documents.append(loaded.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return chats, path


def report(title: str, rows: Sequence[Row]) -> None:
    bound, *others = rows
    print(f"\n{title}: {bound.tokens:,} tokens in {bound.records:,} records")
    print(f"{'':<28}{'tokens/s [CPU]':>24}{'records/s [CPU]':>24}")
    print(*(row for row in rows if row.tokens), sep="\n")
    print(f"{'share of the bound [CPU]':<28}{'with start-up':>16}{'without':>16}{'start-up, s':>20}")
    for start, row in zip(others[::2], others[1::2], strict=True):
        with_it = f"{bound.wall / row.wall:.2f} [{bound.cpu / row.cpu:.2f}]"
        wall, cpu = row.wall - start.wall, row.cpu - start.cpu
        is_long = min(wall, cpu) > 0  # a short input starts fewer workers
        without = f"{bound.wall / wall:.2f} [{bound.cpu / cpu:.2f}]" if is_long else "input too short"
        print(f"{row.name:<28}{with_it:>16}{without:>16}{f'{start.wall:.2f} [{start.cpu:.2f}]':>20}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", type=Path, metavar="FILE", help="as of prepare (default: made here)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="of the input (default: trained here)")
    parser.add_argument("--records", type=int, default=6000, help="conversations to make (default: %(default)s)")
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
            train_tokenizer([inputs[0].read_text(encoding="utf-8")], 2000).save_pretrained(tokenizer)
        options = PrepareOptions(seq_length=args.seq_length, too_long="truncate", skip_bad_rows=True)
        chats, documents = texts_of(inputs, tokenizer, folder, options)
        rows = measure(inputs, tokenizer, folder, options, chats, args.repeats)
        plain = [json.loads(line)["text"] for line in documents.read_text(encoding="utf-8").splitlines()]
        text_rows = measure([documents], tokenizer, folder / "text", DocumentOptions(), plain, args.repeats)
    processor, cores = platform.processor() or platform.machine(), len(os.sched_getaffinity(0))
    print(f"{processor}, {cores} cores; {args.repeats} runs each")
    report("Conversations", rows)
    report("Documents", text_rows)


if __name__ == "__main__":
    main()
