"""A killed `generate` goes on: the file it ends with is, byte for byte, that of a run that nobody disturbed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_sfr.cli import main
from megatron_sfr.demo.world import QUESTIONS
from megatron_sfr.evaluation.resumable import resumable


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": question.text}) + "\n" for question in QUESTIONS[:6]))
    return path


def command(model: Path, prompts: Path, output: Path, seed: int = 0) -> list[str]:
    fixed = ["--samples", "40", "--max-new-tokens", "24", "--batch-size", "7", "--device", "cpu"]
    models = ["--model", f"a={model}", f"b={model}"]
    return ["generate", *models, "--prompts", str(prompts), *fixed, "--seed", str(seed), "--output", str(output)]


@pytest.mark.parametrize("enough", [20, 260])  # lines before the kill: in the first model's share, in the second's
def test_a_killed_run_ends_as_if_it_had_not_been(tiny_model: Path, prompts: Path, tmp_path: Path, enough: int) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert main(command(tiny_model, prompts, whole)) == 0
    arguments = command(tiny_model, prompts, broken)
    partial = tmp_path / ".broken.jsonl.partial"
    with subprocess.Popen([sys.executable, "-m", "megatron_sfr.cli", *arguments], stderr=subprocess.DEVNULL) as run:
        while run.poll() is None and not (partial.exists() and partial.read_bytes().count(b"\n") >= enough):
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
    assert not broken.exists(), "the run ended before it could be killed"
    with open(partial, "a") as file:
        file.write('{"model": "a", "pro')  # a line that the kill tore
    left = partial.read_bytes()
    assert main(arguments) == 0
    assert broken.read_bytes() == whole.read_bytes()
    assert broken.read_bytes()[:1000] == left[:1000]
    assert {path.name for path in tmp_path.iterdir()} == {"whole.jsonl", "broken.jsonl"}


def begin(path: Path, text: str) -> None:
    """Writes and is stopped."""
    with resumable(path, {}, lambda lines: lines) as (file, done):
        assert done == 0
        file.write(text)
        raise KeyboardInterrupt


def test_another_command_does_not_finish_it(
    tiny_model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "replies.jsonl"
    with pytest.raises(KeyboardInterrupt):
        begin(output, "a line\n")
    assert main(command(tiny_model, prompts, output, seed=1)) == 2
    assert "was begun by another command" in capsys.readouterr().err


def test_only_what_the_boundary_keeps_stays(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    with pytest.raises(KeyboardInterrupt):
        begin(path, "0\n1\n2\n3\n4\nhalf")
    with resumable(path, {}, lambda lines: lines - lines % 2) as (file, done):
        assert done == 4
        file.write("the rest\n")
    assert path.read_text() == "0\n1\n2\n3\nthe rest\n"
    assert list(tmp_path.iterdir()) == [path]
