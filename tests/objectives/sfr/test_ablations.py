"""The deterministic ablations: cosine regression, and CKA against its definition in loops."""

import pytest
import torch
from torch import Tensor

from megatron_sfr.objectives.sfr.ablations import cosine_error, linear_cka_error
from megatron_sfr.objectives.sfr.sfr_loss import SFROptions, anchor_errors


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def hsic_by_loops(x: Tensor, y: Tensor) -> float:
    """Unbiased HSIC of rows [n, .] under linear kernels (Song et al., JMLR 2012), as a mean over distinct indices.

    (1 / (n)_2) sum_ij k_ij l_ij + (1 / (n)_4) sum_ijqr k_ij l_qr - (2 / (n)_3) sum_ijq k_ij l_iq, with (n)_m ordered
    choices of m distinct indices: the U-statistic, which the formula with traces computes faster.
    """
    n = len(x)
    k, l = (x @ x.T).tolist(), (y @ y.T).tolist()
    two = three = four = 0.0
    for i in range(n):
        for j in set(range(n)) - {i}:
            two += k[i][j] * l[i][j]
            for q in set(range(n)) - {i, j}:
                three += k[i][j] * l[i][q]
                four += sum(k[i][j] * l[q][r] for r in set(range(n)) - {i, j, q})
    pairs = n * (n - 1)
    return two / pairs + four / (pairs * (n - 2) * (n - 3)) - 2 * three / (pairs * (n - 2))


@pytest.mark.parametrize("n", [4, 5, 9])
def test_cka_equals_the_definition_in_loops(n: int) -> None:
    h, x = rows(2, n, 3), rows(2, n, 5, seed=1)
    error, weight = linear_cka_error(h, x, torch.ones(2, n))
    for b in range(2):
        own = hsic_by_loops(h[b], h[b]) * hsic_by_loops(x[b], x[b])
        assert error[b].item() == pytest.approx(1 - hsic_by_loops(h[b], x[b]) / own**0.5, rel=1e-10)
    assert error.shape == weight.shape == (2, 1, 1)
    assert weight.flatten().tolist() == [n, n]


def test_cka_is_invariant_to_scale_rotation_and_origin_of_the_hidden_states() -> None:
    h, x, weight = rows(2, 7, 5), rows(2, 7, 6, seed=1), torch.ones(2, 7)
    rotation = torch.linalg.qr(rows(5, 5, seed=2)).Q
    error = linear_cka_error(h, x, weight)[0]
    for other in (1e-3 * h, 1e4 * h, h @ rotation, h + 3 * rows(1, 1, 5, seed=3)):
        torch.testing.assert_close(linear_cka_error(other, x, weight)[0], error, rtol=1e-9, atol=0)
    sheared = h * torch.arange(1, 6)
    assert (linear_cka_error(sheared, x, weight)[0] - error).abs().min() > 1e-3


def test_cka_of_states_with_themselves_is_1() -> None:
    h = rows(2, 6, 5)
    assert linear_cka_error(h, 2 * h, torch.ones(2, 6))[0].abs().max() < 1e-12


def test_cka_ignores_padding() -> None:
    h, x = rows(2, 5, 3), rows(2, 5, 4, seed=1)
    alone = linear_cka_error(h, x, torch.full((2, 5), 0.5))
    padded = [torch.cat([y, 100 * rows(2, 3, y.shape[-1], seed=2)], dim=1) for y in (h, x)]
    weight = torch.cat([torch.full((2, 5), 0.5), torch.zeros(2, 3)], dim=1)
    padded[0].requires_grad_()
    actual = linear_cka_error(*padded, weight)
    for a, b in zip(alone, actual, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    actual[0].sum().backward()
    assert padded[0].grad[:, :5].abs().min() > 0
    assert not padded[0].grad[:, 5:].any()


@pytest.mark.parametrize("valid", [0, 1, 3])
def test_fewer_than_four_anchors_have_weight_0_and_give_no_nan(valid: int) -> None:
    h, x = rows(2, 6, 3).requires_grad_(), rows(2, 6, 4, seed=1)
    weight = torch.ones(2, 6)
    weight[0, valid:] = 0
    error, w = linear_cka_error(h, x, weight)
    assert (error[0].item(), w[0].item()) == (0, 0)
    assert w[1].item() == 6
    (w * error).sum().backward()
    assert not h.grad[0].any()
    assert h.grad[1].isfinite().all()
    assert h.grad[1].any()


def test_collapsed_states_give_no_nan() -> None:
    h = torch.zeros(1, 6, 3, dtype=torch.float64, requires_grad=True)
    linear_cka_error(h, rows(1, 6, 4), torch.ones(1, 6))[0].sum().backward()
    assert h.grad.isfinite().all()


def test_cka_passes_gradcheck_in_float64() -> None:
    x, weight = rows(2, 6, 4, seed=1), torch.ones(2, 6)
    weight[1, 4:] = 0
    assert torch.autograd.gradcheck(lambda h: linear_cka_error(h, x, weight)[0], rows(2, 6, 3).requires_grad_())


def test_cosine_passes_gradcheck_in_float64() -> None:
    x, y = rows(3, 4), rows(3, 4, seed=1)
    for size in (0.1, 10.0):  # shorter than 1, and longer
        assert torch.autograd.gradcheck(lambda x: cosine_error(x, y), (size * x).requires_grad_())


def test_cosine_measures_the_angle_and_does_not_normalise_short_predictions() -> None:
    y = 5 * torch.eye(3, dtype=torch.float64)[0]
    angles = torch.tensor([0.0, 0.5, torch.pi / 2, torch.pi], dtype=torch.float64)
    x = torch.stack([angles.cos(), angles.sin(), 0 * angles], dim=-1)
    for size in (1.0, 2.0, 1e6):
        torch.testing.assert_close(cosine_error(size * x, y), 1 - angles.cos(), rtol=0, atol=1e-14)
    torch.testing.assert_close(cosine_error(0.5 * x, y), 1 - 0.5 * angles.cos(), rtol=0, atol=1e-14)


def test_the_prediction_0_of_a_new_head_has_loss_1_and_a_bounded_gradient() -> None:
    y = rows(2, 3, 8, seed=1)
    bias = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    zero, h, options = torch.zeros(2, 3, 1, 8), rows(2, 3, 4), SFROptions(loss="cosine")
    error, _ = anchor_errors(lambda x, t, h: x + bias, h, y, torch.ones(2, 3), zero, zero[..., :1], options)
    assert torch.equal(error, torch.ones(2, 3, 1, dtype=torch.float64))
    error.mean().backward()
    assert 0 < bias.grad.norm() <= 1
