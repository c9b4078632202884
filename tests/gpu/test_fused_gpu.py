"""The compiled kernels on a GPU equal their plain twin at the sizes of real training; needs a CUDA device."""

import pytest
import torch
from torch import Tensor

from megatron_sfr.kernels import plain
from tests.kernels.through import through, worst
from tests.objectives.token.token_cases import CLOSED_FORM_LOSSES

pytestmark = pytest.mark.gpu
T, V = 4096, 152064  # Qwen2.5's vocabulary, padded for 8 ranks


@pytest.fixture
def fused():
    from megatron_sfr.kernels import fused

    return fused


def batch(tokens: int, columns: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits, and labels among the first `size` columns of which every seventh is ignored."""
    g = torch.Generator("cuda").manual_seed(0)
    z_TV = torch.randn(tokens, columns, generator=g, device="cuda", dtype=dtype) * 3
    y_T = torch.randint(0, size, (tokens,), generator=g, device="cuda")
    return z_TV, torch.where(torch.arange(tokens, device="cuda") % 7 == 0, -100, y_T)


@pytest.mark.parametrize("name", CLOSED_FORM_LOSSES)
@pytest.mark.parametrize("shards", [1, 8])
def test_large_shapes(fused, name: str, shards: int) -> None:
    # The reference is in float64, 256 tokens at a time: whole it would take 5 GB and as much again for each block.
    size = V - 413
    z_TV, y_T = batch(T, V, size, torch.bfloat16)
    for rows in [slice(i, i + 256) for i in range(0, T, 1024)]:
        ours, exact = (
            through(kernels, z, y_T[rows], CLOSED_FORM_LOSSES[name], size=size, shards=n)
            for kernels, z, n in ((fused, z_TV[rows], shards), (plain, z_TV[rows].double(), 1))
        )
        errors = worst(ours, exact)
        assert all(ratio <= 1 for ratio in errors.values()), errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("columns", "size"), [(1, 1), (7, 7), (512, 501), (2048, 2048), (50304, 50257), (5001, 5001)])
def test_odd_vocabularies(fused, dtype: torch.dtype, columns: int, size: int) -> None:
    z_TV, y_T = batch(64, columns, size, dtype)
    for name, loss in CLOSED_FORM_LOSSES.items():
        exact = through(plain, z_TV.double(), y_T, loss, size=size, shards=1)
        errors = worst(through(fused, z_TV, y_T, loss, size=size, shards=1), exact)
        assert all(ratio <= 1 for ratio in errors.values()), (name, errors)


def test_more_than_2_to_the_31_logits(fused) -> None:
    # Equal rows at both ends of a tensor whose last elements a 32-bit index does not reach.
    tokens = 2**31 // V + 8
    z_TV = torch.zeros(tokens, V, dtype=torch.bfloat16, device="cuda")
    row_V, y_T = batch(1, V, V, torch.bfloat16)[0][0], torch.full((tokens,), V - 1, device="cuda")
    z_TV[0] = z_TV[-1] = row_V
    one_T = torch.ones(tokens, device="cuda")
    stats_TN = fused.row_statistics(z_TV, y_T, one_T, beta=0.7, moments=True, c=0.0, top_k=0)
    assert torch.equal(stats_TN[0], stats_TN[-1])
    fused.write_gradient(z_TV, y_T, stats_TN[:, 0], one_T, one_T, one_T, beta=0.7, c=0.0)
    assert torch.equal(z_TV[0], z_TV[-1])
    assert not torch.equal(z_TV[-1], row_V)


def test_two_runs_are_equal(fused) -> None:
    z_TV, y_T = batch(512, V, V, torch.bfloat16)
    first, second = (through(fused, z_TV, y_T, CLOSED_FORM_LOSSES["gem"], size=V, shards=1) for _ in range(2))
    assert torch.equal(first.loss_T, second.loss_T)
    assert torch.equal(first.gradient_TV, second.gradient_TV)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one(fused) -> None:
    z_TV, y_T = batch(64, 5001, 5001, torch.bfloat16)
    first, second = (
        through(fused, z_TV.to(device), y_T.to(device), CLOSED_FORM_LOSSES["gem"], size=5001, shards=1)
        for device in ("cuda:0", "cuda:1")
    )
    assert torch.equal(first.gradient_TV, second.gradient_TV.to("cuda:0"))
