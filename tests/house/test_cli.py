"""`megatron-sfr` on errors of any command: no memory, a missing file, a reader that ended, mistakes in the program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_sfr.cli import main
from megatron_sfr.cli.data import inspect as inspect_command


def test_no_memory_left_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch is asked for more than any machine has."""
    monkeypatch.setattr(inspect_command, "run", lambda args: torch.empty(1 << 50))
    assert main(["inspect", "--data", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron-sfr inspect: error: no memory is left; lower the batch size")
    assert error.count("\n") == 1


@pytest.mark.parametrize("error", [TypeError("a"), RuntimeError("shape mismatch")])
def test_a_programming_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def run(args: object) -> int:
        raise error

    monkeypatch.setattr(inspect_command, "run", run)
    with pytest.raises(type(error), match=str(error)):
        main(["inspect", "--data", "x"])


def printing(characters: int, stdout: int) -> subprocess.CompletedProcess[str]:
    """A command that prints lines of this many characters to a file descriptor."""
    program = (
        "import sys; from megatron_sfr import cli; from megatron_sfr.cli.data import inspect;"
        f"inspect.run = lambda args: [print('x' * {characters}) for _ in range(9)] and 0;"
        "sys.exit(cli.main(['inspect', '--data', 'x']))"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=buffered)


@pytest.mark.parametrize("characters", [9, 99999])
def test_a_reader_that_ends_early_causes_no_traceback(characters: int) -> None:
    """Short output is written only when the command ends."""
    read, write = os.pipe()
    os.close(read)
    done = printing(characters, write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_output_that_a_full_disk_does_not_take_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        done = printing(9, full.fileno())
    said = "megatron-sfr inspect: error: [Errno 28] standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_a_file_that_is_missing_is_named_as_by_other_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "missing.jsonl")
    assert main(["evaluate-code", "--tasks", missing, "--replies", missing, "--output", str(tmp_path / "out")]) == 2
    said = f"megatron-sfr evaluate-code: error: {missing}: No such file or directory\n"
    assert capsys.readouterr().err == said
