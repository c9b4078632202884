"""Measures the speed of `embed` (`python -m tools.bench_embed`), and computes the hours that a billion tokens take.

The conversations are those of tools.bench_prepare, with anchors and futures by the defaults of `prepare`. One process
encodes them, as `embed` does, with as many threads as OMP_NUM_THREADS. Loading the encoder is not measured.
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.targets.create import create_store
from megatron_sfr.data.targets.embed import EmbedOptions
from megatron_sfr.data.targets.encoder_pool import EncoderPool, open_pool
from megatron_sfr.data.targets.fill import StoreWriter
from megatron_sfr.data.targets.store import StoreIdentity
from megatron_sfr.demo.train_tokenizer import train_tokenizer
from tools.bench_overhead import processor
from tools.bench_prepare import write_corpus

BILLION = 1_000_000_000


def prepared(folder: Path, records: int) -> PreparedData:
    """The conversations, tokenized by a tokenizer that is trained on them."""
    inputs, tokenizer = write_corpus(folder, records), folder / "tokenizer"
    train_tokenizer([inputs.read_text(encoding="utf-8")], 2000).save_pretrained(tokenizer)
    prepare([inputs], folder / "data", tokenizer, PrepareOptions(seq_length=4096), progress=False)
    return PreparedData.open(folder / "data")


def seconds(pool: EncoderPool, data: PreparedData, store: Path, options: EmbedOptions) -> float:
    """The time in which a pool fills a new store."""
    identity = StoreIdentity(**asdict(pool.identity), batch_size=options.batch_size, block_rows=options.block_rows)
    create_store(store, data, identity)
    with StoreWriter(store, data) as writer:
        started = time.perf_counter()
        for _ in pool.fill(writer, list(writer.blocks_of(writer.store.embeddings.missing()))):
            pass
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="minilm", help="a sentence-transformers model (%(default)s)")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument("--dtype", default="float32", help="(%(default)s)")
    parser.add_argument("--records", type=int, default=60, help="conversations to make (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(%(default)s)")
    args = parser.parse_args()
    options = EmbedOptions(device=args.device, dtype=args.dtype)
    with tempfile.TemporaryDirectory() as name:
        data = prepared(Path(name), args.records)
        pool = open_pool(args.encoder, options, [args.device])
        times = [seconds(pool, data, Path(name) / f"store-{k}", options) for k in range(args.repeats)]
    counts, identity = data.manifest, pool.identity
    rates = [counts.segments / s for s in times]
    rate = statistics.median(rates)
    print(f"{processor()}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads; torch {metadata.version('torch')}")
    print(f"{counts.tokens:,} tokens in {counts.samples:,} conversations: {counts.segments:,} segments")
    print(
        f"{identity.encoder} ({identity.dtype}, {args.device}, at most {identity.max_length} tokens of a segment): "
        f"{rate:,.1f} segments/s ({min(rates):,.1f} to {max(rates):,.1f} in {args.repeats} runs)"
    )
    hours = counts.segments / counts.tokens * BILLION / rate / 3600
    print(f"for {BILLION:,} tokens of such data: {hours:,.1f} hours in one process")


if __name__ == "__main__":
    main()
