"""Upstream's model, loaded from an import, has the logits of transformers and the same greedy tokens."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from megatron_sfr.hf.families.family_registry import megatron_flags
from megatron_sfr.hf.hf_folder import read_config
from megatron_sfr.hf.import_hf import import_hf
from tests import warm
from tests.hf.megatron_logits import PROMPT
from tests.hf.models import CASES, COMPUTED, VARIANTS, save_model

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


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    """Upstream's and transformers' answers to every case, from one start of upstream: logits [3, 90, 503], greedy
    tokens [3, 90]."""
    folder, jobs, wanted = tmp_path_factory.mktemp("logits"), [], {}
    tokens = torch.randint(503, (3, 90), generator=torch.Generator().manual_seed(1))
    for name in COMPUTED:
        architecture, changes = CASES[name]
        case = folder / name
        save_model(case / "hf", architecture, **changes)
        import_hf(case / "hf", case / "megatron", progress=False)
        recipe = megatron_flags(read_config(case / "hf")) | RUN | {"load": str(case / "megatron")}
        (case / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
        torch.save(tokens, case / "logits.pt")
        jobs.append((["--recipe", str(case / "recipe.yaml")], str(case / "logits.pt")))
        wanted[name] = of_transformers(case / "hf", tokens)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    warm.run(str(Path(__file__).with_name("megatron_logits.py")), str(folder / "jobs.json"), ranks=1, check=True)
    return {name: (torch.load(folder / name / "logits.pt"), wanted[name]) for name in COMPUTED}


@torch.no_grad()
def of_transformers(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=90 - PROMPT, pad_token_id=0)
    return model(tokens).logits, model.generate(tokens[:, :PROMPT], attention_mask=torch.ones(3, PROMPT))


@pytest.mark.distributed
@pytest.mark.parametrize("case", COMPUTED)
def test_megatron_computes_the_logits_of_transformers(logits, case):
    """fp32, one process, sizes that divide nothing. Layouts: tests/distributed. Not exercised: Transformer Engine, and
    Mamba layers, whose kernels need a GPU."""
    (found, _), (wanted, _) = logits[case]
    assert found.shape[-1] == 512  # 503, padded to a multiple of 128
    assert (found[..., :503] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.distributed
@pytest.mark.parametrize("case", COMPUTED)
def test_greedy_answers_are_the_same_tokens(logits, case):
    """Upstream without a cache, and transformers with one. A model that went through a checkpoint and back has the same
    bits (test_import_hf.py)."""
    (_, megatron), (_, wanted) = logits[case]
    assert wanted.shape == (3, 90)
    assert torch.equal(megatron, wanted)


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["Llama 3's frequencies", "Mistral 0.1's window"])
def test_what_no_shape_shows_moves_the_logits(logits, case):
    """The same weights without scaling or window compute something else: the test above would see them left out."""
    (_, (changed, _)), (_, (plain, _)) = logits[case], logits[f"{VARIANTS[case][0]}, tied: False"]
    assert (changed - plain).abs().max() > 1e-3 * plain.abs().max()
