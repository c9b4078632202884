"""PEFT adapters through a Megatron checkpoint: the same matrices come back, and merging adds exactly their product."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_sfr.cli.command_line import main
from megatron_sfr.hf.adapter.export_adapter import export_adapter
from megatron_sfr.hf.adapter.import_adapter import import_adapter
from megatron_sfr.hf.adapter.peft_folder import CONFIG, WEIGHTS
from megatron_sfr.hf.export_hf import export_hf
from tests.hf.models import save_model

RANK, ALPHA = 3, 5
SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
CASES: dict[str, tuple[str, list[str], torch.dtype]] = {
    "Qwen3": ("Qwen3ForCausalLM", SPLIT, torch.float32),
    "Llama, bf16": ("LlamaForCausalLM", SPLIT, torch.bfloat16),
    "Qwen2, queries and values": ("Qwen2ForCausalLM", ["q_proj", "v_proj"], torch.float32),
    "Phi-3, fused weights": ("Phi3ForCausalLM", FUSED, torch.float32),
    "experts, attention": ("Qwen3MoeForCausalLM", SPLIT[:4], torch.float32),
}


def save_adapter(
    folder: Path, architecture: str, modules: list[str], dtype: torch.dtype, *, sizes: dict[str, int] | None = None
) -> Path:
    """A model in hf/ and, in peft/, an adapter of it that PEFT made, with random B."""
    save_model(folder / "hf", architecture, dtype=dtype, **(sizes or {}))
    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(3)
    for name, p in adapted.named_parameters():
        if ".lora_B." in name:
            p.data.normal_(std=0.3)
    adapted.save_pretrained(folder / "peft", save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, PEFT's adapter of it, the adapter's import, its export again, and the merged model."""
    folder = save_adapter(tmp_path_factory.mktemp("adapter"), *CASES[request.param])
    hf = folder / "hf"
    import_adapter(folder / "peft", folder / "megatron", hf=hf)
    export_adapter(folder / "megatron", folder / "back", like=hf)
    export_hf(folder / "megatron", folder / "merged", like=hf, merge=True, base=hf, progress=False)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(503, (2, 40), generator=torch.Generator().manual_seed(1))
    found: torch.Tensor = model.eval().float()(tokens).logits
    return found


def with_adapter(folder: Path, adapter: str) -> Any:
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "hf"), folder / adapter)


def test_peft_adapter_comes_back(case: Path) -> None:
    """Bit for bit, where Megatron and the family have the same parts; what was not adapted comes back as zeros."""
    wanted, found = (load_file(case / x / WEIGHTS) for x in ("peft", "back"))
    if "qkv_proj" not in str(wanted.keys()):
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
        assert not any(tensor.any() for name, tensor in found.items() if name not in wanted)
    original = logits(with_adapter(case, "peft"))
    assert (logits(with_adapter(case, "back")) - original).abs().max() <= 1e-5 * original.abs().max()
    assert (original - logits(AutoModelForCausalLM.from_pretrained(case / "hf"))).abs().max() > 0.1


