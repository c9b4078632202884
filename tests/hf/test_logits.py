"""Upstream's model, loaded from what was imported, computes what transformers computes."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sfr.hf.families import FAMILIES, megatron_flags
from megatron_sfr.hf.folder import read_config
from megatron_sfr.hf.importer import import_hf
from tests.distributed.launch import torchrun
from tests.hf.models import save_model

RUN = {
    "seq_length": 96,
    "micro_batch_size": 1,
    "train_iters": 1,
    "lr": 1e-3,
    "train_data_path": "unread",
    "finetune": True,
    "exit_on_missing_checkpoint": True,
    "skip_train": True,  # builds no optimizer
}


@pytest.mark.distributed
def test_megatron_computes_the_logits_of_transformers(tmp_path):
    """fp32, one process, every family, tied and not; sizes that divide nothing. Layouts: tests/distributed."""
    tokens, jobs, wanted = torch.randint(503, (3, 90), generator=torch.Generator().manual_seed(1)), [], {}
    for architecture in FAMILIES:
        for tied in (False, True):
            folder = tmp_path / f"{architecture}-{tied}"
            save_model(folder / "hf", architecture, tie_word_embeddings=tied)
            import_hf(folder / "hf", folder / "megatron", progress=False)
            recipe = megatron_flags(read_config(folder / "hf")) | RUN | {"load": str(folder / "megatron")}
            (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
            torch.save(tokens, folder / "logits.pt")
            jobs.append((["--recipe", str(folder / "recipe.yaml")], str(folder / "logits.pt")))
            with torch.no_grad():
                wanted[folder / "logits.pt"] = AutoModelForCausalLM.from_pretrained(folder / "hf")(tokens).logits
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    torchrun(1, str(Path(__file__).with_name("megatron_logits.py")), str(tmp_path / "jobs.json"))
    for file, logits in wanted.items():
        found = torch.load(file)
        assert found.shape[-1] == 512  # 503, padded to a multiple of 128
        assert (found[..., :503] - logits).abs().max() <= 1e-5 * logits.abs().max()
