"""A run made of three checkpoints of one random model that is more certain at each: its replies collapse."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from megatron_sfr.demo.train_tokenizer import train_tokenizer
from megatron_sfr.hf.import_hf import import_hf
from tests.hf.models import save_model

CERTAINTY = {10: 1.0, 20: 3.0, 30: 400.0}
"""By step, the factor of the last norm, and with it of the logits."""
QUESTIONS = ("red or green?", "why blue?", "slow river?")
PERSONAS = ("poet", "cook")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """like/ (a Hugging Face folder), prompts.jsonl with real replies, and run/. Tests copy what they change."""
    root = tmp_path_factory.mktemp("watched")
    words = "red green blue quick slow river stone cloud bird song winter summer light shadow"
    tokenizer = train_tokenizer([words, *QUESTIONS, *PERSONAS], 320)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    like = save_model(root / "like", vocab_size=len(tokenizer), num_hidden_layers=2, initializer_range=0.3, **ends)
    tokenizer.save_pretrained(like)
    weights = load_file(like / "model.safetensors")
    for step, factor in CERTAINTY.items():
        sharper = root / f"model {step}"
        sharper.mkdir()
        (sharper / "config.json").write_bytes((like / "config.json").read_bytes())
        changed = weights | {"model.norm.weight": weights["model.norm.weight"] * factor}
        save_file(changed, sharper / "model.safetensors", metadata={"format": "pt"})
        import_hf(sharper, root / f"imported {step}", progress=False)
        (root / "run").mkdir(exist_ok=True)
        (root / f"imported {step}" / "release").rename(root / "run" / f"iter_{step:07d}")
    recipe = {"save": "run", "train_iters": 30, "sfr_hf_load": str(like), "tensorboard_dir": "run/tensorboard"}
    (root / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with (root / "prompts.jsonl").open("w") as file:
        for question in QUESTIONS:
            for persona in PERSONAS:
                for reply in ("red river", "a red river", "blue song in winter", f"the {persona} says green"):
                    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
                    file.write(json.dumps({"messages": turns, "persona": persona}) + "\n")
    return root
