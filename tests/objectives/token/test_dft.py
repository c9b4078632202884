"""DFT (arXiv 2508.05629): cross-entropy weighted by the label's probability, which is not differentiated.

Shapes: T tokens, V columns.
"""

import torch

from megatron_sfr.objectives.token.dft import DFT
from tests.objectives.token.token_cases import differentiated, labels, logits

EXACT = {"rtol": 1e-12, "atol": 1e-12}
Z_TV, Y_T = logits(50, 13, seed=7), labels(50, 13, seed=7)


def test_the_gradient_is_cross_entropys_times_the_labels_probability() -> None:
    _, cross_entropy_T, g_TV = differentiated(Z_TV, Y_T, DFT())
    p_TV = Z_TV.softmax(-1)
    p_y_T1 = p_TV.gather(1, Y_T[:, None])
    torch.testing.assert_close(g_TV, p_y_T1 * (p_TV - torch.nn.functional.one_hot(Y_T, 13)), **EXACT)
    torch.testing.assert_close(cross_entropy_T, -p_y_T1[:, 0].log(), **EXACT)


def test_a_label_of_probability_0_has_no_gradient() -> None:
    z_TV = torch.tensor([[1e4, -1e4, 0.0]])
    loss_T, cross_entropy_T, g_TV = differentiated(z_TV, torch.tensor([1]), DFT())
    assert loss_T == 0
    assert (g_TV == 0).all()
    assert cross_entropy_T == 2e4
