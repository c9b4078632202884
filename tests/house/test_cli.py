"""`megatron-sfr` on errors that no file causes: no memory, a reader that ended, mistakes in the program."""

import os
import subprocess
import sys

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


def test_a_reader_that_ends_early_causes_no_traceback() -> None:
    program = (
        "import sys; from megatron_sfr import cli; from megatron_sfr.cli.data import inspect;"
        "inspect.run = lambda args: [print('x' * 99999) for _ in range(99)];"
        "sys.exit(cli.main(['inspect', '--data', 'x']))"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
