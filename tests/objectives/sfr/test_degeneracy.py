"""P7: multi-token prediction is a degenerate case of SFR, shown step by step.

1. Flow matching with source and time 0 is regression on the embedding.
2. With one-hot "embeddings" of single tokens it is the Brier score.
3. The Brier score has its optimum at p(y | h), as has the cross-entropy of heads that predict those tokens.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.objectives.sfr.sfr_loss import (
    SFROptions,
    anchor_errors,
    draw_noise,
    flow_matching_error,
    weighted_sum,
)
from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
from megatron_sfr.objectives.token.token_loss import vocab_parallel_loss

DEGENERATE = SFROptions(source="zero", time="zero")


def terms(velocity, h_BAH: Tensor, x_1_BAD: Tensor, weight_BA: Tensor, options: SFROptions) -> tuple[Tensor, Tensor]:
    """Errors and weights of the loss as training computes them, in float64."""
    B, A, D = x_1_BAD.shape
    position = torch.arange(A).expand(B, A)
    x_0, t = draw_noise(torch.arange(B)[:, None], position, torch.zeros_like(position), D, 0, options)
    return anchor_errors(velocity, h_BAH, x_1_BAD, weight_BA, x_0.double(), t.double(), options)


def test_P7_flow_from_zero_at_time_zero_is_the_mse_ablation_bit_for_bit() -> None:
    B, A, D, H = 3, 4, 6, 5
    g = torch.Generator().manual_seed(0)
    h, y, weight, matrix = (
        torch.randn(shape, dtype=torch.float64, generator=g) for shape in ((B, A, H), (B, A, D), (B, A), (H, D))
    )

    def velocity(x: Tensor, t: Tensor, h: Tensor) -> Tensor:
        return h @ matrix + 3 * x.sin() + 5 * t

    flow = terms(velocity, h, y, weight, DEGENERATE)
    mse = terms(velocity, h, y, weight, SFROptions(loss="mse"))
    assert all(torch.equal(a, b) for a, b in zip(flow, mse, strict=True))
    assert torch.equal(weighted_sum(*flow), weighted_sum(*mse))
    regression = (h @ matrix - y).square().sum(-1) / D  # |head(0, 0, h) - E(y)|^2 / D
    assert torch.equal(flow[0], mse[0])
    assert flow[0].shape == (B, A, 1)
    torch.testing.assert_close(flow[0][..., 0], regression, rtol=1e-14, atol=0)


def fit(parameter: Tensor, loss) -> Tensor:
    """Minimizes a loss of one parameter by L-BFGS; both problems here are convex."""
    optimizer = torch.optim.LBFGS(
        [parameter], max_iter=500, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(parameter)
        value.backward()
        return value

    optimizer.step(closure)
    return parameter.detach()


def brier(p_BHV: Tensor, values_BHV: Tensor) -> Tensor:
    """SFR's degenerate loss with every token of the vocabulary as a target, weighted by its probability.

    Each (head, token) pair is an anchor. Its hidden state is an index into the table of the head's predictions.
    """
    B, heads, V = p_BHV.shape
    one_hot = torch.eye(V, dtype=torch.float64).repeat(heads, 1).expand(B, -1, -1)
    h = values_BHV.repeat_interleave(V, dim=1)
    return weighted_sum(*terms(lambda x, t, h: h + 0 * x, h, one_hot, p_BHV.flatten(1), DEGENERATE))


def cross_entropy(p_BHV: Tensor, logits_BHV: Tensor) -> Tensor:
    """The same pairs under the token objective, as in heads that predict the next tokens."""
    V = p_BHV.shape[-1]
    y_T = torch.arange(V).repeat(p_BHV.shape[0] * p_BHV.shape[1])
    losses_T, _ = vocab_parallel_loss(
        logits_BHV.reshape(-1, V).repeat_interleave(V, dim=0), y_T, CrossEntropy(), Vocab(V)
    )
    return (p_BHV.flatten() * losses_T).sum()


def conditionals() -> Tensor:
    """p(y_{t + j} | h) of 3 hidden states, 2 heads j, 4 tokens."""
    p = torch.rand(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.05
    return p / p.sum(-1, keepdim=True)


def test_P7_with_one_hot_targets_it_is_the_brier_score() -> None:
    p = conditionals()
    answer = torch.rand(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    V, expected = p.shape[-1], 0.0
    for b, j, y in torch.cartesian_prod(*(torch.arange(n) for n in p.shape)):
        score = sum((answer[b, j, i] - float(i == y)) ** 2 for i in range(V))
        expected += p[b, j, y] * score / V
    assert brier(p, answer).item() == pytest.approx(expected.item(), rel=1e-14)


def test_P7_its_optimum_is_that_of_multi_token_predictions_cross_entropy() -> None:
    p = conditionals()
    values = fit(torch.zeros_like(p).requires_grad_(), partial(brier, p))
    logits = fit(torch.zeros_like(p).requires_grad_(), partial(cross_entropy, p))
    torch.testing.assert_close(values, p, rtol=0, atol=1e-9)
    torch.testing.assert_close(logits.softmax(-1), p, rtol=0, atol=1e-7)


def test_P7_both_gradients_vanish_at_the_conditional_probabilities() -> None:
    p = conditionals()
    for loss, at in ((brier, p), (cross_entropy, p.log())):
        at = at.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(p, at), at)
        assert gradient.abs().max() < 1e-15
        (elsewhere,) = torch.autograd.grad(loss(p, at + torch.arange(4)), at)
        assert elsewhere.abs().max() > 0.1


def test_P7_a_deterministic_source_at_later_times_leaks_the_target() -> None:
    B, A, D = 2, 3, 4
    g = torch.Generator().manual_seed(3)
    x_1, t = torch.randn(B, A, D, dtype=torch.float64, generator=g), torch.rand(B, A, 2, 1, generator=g).double()
    x_0, h = torch.zeros(B, A, 2, D, dtype=torch.float64), torch.zeros(B, A, 1, dtype=torch.float64)
    error = flow_matching_error(lambda x, t, h: x / t, h, x_1, x_0, t)  # this head ignores h
    assert error.abs().max() < 1e-28


@pytest.mark.parametrize("time", ["uniform", "logit_normal"])
def test_P7_the_leaking_combination_is_refused(time: str) -> None:
    with pytest.raises(ValueError, match="leaks the target"):
        SFROptions(source="zero", time=time)
    for loss in ("mse", "cosine", "cka"):  # these are deterministic whatever the flow's options are
        assert not SFROptions(loss=loss, source="zero", time=time).stochastic
