"""EAFT (arXiv 2601.02151): cross-entropy times the normalized entropy of the largest logits.

Shapes: T tokens, V columns.
"""

import pytest
import torch

from megatron_sfr.objectives.token.eaft import EAFT
from tests.objectives.token.token_cases import differentiated, labels, logits

EXACT = {"rtol": 1e-12, "atol": 1e-12}
Z_TV, Y_T = logits(50, 13, seed=5), labels(50, 13, seed=5)


@pytest.mark.parametrize(("alpha", "top_k"), [(1.0, 2), (0.5, 7), (2.0, 13)])
def test_the_gradient_is_cross_entropys_times_the_entropy(alpha: float, top_k: int) -> None:
    loss_T, cross_entropy_T, g_TV = differentiated(Z_TV, Y_T, EAFT(alpha=alpha, top_k=top_k))
    p_TV = Z_TV.softmax(-1)
    top_TK = p_TV.topk(top_k).values
    top_TK /= top_TK.sum(-1, keepdim=True)
    weight_T = (-(top_TK * top_TK.log()).sum(-1) / torch.tensor(float(top_k), dtype=torch.float64).log()) ** alpha
    torch.testing.assert_close(loss_T, weight_T * cross_entropy_T, **EXACT)
    expected_TV = weight_T[:, None] * (p_TV - torch.nn.functional.one_hot(Y_T, 13))
    torch.testing.assert_close(g_TV, expected_TV, **EXACT)


def test_a_confident_model_is_unchanged_and_an_undecided_one_learns_by_cross_entropy() -> None:
    z_TV = torch.tensor([[50.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    loss_T, cross_entropy_T, _ = differentiated(z_TV, torch.tensor([2, 2]), EAFT(top_k=4))
    assert loss_T[0] < 1e-15 * cross_entropy_T[0] * 1e5
    torch.testing.assert_close(loss_T[1], cross_entropy_T[1], **EXACT)


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"top_k": 1}, {"top_k": 129}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="choose"):
        EAFT(**options)
