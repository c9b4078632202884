"""A model tuned by LoRA on two pipeline stages leaves as a PEFT folder and as a merged model, and answers the same."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from megatron_sfr.hf.adapter.export_adapter import export_adapter
from megatron_sfr.hf.adapter.import_adapter import import_adapter
from megatron_sfr.hf.adapter.peft_folder import WEIGHTS
from megatron_sfr.hf.export_hf import export_hf
from megatron_sfr.hf.families.family_registry import megatron_flags
from megatron_sfr.hf.hf_folder import read_config
from megatron_sfr.hf.import_hf import import_hf
from tests import warm
from tests.hf.megatron_logits import PROMPT
from tests.hf.test_logits import RUN, of_transformers

from .launch import read_checkpoint, read_metrics
from .runs import Runs
from .settings import TP2
from .test_lora import LORA, base, recipe, trained

pytestmark = pytest.mark.distributed
TOKENS = torch.randint(503, (3, 90), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def of_peft(hf: Path, adapter: Path) -> tuple[torch.Tensor, torch.Tensor]:
    model: Any = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(hf), adapter).eval()
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=90 - PROMPT, pad_token_id=0)
    greedy = model.generate(input_ids=TOKENS[:, :PROMPT], attention_mask=torch.ones(3, PROMPT))
    return model(TOKENS).logits, greedy


def of_megatron(folder: Path, hf: Path, checkpoint: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and greedy tokens of upstream's model with the base's weights and the adapters of a checkpoint."""
    lora = {key: LORA[key] for key in ("lora_rank", "lora_alpha")}
    recipe = megatron_flags(read_config(hf)) | RUN | lora | {"sfr_hf_load": str(hf), "load": str(checkpoint)}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    torch.save(TOKENS, folder / "answer.pt")
    jobs = [(["--recipe", str(folder / "recipe.yaml")], str(folder / "answer.pt"))]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    program = Path(__file__).parents[1] / "hf" / "megatron_logits.py"
    warm.run(str(program), str(folder / "jobs.json"), ranks=1, check=True)
    found: tuple[torch.Tensor, torch.Tensor] = torch.load(folder / "answer.pt")
    return found


def test_peft_answers_with_the_same_tokens_and_the_merge_is_exact(runs: Runs, tmp_path: Path) -> None:
    hf, run = base(runs, "dense"), trained(runs, "pp2")
    export_adapter(run, tmp_path / "peft", like=hf)
    export_hf(run, tmp_path / "merged", like=hf, merge=True, progress=False)  # the run says where its base is
    (logits, greedy), (wanted, wanted_greedy) = of_megatron(tmp_path, hf, run), of_peft(hf, tmp_path / "peft")
    merged_logits, merged_greedy = of_transformers(tmp_path / "merged", TOKENS)
    unadapted, _ = of_transformers(hf, TOKENS)
    assert (unadapted - wanted).abs().max() > 0.01 * wanted.abs().max()  # training has changed the model
    assert (logits[..., :503] - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (merged_logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert torch.equal(greedy, wanted_greedy)
    assert torch.equal(greedy, merged_greedy)
    weights, merged = (load_file(x / "model.safetensors") for x in (hf, tmp_path / "merged"))
    pairs = load_file(tmp_path / "peft" / WEIGHTS)
    assert len(pairs) == 4 * 7 * 2
    for name, w in weights.items():
        a, b = (pairs.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight") for x in "AB")
        if a is not None:
            w = (w.double() + LORA["lora_alpha"] / LORA["lora_rank"] * (b.double() @ a.double())).to(w.dtype)
        assert torch.equal(merged[name], w), name


def test_adapters_come_back_from_peft_bit_for_bit(runs: Runs, tmp_path: Path) -> None:
    """Megatron -> PEFT -> Megatron."""
    hf, run = base(runs, "dense"), trained(runs, "pp2")
    export_adapter(run, tmp_path / "peft", like=hf)
    import_adapter(tmp_path / "peft", tmp_path / "back", hf=hf)
    found, wanted = read_checkpoint(tmp_path / "back" / "release"), read_checkpoint(run / "iter_0000003")
    assert len(found) == 8
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in found.items())


def test_run_starts_from_a_megatron_base_and_adapters(runs: Runs, tmp_path: Path) -> None:
    """TP2 beside the base's Megatron checkpoint, from PEFT's adapters: a step of learning rate 0 moves no bit of them,
    and the merge finds the base by itself."""
    hf, run = base(runs, "dense"), trained(runs, "pp2")
    export_adapter(run, tmp_path / "peft", like=hf)

    def start(folder: Path) -> None:
        import_hf(hf, folder / "base", progress=False)
        import_adapter(tmp_path / "peft", folder / "adapters", hf=hf)

    folder = runs.once("lora start", start)
    beside = recipe(runs, "dense", " beside", sfr_hf_load=None, lora_base=str(folder / "base"), lr=0.0, train_iters=1)
    flags = ("--pretrained-checkpoint", str(folder / "adapters"), "--sfr-fresh-head")
    continued = runs.train("lora continued", 2, *flags, *TP2, recipe=beside)
    found, wanted = read_checkpoint(continued / "iter_0000001"), read_checkpoint(run / "iter_0000003")
    adapters = [key for key in found if key.startswith("decoder.")]
    assert len(adapters) == 8
    assert all(torch.equal(found[key], wanted[key]) for key in adapters)
    export_hf(run, tmp_path / "merged", like=hf, merge=True, progress=False)
    export_hf(continued, tmp_path / "again", like=hf, merge=True, progress=False)
    merged, again = (load_file(tmp_path / x / "model.safetensors") for x in ("merged", "again"))
    assert all(torch.equal(again[name], tensor) for name, tensor in merged.items())
    # The same first batch, before any step of the adapters and after three: the adapters are in effect.
    assert read_metrics(continued)[0]["lm loss"] < read_metrics(run)[0]["lm loss"] - 0.1
