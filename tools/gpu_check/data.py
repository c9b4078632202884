"""Makes the small data and the start checkpoint of the check: `python -m tools.gpu_check.data FOLDER ENCODER`.

Conversations of the demo's world, targets by an encoder, and a checkpoint that the CPU backend makes in one step, so
that every training of the check begins with the same weights.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.targets.embed import EmbedOptions, embed
from megatron_sfr.demo.train_tokenizer import train_tokenizer
from megatron_sfr.demo.world import World
from megatron_sfr.launch import command
from megatron_sfr.runtime.lifetime import tied
from megatron_sfr.training.data.packing import first_fit_decreasing

CONVERSATIONS, VOCABULARY, BATCH = 48, 512, 8
SEQ_LENGTH = 512  # conversations have up to 171 tokens: packing puts three into a sequence
BLOCKS = EmbedOptions(batch_size=16, block_rows=16)
RECIPE = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 16,
    "qk_layernorm": True,
    "swiglu": True,
    "disable_bias_linear": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
    "vocab_size": VOCABULARY,
    "seq_length": SEQ_LENGTH,
    "max_position_embeddings": SEQ_LENGTH,
    "micro_batch_size": 1,
    "global_batch_size": BATCH,
    "train_iters": 6,
    "lr": 1e-3,
    "adam_eps": 1e-5,  # at 1e-8 Adam turns rounding in near-zero gradients into whole steps
    "lr_decay_style": "constant",
    "num_workers": 0,
    "save_interval": 100,
}


def make(folder: Path, encoder: str) -> int:
    """Writes FOLDER/prepared, recipe.yaml and start/; returns the number of packed sequences."""
    data, sequences = prepare_conversations(folder)
    prepared = data.folder
    embed(prepared, encoder, BLOCKS, progress=False)
    embed(prepared, encoder, BLOCKS, output=prepared / "online", later=True, progress=False)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"train_data_path": [str(prepared)]}), encoding="utf-8")
    start = ["--save", str(folder / "start"), "--train-iters", "1", "--lr", "0", "--sfr-backend", "cpu"]
    subprocess.run(tied(command(recipe, 1, start)), check=True)
    counts = {"{apart}": len(data), "{packed}": sequences}
    (folder / "sequences.json").write_text(json.dumps(counts), encoding="utf-8")
    return sequences


def prepare_conversations(folder: Path) -> tuple[PreparedData, int]:
    """Writes FOLDER/corpus.jsonl, tokenizer/ and prepared/; also returns the number of packed sequences."""
    folder.mkdir(parents=True)
    texts = [json.dumps(record) for record in itertools.islice(World(topics=1).finetuning(), CONVERSATIONS)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("\n".join(texts) + "\n", encoding="utf-8")
    train_tokenizer(texts, VOCABULARY).save_pretrained(folder / "tokenizer")
    options = PrepareOptions(seq_length=SEQ_LENGTH, stride=16, horizons=((1, 24),), min_segment_length=8)
    prepared = folder / "prepared"
    prepare([corpus], prepared, folder / "tokenizer", options, progress=False)
    data = PreparedData.open(prepared)
    return data, len(first_fit_decreasing(np.asarray(data.positions[np.arange(len(data))]), SEQ_LENGTH))


if __name__ == "__main__":
    print(f"{CONVERSATIONS} conversations, {make(Path(sys.argv[1]), sys.argv[2])} packed sequences")