def test_merged_export_is_base_plus_product(case: Path) -> None:
    """To the last bit of the stored dtype: W + s B A in float64, rounded once. Weights without an adapter stay."""
    base, merged = (load_file(case / x / "model.safetensors") for x in ("hf", "merged"))
    pairs = load_file(case / "peft" / WEIGHTS)
    assert base.keys() == merged.keys()
    adapted = 0
    for name, w in base.items():
        a, b = (pairs.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight") for x in "AB")
        if a is not None:
            adapted += 1
            w = (w.double() + ALPHA / RANK * (b.double() @ a.double())).to(w.dtype)
        assert torch.equal(merged[name], w), name
    assert adapted == len(pairs) // 2


def test_merged_model_has_the_logits_of_peft(case: Path) -> None:
    """In fp32; a bf16 model is rounded by the merge, as bf16 rounds: 2^-8 relative, over four layers."""
    merged, found = (
        logits(x) for x in (AutoModelForCausalLM.from_pretrained(case / "merged"), with_adapter(case, "peft"))
    )
    exact = load_file(case / "hf" / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    assert (merged - found).abs().max() <= (1e-5 if exact else 0.05) * found.abs().max()


@pytest.mark.filterwarnings("default")  # vLLM's warnings, of torch's deprecated names
@torch.no_grad()
def test_vllm_answers_with_the_adapter_as_peft_does(tmp_path: Path) -> None:
    """Greedily, token for token; without the adapter the answers differ."""
    vllm = pytest.importorskip("vllm", reason="needs vLLM; its build for CPUs will do")
    sizes = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    folder = save_adapter(tmp_path, "Qwen3ForCausalLM", SPLIT, torch.float32, sizes=sizes)
    import_adapter(folder / "peft", folder / "megatron", hf=folder / "hf")
    export_adapter(folder / "megatron", folder / "back", like=folder / "hf")
    prompts = torch.randint(503, (4, 20), generator=torch.Generator().manual_seed(1))
    how = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0}
    network = with_adapter(folder, "back").eval()
    expected = network.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **how)[:, 20:].tolist()
    engine = vllm.LLM(
        str(folder / "hf"),
        dtype="float32",
        enable_lora=True,
        max_lora_rank=8,
        enforce_eager=True,
        skip_tokenizer_init=True,
    )
    greedy = vllm.SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    answers = []
    for adapter in (vllm.lora.request.LoRARequest("ours", 1, str(folder / "back")), None):
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts.tolist()]
        outputs = engine.generate(inputs, greedy, lora_request=adapter, use_tqdm=False)
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
    assert answers[0] == expected
    assert answers[1] != expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "alora": ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens \[1, 2\]: only plain LoRA"),
    "of a newer PEFT": ({"use_something": True}, "use_something True: only plain LoRA"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4': it changes the base model's weights too"),
    "use_dora": ({"use_dora": True}, "use_dora True: only plain LoRA of one rank is converted"),
    "rank_pattern": ({"rank_pattern": {"q_proj": 7}}, "rank_pattern .*only plain LoRA of one rank"),
    "another kind": ({"peft_type": "IA3"}, "peft_type 'IA3': only LORA is converted"),
    "no scale": ({"lora_alpha": 0}, "r is 3 and lora_alpha 0; both have to be positive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_adapters_are_refused(name: str, tmp_path: Path) -> None:
    changes, message = REFUSED[name]
    folder = save_adapter(tmp_path, "LlamaForCausalLM", ["o_proj"], torch.float32)
    config = json.loads((folder / "peft" / CONFIG).read_text()) | changes
    (folder / "peft" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        import_adapter(folder / "peft", folder / "megatron", hf=folder / "hf")


def test_what_megatron_does_not_adapt_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, "LlamaForCausalLM", ["o_proj", "lm_head"], torch.float32)
    with pytest.raises(ValueError, match=r"lm_head\.weight: LoRA here adapts linear layers of attention and MLP"):
        import_adapter(folder / "peft", folder / "megatron", hf=folder / "hf")
    tensors = {k: x for k, x in load_file(folder / "peft" / WEIGHTS).items() if "lm_head" not in k}
    save_file(
        {k: x for k, x in tensors.items() if "layers.1.self_attn.o_proj.lora_B" not in k}, folder / "peft" / WEIGHTS
    )
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn\.o_proj\.weight has no lora_B: the adapter is not comp"
    ):
        import_adapter(folder / "peft", folder / "megatron", hf=folder / "hf")
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, folder / "peft" / WEIGHTS)
    with pytest.raises(ValueError, match=r"lora_[AB]\.weight: values are NaN or infinite; copy the adapter again"):
        import_adapter(folder / "peft", folder / "megatron", hf=folder / "hf")
    save_file({}, folder / "peft" / WEIGHTS)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors holds no matrix"):
        import_adapter(folder / "peft", folder / "megatron", hf=folder / "hf")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_adapter(tmp_path, "LlamaForCausalLM", ["o_proj", "down_proj"], torch.float32)
    hf, megatron = str(folder / "hf"), str(folder / "megatron")
    convert = lambda *words: main(["convert", *map(str, words)])  # noqa: E731
    assert convert("import", "--adapter", folder / "peft", "--hf", hf, "--output", megatron) == 0
    assert "lora_rank: 3, lora_alpha: 5, lora_targets: proj,fc2" in capsys.readouterr().out
    export = ("export", "--checkpoint", megatron, "--like", hf, "--output", folder / "out")
    assert convert(*export) == 2
    assert "holds adapters only: add --merge for a complete model, or --adapter" in capsys.readouterr().err
    assert convert(*export, "--merge") == 2
    assert "the checkpoint does not say where its base is: name the base model, --base DIR" in capsys.readouterr().err
    assert convert(*export, "--base", hf) == 2
    assert "add --merge" in capsys.readouterr().err
    assert convert(*export, "--adapter") == 0
    assert "matrices of rank 3" in capsys.readouterr().out
    assert convert(*export, "--adapter") == 0
    assert "up to date" in capsys.readouterr().out
    assert convert(*export[:-1], folder / "merged", "--merge", "--base", hf) == 0
