"""Draws and samples do not depend on how the vocabulary is sharded, in one process and over real ranks."""

from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.kl_flow.sampling.vocab_shard import Keys, Shard
from tests import warm
from tests.kl_flow.sampling import shard_program
from tests.kl_flow.sampling.shard_program import COLUMNS, SIZE

DRAWS = 20_000


def keys() -> Keys:
    return Keys(3, torch.arange(DRAWS), torch.full((DRAWS,), 7))


@pytest.mark.parametrize("top_k", [0, 2, 3, 5, 99])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_softmax_of_the_top_k_logits(top_k: int, temperature: float) -> None:
    z_V = torch.tensor([0.3, -1.0, 1.2, 0.0, -0.4])
    shard = Shard(Vocab(5), 8)
    z_FW = shard.without_padding(torch.cat([z_V, torch.full((3,), 50.0)]).repeat(DRAWS, 1))
    token_F = shard.draw(z_FW, top_k, temperature, keys(), 11, stream=10)
    left_V = torch.where(z_V >= z_V.sort(descending=True).values[min(top_k or 5, 5) - 1], z_V, -torch.inf)
    expected = DRAWS * (left_V.double() / temperature).softmax(dim=-1)
    counts = torch.bincount(token_F, minlength=5)
    assert (counts[expected == 0] == 0).all()
    assert chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_the_argmax_needs_no_noise() -> None:
    z_FW = torch.randn(DRAWS, 8, generator=torch.Generator().manual_seed(0))
    shard = Shard(Vocab(8), 8)
    assert torch.equal(shard.draw(z_FW, 1, 5.0, keys(), 0, stream=10), z_FW.argmax(dim=-1))


def test_softmax_equals_torchs_and_padding_has_probability_0() -> None:
    l_FW = 40 * torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shard = Shard(Vocab(5), 8)
    p_FW = shard.softmax(shard.without_padding(l_FW.clone()))
    torch.testing.assert_close(p_FW[:, :5], l_FW[:, :5].softmax(dim=-1), rtol=1e-12, atol=1e-15)
    assert (p_FW[:, 5:] == 0).all()


@pytest.mark.distributed
def test_real_ranks_draw_the_samples_of_one_process(tmp_path: Path) -> None:
    """Every method and every kind of draw."""
    whole = shard_program.run_all(Vocab(SIZE), COLUMNS)
    assert len({tuple(actual.flatten().tolist()) for actual in whole.values()}) >= 7  # basic draws only at the end
    warm.run(str(Path(shard_program.__file__)), str(tmp_path), ranks=3, check=True)
    for rank in range(3):
        actual = torch.load(tmp_path / f"{rank}.pt")
        for key, x_BS in whole.items():
            assert torch.equal(actual[key], x_BS), (rank, key)
