"""A model whose chat template ends replies on a token that is not an end token is reported before sampling."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_sfr import cli
from megatron_sfr.data.chat.loss_mask import reply_end_token
from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.evaluation.generate.end_token_warning import unknown_end


@pytest.fixture
def base_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model as one that stops at another token than its chat template writes."""
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 5}))
    return folder


def test_the_end_of_a_reply_is_what_the_template_writes_after_it(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    end = reply_end_token(tokenizer)
    assert end == tokenizer.eos_token_id
    assert unknown_end(tokenizer, [3, end]) is None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    assert reply_end_token(tokenizer) is None
    assert unknown_end(tokenizer, [3]) is None, "nothing is known of such a template"


@pytest.mark.parametrize("stops", [True, False])
def test_generate_warns_in_one_line(
    tiny_model: Path, base_model: Path, stops: bool, capsys: pytest.CaptureFixture
) -> None:
    folder = tiny_model if stops else base_model
    command = ["generate", "--model", str(folder), "--prompt", "hi", "--samples", "1", "--max-new-tokens", "2"]
    assert cli.main([*command, "--device", "cpu"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    if stops:
        assert lines == []
    else:
        tokenizer = load_tokenizer(str(folder))
        (line,) = lines
        assert f"{folder}: the chat template ends replies on {tokenizer.eos_token}, which is not among" in line
        assert f"add {tokenizer.eos_token_id} to eos_token_id in generation_config.json" in line
