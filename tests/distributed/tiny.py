"""A tiny prepared corpus and the recipe of a tiny model, shared by the tests that train for real."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.document_source import DocumentOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.data.targets.embed import EmbedOptions, embed
from megatron_sfr.demo.train_tokenizer import train_tokenizer

BLOCKS = EmbedOptions(batch_size=8, block_rows=16)  # small ones: a step needs several
SEQ_LENGTH, VOCAB_SIZE = 80, 501
WORDS = "red green blue quick slow river stone cloud bird song winter summer light shadow gentle bright old new".split()


def write_corpus(folder: Path, rows: int = 40) -> Path:
    """JSONL of conversations of unlike lengths, some of two turns, some with replies too short for an anchor."""
    rng = random.Random(5)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    lines = []
    for i in range(rows):
        messages = []
        for _ in range(1 + i % 2):
            messages.append({"role": "user", "content": words(1, 3)})
            messages.append({"role": "assistant", "content": words(1, 9)})
        lines.append(json.dumps({"messages": messages, "persona": f"voice {i % 3}"}))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "corpus.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_prepared(
    folder: Path, rows: int = 40, horizons: tuple[tuple[int, int], ...] = ((1, 8),), *, later: bool = False
) -> Path:
    """Prepared data with real MiniLM targets under FOLDER/prepared; the tokenizer under FOLDER/tokenizer.

    later: the targets are left to online encoding.
    """
    prepared = write_conversations(folder, rows, horizons)
    embed(prepared, "minilm", BLOCKS, later=later, progress=False)
    return prepared


def write_conversations(folder: Path, rows: int, horizons: tuple[tuple[int, int], ...] = ((1, 8),)) -> Path:
    """Prepared data without targets under FOLDER/prepared; the tokenizer under FOLDER/tokenizer."""
    corpus = write_corpus(folder, rows)
    train_tokenizer([corpus.read_text(encoding="utf-8")], 500).save_pretrained(folder / "tokenizer")
    options = PrepareOptions(seq_length=SEQ_LENGTH, stride=3, horizons=horizons, min_segment_length=2)
    prepare([corpus], folder / "prepared", folder / "tokenizer", options, progress=False)
    return folder / "prepared"


def write_documents(folder: Path, documents: int = 30) -> Path:
    """Prepared documents of unlike lengths, with real MiniLM targets, under FOLDER/prepared."""
    rng = random.Random(6)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(2, 60))) for _ in range(documents)]
    folder.mkdir(parents=True)
    rows = folder / "texts.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    train_tokenizer(texts, 500).save_pretrained(folder / "tokenizer")
    options = DocumentOptions(stride=3, horizons=((1, 8),), min_segment_length=2)
    prepare([rows], folder / "prepared", folder / "tokenizer", options, progress=False)
    embed(folder / "prepared", "minilm", BLOCKS, progress=False)
    return folder / "prepared"


def recipe(prepared: Path, **changes: Any) -> dict[str, Any]:
    """Four layers, an odd vocabulary, grouped queries; deterministic and small."""
    return {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 4,
        "kv_channels": 12,
        "ffn_hidden_size": 48,
        "qk_layernorm": True,
        "swiglu": True,
        "disable_bias_linear": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": True,
        "vocab_size": VOCAB_SIZE,
        "make_vocab_size_divisible_by": 8,
        "seq_length": SEQ_LENGTH,
        "max_position_embeddings": SEQ_LENGTH,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "train_iters": 3,
        "lr": 1e-3,
        "adam_eps": 1e-5,  # at 1e-8 Adam turns rounding in near-zero gradients into whole steps
        "lr_decay_style": "constant",
        "num_workers": 0,
        "loss_chunk_tokens": 16,  # several chunks in a microbatch
        "train_data_path": [str(prepared)],
        "sfr": True,
        "sfr_head_width": 24,
        "sfr_measure_interval": 2,
        "sfr_draws": 2,
    } | changes


def write_recipe(path: Path, prepared: Path, **changes: Any) -> Path:
    """The recipe above as a file."""
    path.write_text(yaml.safe_dump(recipe(prepared, **changes)), encoding="utf-8")
    return path
