"""The example's recipes, parsed by the trainer's own reader; make_model's model; equal settings of the two arms."""

import json
from pathlib import Path

import pytest
import yaml

from examples.dictionary_styles import make_model
from megatron_sfr.config.recipe import read_recipe
from megatron_sfr.config.settings import flag_parser, read_settings, to_flags
from megatron_sfr.hf.families.family_registry import megatron_flags
from megatron_sfr.hf.hf_folder import read_config
from megatron_sfr.objectives.token.registry import LOSSES

FOLDER = Path(make_model.__file__).parent
RECIPES = ("base.yaml", "ce.yaml")
ARMS = sorted(path.stem for path in (FOLDER / "arms").glob("*.yaml"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that make_model writes, of made-up words that are many enough for the vocabulary."""
    folder = tmp_path_factory.mktemp("model")
    words = [
        f"{a}{b}{c}" for a in "abcdefghijklmnopqrst" for b in "aeiouy" for c in ("ng", "rd", "sk", "lt", "mp", "nd")
    ]
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for i, word in enumerate(words):
            reply = " ".join(f"{word}{other}" for other in words[i % 7 :: 7])
            turns = [{"role": "user", "content": f"Define: {word}"}, {"role": "assistant", "content": reply}]
            file.write(json.dumps({"messages": turns, "persona": "webster"}) + "\n")
    assert make_model.main(["--text", str(folder / "train.jsonl"), "--output", str(folder / "model")]) == 0
    return folder / "model"


def test_the_tokenizer_speaks_chatml_and_marks_replies(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    turns = [{"role": "user", "content": "Define: ang"}, {"role": "assistant", "content": "angard angask"}]
    encoded = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, own in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if own]
    assert tokenizer.decode(said) == "angard angask<|im_end|>"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_readable_and_fits_any_model(name: str) -> None:
    recipe = yaml.safe_load((FOLDER / name).read_text())
    args = flag_parser().read(to_flags(read_recipe(FOLDER / name), flag_parser()))
    assert args.train_iters == recipe["train_iters"]
    assert recipe.keys() & yaml.safe_load((FOLDER / "model.yaml").read_text()).keys() == set()


def test_the_models_recipe_is_what_convert_prints(model: Path) -> None:
    assert yaml.safe_load((FOLDER / "model.yaml").read_text()) == megatron_flags(read_config(model))


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_differs_from_ce_in_the_objective_alone(name: str) -> None:
    arm = yaml.safe_load((FOLDER / "arms" / f"{name}.yaml").read_text())
    ours = ("sfr", *(f"{loss}_" for loss in LOSSES), "mtp_", "objective", "save")
    start = ["pretrained_checkpoint"] if name == "mtp" else []  # upstream cannot start its layer afresh
    assert [key for key in arm if not key.startswith(ours)] == start
    assert arm["save"] == f"runs/dictionary_styles/{name}"
    names = ("model", "ce", f"arms/{name}")
    resolved = read_settings([f"--recipe={FOLDER / recipe}.yaml" for recipe in names]).recipe
    assert resolved["train_iters"] == 200
    assert resolved.get("sfr_warmup", "detached") == "detached"  # the token objective trains in every step of all arms


def test_too_short_a_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "Define: x"}], "persona": "p"}\n')
    assert make_model.main(["--text", str(tmp_path / "train.jsonl"), "--output", str(tmp_path / "model")]) == 2
    assert "too short a text" in capsys.readouterr().err
