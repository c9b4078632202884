"""Measures how long training waits for online targets (`python -m tools.bench_prefetch`).

Steps are simulated by sleeping, since steps on a GPU leave the CPU idle; the encoder is in a separate process, as in
training. The first part uses a simulated encoder with a fixed time per block and one new block per step; the ratio is
its time over the step's. The second part uses a real encoder on conversations in random order, for several block sizes.
A block contains segments of several conversations and is encoded when the first is needed, so at the beginning of an
epoch the encoder does more than the steps need.

waits: seconds that `fetch` waited, over the seconds of the steps. The first step, which also waits for the encoder to
be loaded, is reported separately. Median and range of the repetitions. predicted: for a queue without overhead.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np

from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.targets.create import create_store
from megatron_sfr.data.targets.encoder import EncoderOptions, load_quietly
from megatron_sfr.data.targets.fill import TextEncoder
from megatron_sfr.data.targets.prefetch import Needs, Prefetcher
from megatron_sfr.data.targets.store import EncoderIdentity, StoreIdentity, TargetStore
from megatron_sfr.demo.train_tokenizer import train_tokenizer
from tools.bench_overhead import processor

RATIOS = (0.25, 0.5, 0.9, 1.1, 2.0)
BLOCK_ROWS = (8, 32, 128)
WORDS = "red green blue quick slow river stone cloud bird song winter summer light shadow gentle bright old new".split()


class Clocked:
    """A simulated encoder: random unit vectors after a fixed number of seconds per batch."""

    def __init__(self, seconds: float, dim: int = 384) -> None:
        self._seconds = seconds
        self.identity = EncoderIdentity("clocked", None, "", "own", "unit", "", 0, "float32", dim)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        time.sleep(self._seconds)
        return np.full((len(texts), self.identity.dim), self.identity.dim**-0.5, np.float32)


@dataclass
class Arm:
    """One line of the table: its steps in order, the time of each, and the encoder with its block size."""

    name: str
    steps: list[Needs]
    step_seconds: float
    block_rows: int
    make_encoder: Callable[[], TextEncoder]
    identity: EncoderIdentity
    lookahead: int
    row_seconds: float  # of the encoder, as measured or set
    first: list[float] = field(default_factory=list)  # seconds
    share: list[float] = field(default_factory=list)
    longest: list[float] = field(default_factory=list)  # wait of one step, seconds

    def run(self, data: PreparedData, folder: Path) -> None:
        identity = StoreIdentity(**vars(self.identity), batch_size=min(64, self.block_rows), block_rows=self.block_rows)
        create_store(folder, data, identity)
        store = TargetStore.open(folder, data, partial=True)
        waits = []
        with Prefetcher([store], self.make_encoder, lookahead=self.lookahead) as prefetcher:
            prefetcher.follow(self.steps)
            for needs in self.steps:
                before = prefetcher.waited
                for place, rows in needs:
                    prefetcher.fetch(place, rows)
                waits.append(prefetcher.waited - before)
                time.sleep(self.step_seconds)
                prefetcher.advance()
        self.first.append(waits[0])
        self.share.append(sum(waits[1:]) / (self.step_seconds * len(waits[1:])))
        self.longest.append(max(waits[1:]))


def predicted(arm: Arm) -> float:
    """The share of waiting after the first step in an ideal queue: the cost of the order in which steps need blocks."""
    ready = set(arm.steps[0][0][1] // arm.block_rows)
    encoder_free = now = waits = 0.0  # seconds; 0: the first step has its targets
    reached = [0.0]  # when the caller was at each step
    for number, [(_, rows)] in enumerate(arm.steps[1:], start=1):
        new = set(rows // arm.block_rows) - ready
        ready |= new
        asked = reached[max(0, number - arm.lookahead)]
        encoder_free = max(encoder_free, asked) + len(new) * arm.block_rows * arm.row_seconds
        now += arm.step_seconds
        if new:
            waits += max(0.0, encoder_free - now)
            now = max(now, encoder_free)
        reached.append(now)
    return waits / (arm.step_seconds * (len(arm.steps) - 1))


def write_data(folder: Path, conversations: int) -> PreparedData:
    """Writes replies of 8 to 64 random words with a target every 8 tokens."""
    rng = random.Random(0)
    rows = []
    for _ in range(conversations):
        reply = " ".join(rng.choices(WORDS, k=rng.randint(8, 64)))
        rows.append({"messages": [{"role": "user", "content": "who"}, {"role": "assistant", "content": reply}]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_tokenizer([row["messages"][1]["content"] for row in rows], 400).save_pretrained(folder / "tokenizer")
    options = PrepareOptions(seq_length=256, stride=8, horizons=((1, 32),), min_segment_length=4)
    prepare([folder / "rows.jsonl"], folder / "data", folder / "tokenizer", options, progress=False)
    return PreparedData.open(folder / "data")


def clocked_arms(data: PreparedData, options: argparse.Namespace) -> list[Arm]:
    """A simulated encoder, with a new block of 8 segments for each step."""
    blocks = np.arange(data.manifest.segments // 8 * 8).reshape(-1, 8)[: options.steps]
    steps: list[Needs] = [[(0, rows)] for rows in blocks]
    arms = []
    for ratio in RATIOS:
        seconds = ratio * options.step_seconds
        make = partial(Clocked, seconds)
        name, identity = f"simulated, ratio {ratio:g}", make().identity
        arms.append(Arm(name, steps, options.step_seconds, 8, make, identity, options.lookahead, seconds / 8))
    return arms


def real_arms(data: PreparedData, options: argparse.Namespace) -> list[Arm]:
    """Two conversations per step in random order. The encoder needs `--real-ratio` of an epoch for all segments."""
    make = partial(load_quietly, options.encoder, EncoderOptions(device=options.device))
    order = np.random.default_rng(0).permutation(len(data)).tolist()
    pairs = zip(order[::2], order[1::2], strict=True)
    needs = [np.union1d(data[first].anchors.segment, data[second].anchors.segment) for first, second in pairs]
    steps: list[Needs] = [[(0, rows)] for rows in needs]
    encoder = make()
    texts = [data.texts[row] for row in range(min(256, data.manifest.segments))]
    encoder.encode(texts[:64])
    arms = []
    for block_rows in BLOCK_ROWS:
        started = time.perf_counter()
        for first in range(0, len(texts), min(64, block_rows)):
            encoder.encode(sorted(texts[first : first + min(64, block_rows)], key=len))
        row_seconds = (time.perf_counter() - started) / len(texts)
        step_seconds = row_seconds * data.manifest.segments / options.real_ratio / len(steps)
        name = f"{options.encoder}, {row_seconds * 1e3:.1f} ms per text in blocks of {block_rows}"
        arms.append(Arm(name, steps, step_seconds, block_rows, make, encoder.identity, options.lookahead, row_seconds))
    return arms


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="steps with the simulated encoder (%(default)s)")
    parser.add_argument("--step-seconds", type=float, default=0.1, help="(%(default)s)")
    parser.add_argument("--lookahead", type=int, default=8, help="steps (%(default)s)")
    parser.add_argument("--conversations", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--encoder", default="minilm", help="the real encoder (%(default)s)")
    parser.add_argument("--device", default="cpu", help="device of the real encoder (%(default)s)")
    parser.add_argument("--real-ratio", type=float, default=0.25, help="encoding time over training time (%(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="(%(default)s)")
    return parser


def main() -> None:
    options = build_parser().parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_data(folder, options.conversations)
        arms = clocked_arms(data, options) + real_arms(data, options)
        for repetition in range(options.repetitions):
            for number, arm in enumerate(arms):
                arm.run(data, folder / f"{repetition}-{number}")
    versions = " ".join(f"{name} {metadata.version(name)}" for name in ("torch", "sentence-transformers"))
    print(f"{processor()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; {versions}")
    print(f"{data.manifest.segments} segments, lookahead {options.lookahead}, {options.repetitions} repetitions")
    print("| encoder | steps | ms per step | first step, s | waits | range | predicted | longest, ms |")
    print("|---|---|---|---|---|---|---|---|")
    for arm in arms:
        spread = f"{min(arm.share):.3%} - {max(arm.share):.3%}"
        cells = [arm.name, len(arm.steps), f"{arm.step_seconds * 1e3:.0f}", f"{statistics.median(arm.first):.2f}"]
        cells += [f"{statistics.median(arm.share):.3%}", spread, f"{predicted(arm):.1%}"]
        cells += [f"{statistics.median(arm.longest) * 1e3:.1f}"]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
