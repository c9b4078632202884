"""A tiny model with random weights, conversations prepared with its tokenizer, and their MiniLM targets."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.targets.embed import EmbedOptions, embed
from megatron_sfr.demo.train_tokenizer import train_tokenizer
from megatron_sfr.demo.world import PERSONAS, QUESTIONS, World
from tests.evaluation.conftest import prepare_conversations

WIDTH = 32


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: two layers, width 32, with logits large enough to distinguish positions."""
    folder = tmp_path_factory.mktemp("tiny")
    rows = list(World().validation(QUESTIONS[::20], "seen"))
    texts = [message["content"] for row in rows for message in row["messages"]]
    tokenizer = train_tokenizer([*texts, *PERSONAS], 400)
    torch.manual_seed(1)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5}
    network = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **shape, **heads, **ends))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """12 conversations with targets."""
    options = PrepareOptions(seq_length=400, stride=8, horizons=((1, 24),), min_segment_length=4)
    prepared = prepare_conversations(tmp_path_factory.mktemp("data"), tiny_model, options)
    embed(prepared, "minilm", EmbedOptions(), progress=False)
    return PreparedData.open(prepared)
