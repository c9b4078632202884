"""Every loss is independent of how the vocabulary is sharded (G5, S5): in one process and over real ranks.

Shapes: T tokens, V columns, R shards.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_sfr.kernels import plain
from megatron_sfr.kernels.vocab_parallel import Vocab, combine
from megatron_sfr.objectives.token.closed_form import TokenValues
from megatron_sfr.objectives.token.loss_base import ClosedFormLoss
from tests import warm
from tests.objectives.token import shard_program
from tests.objectives.token.shard_program import ANCHORED, COLUMNS, SIZE, TRIED
from tests.objectives.token.token_cases import CLOSED_FORM_LOSSES, differentiated, labels, logits

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def in_shards(z_TV: Tensor, y_T: Tensor, loss: ClosedFormLoss, size: int, shards: int) -> tuple[Tensor, Tensor]:
    """Loss and gradient from kernels that see one shard each; only their statistics are combined."""
    spec = loss.statistics
    blocks = [z_TV[:, columns].clone() for columns in torch.arange(z_TV.shape[1]).chunk(shards)]
    starts = [sum(block.shape[1] for block in blocks[:r]) for r in range(len(blocks))]
    z_y_T = z_TV.gather(1, y_T.clamp(min=0)[:, None])[:, 0] * (y_T >= 0)
    shards_stats, parts = [], []
    for start, block_TV in zip(starts, blocks, strict=True):
        vocab = Vocab(size, start)
        real_TV = vocab.real(block_TV)
        y_local_T = vocab.local(y_T, real_TV.shape[1])
        parts.append((real_TV, y_local_T))
        known = {"beta": spec.beta, "moments": spec.moments, "c": spec.c, "top_k": spec.top_k}
        shards_stats.append(plain.row_statistics(real_TV, y_local_T, z_y_T, **known))
    stats = combine(torch.stack(shards_stats), spec.beta)
    result = [torch.where(y_T >= 0, x, 0) for x in loss.finalize(stats)]
    for real_TV, y_local_T in parts:
        plain.write_gradient(real_TV, y_local_T, stats.m, z_y_T, *result[1:], beta=spec.beta, c=spec.c)
    return result[0], torch.cat(blocks, dim=1)[:, :size]


@pytest.mark.parametrize("grid", [False, True], ids=["all unlike", "many ties"])
@pytest.mark.parametrize("shards", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CLOSED_FORM_LOSSES)
def test_g5_s5_combined_shards_equal_the_whole_vocabulary(name: str, shards: int, grid: bool) -> None:
    """Of 4 shards the last one holds only padding."""
    z_TV, y_T = shard_program.all_logits(grid), labels(shard_program.TOKENS, SIZE, ignored=0.2)
    loss_T, _, g_TV = differentiated(z_TV[:, :SIZE], y_T, CLOSED_FORM_LOSSES[name])
    for x, there in zip(in_shards(z_TV, y_T, CLOSED_FORM_LOSSES[name], SIZE, shards), (loss_T, g_TV), strict=True):
        torch.testing.assert_close(x, there, **EXACT)


@given(st.data())
def test_g5_s5_for_any_cut(data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, 24))
    size, shards = data.draw(st.integers(1, columns)), data.draw(st.integers(1, 9))
    objective = CLOSED_FORM_LOSSES[data.draw(st.sampled_from(list(CLOSED_FORM_LOSSES)))]
    seed, grid, scale = (
        data.draw(st.integers(0, 999)),
        data.draw(st.booleans()),
        data.draw(st.sampled_from([1.0, 30.0])),
    )
    z_TV, y_T = logits(7, columns, seed=seed, grid=grid, scale=scale), labels(7, size, seed=seed, ignored=0.2)
    loss_T, _, g_TV = differentiated(z_TV[:, :size], y_T, objective)
    for x, there in zip(in_shards(z_TV, y_T, objective, size, shards), (loss_T, g_TV), strict=True):
        torch.testing.assert_close(x, there, rtol=1e-11, atol=1e-11)  # at scale 30 exp magnifies the logits' rounding


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """The results of each rank of a real gloo group."""
    folder = tmp_path_factory.mktemp("shards")
    warm.run(str(Path(shard_program.__file__)), str(folder), ranks=request.param, check=True)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.distributed
@pytest.mark.parametrize("grid", [False, True], ids=["all unlike", "many ties"])
@pytest.mark.parametrize("name", TRIED)
def test_g5_s5_real_ranks_equal_one_process(ranks: list[dict[Any, Any]], name: str, grid: bool) -> None:
    whole = shard_program.run(name, grid, Vocab(SIZE), slice(0, COLUMNS))
    for actual in ranks:
        for key in TokenValues._fields:
            torch.testing.assert_close(actual[name, grid][key], whole[key], **EXACT)
    g_TV = torch.cat([actual[name, grid]["gradient"] for actual in ranks], dim=1)
    torch.testing.assert_close(g_TV, whole["gradient"], **EXACT)
    assert (g_TV[:, SIZE:] == 0).all()
    assert whole["forward"] == []


@pytest.mark.distributed
@pytest.mark.parametrize("name", [*CLOSED_FORM_LOSSES, *ANCHORED])
def test_one_gather_per_forward_pass_and_none_backward(ranks: list[dict[Any, Any]], name: str) -> None:
    """One more for weighted tokens: the weights need the label's logit before the pass."""
    gathers = 2 if TRIED[name].statistics.c else 1
    for actual in ranks:
        assert actual[name, False]["forward"] == ["allgather_"] * gathers
        assert actual[name, False]["backward"] == []
