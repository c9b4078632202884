"""A checkpoint with weights that are NaN or infinite is refused before it is written."""

import math
from pathlib import Path

import pytest
import torch

from megatron_sfr.hf.megatron.finite_weights import check_weights
from megatron_sfr.hf.megatron.megatron_checkpoint import COMMON, write_checkpoint
from megatron_sfr.hf.megatron.tracker import TRACKER


def model() -> list[torch.nn.Module]:
    """Two chunks of different dtypes, one with an empty parameter."""
    empty = torch.nn.Module()
    empty.register_parameter("nothing", torch.nn.Parameter(torch.empty(0)))
    return [torch.nn.Linear(3, 2), torch.nn.Sequential(torch.nn.Linear(2, 2).bfloat16(), empty)]


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("chunk", [0, 1])
def test_one_weight_that_is_not_finite_is_enough(tmp_path: Path, value: float, chunk: int) -> None:
    chunks = model()
    check_weights(tmp_path, 4, chunks)
    with torch.no_grad():
        next(chunks[chunk].parameters())[1, 1] = value
    with pytest.raises(ValueError, match=r"infinite after step 4, which was not saved.* resumes from its beginning"):
        check_weights(tmp_path, 4, chunks)


def test_it_says_where_the_run_resumes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "iter_0000002", [], {COMMON: {"iteration": 2}})
    (tmp_path / TRACKER).write_text("2")
    chunks = model()
    with torch.no_grad():
        next(chunks[0].parameters()).fill_(math.inf)
    with pytest.raises(ValueError, match="lower lr, and the run resumes from step 2"):
        check_weights(tmp_path, 4, chunks)
