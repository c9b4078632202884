"""The reason of a failure in one line, from real exceptions and from what torchrun and upstream print."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from megatron_sfr.runtime.failures import END_BYTES, failure, killed_workers, reason

MARK = "megatron-sfr train: error:"
OUT_OF_MEMORY = "training failed: rank 3 was ended by SIGKILL: out of memory is the usual reason"
NAN = (
    "ERROR:megatron.core.rerun_state_machine:Unexpected result nan on rank 1 at iteration #3 invocation #1 "
    "(message='found NaN in local grad norm for bucket #0 in backward pass before data-parallel communication "
    "collective')\n"
    "ERROR:megatron.core.rerun_state_machine:Unexpected result inf on rank 1 at iteration #3 invocation #2 "
    "(message='later')\n"
)
SUMMARY = """
Root Cause (first observed failure):
[0]:
  time      : 2026-11-27_16:30:00
  host      : node7
  rank      : {rank} (local_rank: 1)
  exitcode  : {code} (pid: 4242)
  error_file: <N/A>
  traceback : Signal
"""
STOPPED = """
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 4241)  (SIGTERM)
"""
BARE = """Traceback (most recent call last):
  File "megatron/core/optimizer_param_scheduler.py", line 80, in __init__
    assert self.max_lr >= self.min_lr
           ^^^^^^^^^^^^^^^^^^^^^^^^^^
AssertionError
"""
FULL = """Traceback (most recent call last):
  File "torch/serialization.py", line 1, in __init__
OSError: [Errno 28] No space left on device: '/run/iter_0000004/__0_0.distcp'
The above exception was the direct cause of the following exception:
RuntimeError: [enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0
"""


class Damaged(torch.utils.data.Dataset[int]):
    """A dataset whose records cannot be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("store: row 3\nis damaged: run embed --verify"), "store: row 3 is damaged: run embed --verify"),
        (RuntimeError("no: room"), "RuntimeError: no: room"),
        (AssertionError(), "AssertionError:"),
    ],
)
def test_of_a_dataloaders_worker_only_its_last_line_is_said(error: Exception, said: str) -> None:
    loader = torch.utils.data.DataLoader(Damaged(error), num_workers=1)
    with pytest.raises(type(error)) as raised:
        next(iter(loader))
    assert "Original Traceback" in str(raised.value)
    assert reason(raised.value) == said


def test_any_other_exception_is_said_as_it_is() -> None:
    assert reason(ValueError("a\n  b")) == "a b"
    assert reason(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (f"noise\n[rank0]: {MARK} no such file\n", "no such file"),
        (NAN, "training failed at step 3: nan on rank 1 (found NaN in local grad norm for bucket #0 in backward pass"),
        (NAN + SUMMARY.format(rank=1, code=16), "training failed at step 3: nan on rank 1"),
        (FULL, "training failed: the disk is full (/run/iter_0000004/__0_0.distcp)"),
        ("RuntimeError: write failed: No space left on device\n", "training failed: the disk is full (No space left"),
        (
            SUMMARY.format(rank=3, code=-9),
            OUT_OF_MEMORY,
        ),
        (
            f"{MARK} Connection closed by peer\n" + SUMMARY.format(rank=3, code=-9),
            OUT_OF_MEMORY,
        ),
        (  # torchrun ended rank 0 because rank 1 failed
            f"{MARK} no such file\n" + STOPPED + SUMMARY.format(rank=1, code="2"),
            "no such file",
        ),
        (STOPPED + SUMMARY.format(rank=3, code=-9), OUT_OF_MEMORY),
        (SUMMARY.format(rank=2, code=-15), "training failed: rank 2 was ended by SIGTERM"),
        (SUMMARY.format(rank=0, code=-11), "training failed: rank 0 was ended by SIGSEGV; see"),
        ("[rank0]: torch.OutOfMemoryError: CUDA out of memory.\n", "training failed: torch.OutOfMemoryError: CUDA out"),
        (f"{MARK} OSError: Connection closed by peer\n{NAN}", "training failed at step 3: nan on rank 1"),
        (f"{MARK} RuntimeError: a writer failed\n{FULL}", "training failed: the disk is full"),
        (
            f"{MARK} RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed. \n",
            "RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed; out of memory is the usual reason",
        ),
        (
            "ConnectionRefusedError: [Errno 111] Connection refused\n\n"
            "The above exception was the direct cause of the following exception:\n\n"
            "RuntimeError: DataLoader worker (pid(s) 7) exited unexpectedly\n",
            "training failed: RuntimeError: DataLoader worker (pid(s) 7) exited unexpectedly; its last lines in the",
        ),
        (BARE, "training failed: AssertionError: assert self.max_lr >= self.min_lr; see"),
        (BARE.replace("\n", "\n[rank1]: "), "training failed: AssertionError: assert self.max_lr >= self.min_lr; see"),
        ("a line that ends in\nAssertionError\n", "training failed: no process said why; see"),
        ("nothing\n", "training failed: no process said why; see"),
    ],
)
def test_the_reason_in_a_log(tmp_path: Path, log: str, said: str) -> None:
    path = tmp_path / "log"
    path.write_text(log, encoding="utf-8")
    line = failure(path, MARK)
    assert line.startswith(said)
    assert "\n" not in line
    assert len(line) < 600


def test_of_a_large_log_the_end_is_read(tmp_path: Path) -> None:
    """The log is sparse, so that it is large and quick to write."""
    path = tmp_path / "log"
    with path.open("wb") as file:
        file.write(f"{MARK} of an earlier attempt\n".encode())
        file.truncate(2 * END_BYTES)
        file.seek(0, os.SEEK_END)
        file.write(f"\n{MARK} no such file\n".encode())
    assert failure(path, MARK) == "no such file"


def test_a_process_of_a_pool_that_ended_is_reported_in_one_line() -> None:
    with (
        pytest.raises(ValueError, match=r"^a process of this command ended early; its last lines .*: try less$"),
        killed_workers("try less"),
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        pool.submit(os._exit, 1).result()


def test_a_killed_torchrun_is_said(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("step 1\n", encoding="utf-8")
    assert failure(path, MARK, returncode=-9) == f"training failed: torchrun was ended by SIGKILL; see {path}"
