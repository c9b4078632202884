"""The recipes for H100 clusters: upstream's parser takes every flag and its checks pass for the cluster's size.

What this does not exercise: Transformer Engine, FP8, NCCL, memory, speed. They have not run on such a cluster.
"""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_sfr.hf.families.family_registry import megatron_flags
from tests import warm

ROOT = Path(__file__).resolve().parents[2]
QWEN3, CODER = "examples/qwen3_32b_personas/recipe.yaml", "examples/qwen2.5_coder_7b/recipe.yaml"
LONG = "examples/long_context/recipe.yaml"
LLAMA3 = "examples/llama3_8b_lora_sfr/recipe.yaml"
SHARED = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
QWEN3_CONFIG = SHARED | {  # Qwen/Qwen3-32B, config.json
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "max_position_embeddings": 40960,
    "num_attention_heads": 64,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
}
QWEN3_8B_CONFIG = QWEN3_CONFIG | {  # Qwen/Qwen3-8B, config.json
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
}
CODER_CONFIG = SHARED | {  # Qwen/Qwen2.5-Coder-7B-Instruct, config.json
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


LLAMA3_CONFIG = SHARED | {  # meta-llama/Meta-Llama-3-8B-Instruct, config.json
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}


def validate(processes: int, recipe: str, *flags: str) -> subprocess.CompletedProcess:
    return warm.run("-m", "tests.house.validate_recipe", str(processes), str(ROOT / recipe), *flags)


@pytest.mark.parametrize(
    ("processes", "recipe", "data_parallel", "layers"),
    [(64, QWEN3, 4, [17, 16, 16, 15]), (8, CODER, 2, [15, 13]), (8, LONG, 1, [36])],
)
def test_upstream_accepts_the_recipe(processes: int, recipe: str, data_parallel: int, layers: list[int]) -> None:
    done = validate(processes, recipe)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "data_parallel": data_parallel,
        "layers": layers,
        "fp8": ["hybrid", "tensorwise", True],
        "sequence_parallel": True,
        "per_token_loss": True,
        "implementation": "transformer_engine",
    }


def test_upstream_accepts_the_recipe_with_lora() -> None:
    done = validate(8, LLAMA3)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["data_parallel"], found["layers"], found["fp8"][0]) == (8, [32], None)
    assert found["implementation"] == "transformer_engine"


def test_upstream_refuses_a_layout_that_does_not_fit() -> None:
    done = validate(64, QWEN3, "--tensor-model-parallel-size", "3")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Megatron refuses these flags: world size (64)")


def read(recipe: str) -> dict[str, object]:
    return yaml.safe_load((ROOT / recipe).read_text())


@pytest.mark.parametrize(
    ("recipe", "config"),
    [(QWEN3, QWEN3_CONFIG), (CODER, CODER_CONFIG), (LONG, QWEN3_8B_CONFIG), (LLAMA3, LLAMA3_CONFIG)],
)
def test_the_recipe_has_the_shape_that_convert_recipe_prints(recipe: str, config: dict[str, object]) -> None:
    printed = megatron_flags(config)
    assert {key: read(recipe).get(key) for key in printed} == printed


@pytest.mark.parametrize("recipe", [QWEN3, CODER, LONG])
def test_fp8_shapes_are_multiples_of_16(recipe: str) -> None:
    r = read(recipe)
    tp = r["tensor_model_parallel_size"]
    qkv = (r["num_attention_heads"] + 2 * r["num_query_groups"]) * r["kv_channels"]
    for size in (qkv, r["num_attention_heads"] * r["kv_channels"], r["ffn_hidden_size"], r["seq_length"]):
        assert size % (16 * tp) == 0
    assert r["hidden_size"] % 16 == 0


@pytest.mark.parametrize("recipe", [QWEN3, CODER, LLAMA3])
def test_the_readme_says_that_it_has_not_run(recipe: str) -> None:
    text = (ROOT / recipe).with_name("README.md").read_text()
    assert "has not been run" in text
    assert recipe in text
