"""A tiny model with random weights (real transformers, real tokenizer, nothing learned), and conversations for it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.demo.train_tokenizer import train_tokenizer
from megatron_sfr.demo.world import PERSONAS, QUESTIONS, World
from megatron_sfr.evaluation.generate.transformers_engine import Model, load_model


def prepare_conversations(folder: Path, model: Path, options: PrepareOptions, count: int = 12) -> Path:
    """FOLDER/prepared: conversations of unequal lengths, prepared with the model's tokenizer."""
    records = list(World().validation(QUESTIONS[::20], "seen"))[:count]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    prepare([folder / "records.jsonl"], folder / "prepared", model, options, progress=False)
    return folder / "prepared"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: two layers, width 32."""
    folder = tmp_path_factory.mktemp("tiny")
    replies = [row["messages"][-1]["content"] for row in World().validation(QUESTIONS[:2], "seen")]
    tokenizer = train_tokenizer([*replies, *PERSONAS, *(question.text for question in QUESTIONS)], 400)
    torch.manual_seed(1)
    network = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,  # the smallest that vLLM takes
            initializer_range=0.3,  # unequal probabilities, so that temperature and order matter
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tiny_model: Path) -> Model:
    """The tiny model, loaded. Tests do not change it."""
    return load_model("tiny", tiny_model, device="cpu")


@pytest.fixture(scope="session")
def chats(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 prepared conversations. Tests do not write into the folder."""
    return prepare_conversations(tmp_path_factory.mktemp("chats"), tiny_model, PrepareOptions(seq_length=400))
