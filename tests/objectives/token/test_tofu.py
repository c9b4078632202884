"""TOFU (arXiv 2605.00195): its limits are known losses. Shapes: T tokens, V columns."""

import pytest
import torch
import torch.nn.functional as F

from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
from megatron_sfr.objectives.token.gem import GEM
from megatron_sfr.objectives.token.tofu import TOFU
from tests.objectives.token.token_cases import differentiated, labels, logits

EXACT = {"rtol": 1e-12, "atol": 1e-12}
Z_TV, Y_T = logits(50, 13, seed=3), labels(50, 13, seed=3)


def test_without_focus_and_temperature_it_is_cross_entropy() -> None:
    for x, there in zip(
        differentiated(Z_TV, Y_T, TOFU(beta=1.0, gamma=0.0)), differentiated(Z_TV, Y_T, CrossEntropy()), strict=True
    ):
        torch.testing.assert_close(x, there, **EXACT)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_at_temperature_1_it_has_the_gradient_of_the_focal_loss(gamma: float) -> None:
    z_TV = Z_TV.clone().requires_grad_()
    log_p_T = -F.cross_entropy(z_TV, Y_T, reduction="none")
    (-((1 - log_p_T.exp()) ** gamma) * log_p_T).sum().backward()
    torch.testing.assert_close(differentiated(Z_TV, Y_T, TOFU(beta=1.0, gamma=gamma))[2], z_TV.grad, **EXACT)


def test_without_focus_it_has_the_gradient_of_linear_gem() -> None:
    tofu, gem = (differentiated(Z_TV, Y_T, loss)[2] for loss in (TOFU(beta=0.6, gamma=0.0), GEM(beta=0.6)))
    torch.testing.assert_close(tofu, gem, **EXACT)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 3.0])
def test_labels_of_probability_1_and_0(gamma: float) -> None:
    """A certain label has no gradient; an impossible one that of cross-entropy at temperature beta."""
    z_TV = torch.tensor([[2e4, 0.0, -1e4], [2e4, 0.0, -1e4]])
    loss_T, _, g_TV = differentiated(z_TV, torch.tensor([0, 2]), TOFU(beta=0.5, gamma=gamma))
    torch.testing.assert_close(loss_T, torch.tensor([0.0, 3e4]))
    torch.testing.assert_close(g_TV, torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, -1.0]]))


@pytest.mark.parametrize(
    "options", [{"beta": 0.0, "gamma": 1.0}, {"beta": 1.5, "gamma": 1.0}, {"beta": 1.0, "gamma": -1}]
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="choose"):
        TOFU(**options)
