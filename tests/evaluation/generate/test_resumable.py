"""A killed `generate` resumes, and its file equals that of an uninterrupted run byte for byte."""

import json
import signal
import time
from pathlib import Path

import pytest

from megatron_sfr.cli import main
from megatron_sfr.demo.world import QUESTIONS
from megatron_sfr.storage.resumable import resumable
from tests import warm

SAMPLES = 14  # of each of six prompts by each of two models: 168 replies


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": question.text}) + "\n" for question in QUESTIONS[:6]))
    return path


def command(model: Path, prompts: Path, output: Path, seed: int = 0) -> list[str]:
    fixed = ["--samples", str(SAMPLES), "--max-new-tokens", "24", "--batch-size", "7", "--device", "cpu"]
    models = ["--model", f"a={model}", f"b={model}"]
    return ["generate", *models, "--prompts", str(prompts), *fixed, "--seed", str(seed), "--output", str(output)]


@pytest.mark.recovery
@pytest.mark.parametrize("enough", [20, 100])  # lines before the kill: in the first model's share, in the second's
def test_a_killed_run_ends_as_if_it_had_not_been(tiny_model: Path, prompts: Path, tmp_path: Path, enough: int) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert main(command(tiny_model, prompts, whole)) == 0
    arguments = command(tiny_model, prompts, broken)
    partial = tmp_path / ".broken.jsonl.partial"
    with warm.popen("-m", "megatron_sfr.cli", *arguments) as run:
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
    outputs = {"whole.jsonl", "broken.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == outputs | {f".{name}.identity.json" for name in outputs}


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
    assert {path.name for path in tmp_path.iterdir()} == {"lines", ".lines.identity.json"}


def test_two_at_once_end_with_the_file_of_one(tiny_model: Path, prompts: Path, tmp_path: Path) -> None:
    """The second is refused while the first writes; started again when it is done, it finds the file up to date."""
    output = tmp_path / "replies.jsonl"
    arguments = command(tiny_model, prompts, output)
    partial = tmp_path / ".replies.jsonl.partial"
    program = ("-m", "megatron_sfr.cli", *arguments)
    with warm.popen(*program) as first:
        while first.poll() is None and not (partial.exists() and partial.stat().st_size):
            time.sleep(0.005)
        first.send_signal(signal.SIGSTOP)  # so that it is not done before the second has started
        second = warm.run(*program)
        first.send_signal(signal.SIGCONT)
        assert "168 replies" in first.communicate()[0]
    assert first.returncode == 0
    assert second.returncode == 2
    assert f"replies.jsonl is being written by process {first.pid} on" in second.stderr.splitlines()[-1]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == len({(row["model"], row["prompt"], row["sample"]) for row in rows}) == 168


def test_a_finished_file_is_up_to_date_or_the_differences_are_named(
    tiny_model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "replies.jsonl"
    arguments = [*command(tiny_model, prompts, output), "--samples", "2", "--max-new-tokens", "2"]
    assert main(arguments) == 0
    before = output.stat()
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{output} is up to date\n"
    assert main([*arguments, "--temperature", "0.5"]) == 2
    assert "made with other values of options.temperature; choose another --output" in capsys.readouterr().err
    assert output.stat() == before
    output.write_text("mine\n")
    assert main(arguments) == 2
    assert "has 5 bytes instead of" in capsys.readouterr().err
    (tmp_path / ".replies.jsonl.identity.json").unlink()
    assert main(arguments) == 2
    assert "exists, and nothing says what made it" in capsys.readouterr().err
    assert output.read_text() == "mine\n"
