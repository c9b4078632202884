"""A tiny model with random weights: real transformers, real tokenizer, nothing learned."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_sfr.demo.train_tokenizer import train_tokenizer
from megatron_sfr.demo.world import PERSONAS, QUESTIONS, World


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
