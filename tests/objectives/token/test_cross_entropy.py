"""Cross-entropy is torch's and Megatron's; gradcheck, and the entropy beside it.

Shapes: T tokens, V columns.
"""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch.distributions import Categorical

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
from megatron_sfr.objectives.token.loss_base import IGNORED
from megatron_sfr.objectives.token.token_loss import entropy_and_max_prob, token_values, vocab_parallel_loss
from tests.objectives.token.token_cases import ALL_LOSSES, differentiated, labels, logits

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def test_cross_entropy_is_torchs() -> None:
    z_TV, y_T = logits(40, 17), labels(40, 17, ignored=0.3)
    loss_T, cross_entropy_T, g_TV = differentiated(z_TV, y_T, CrossEntropy())
    z_TV.requires_grad_()
    torchs_T = torch.nn.functional.cross_entropy(z_TV, y_T, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(loss_T, torchs_T, **EXACT)
    torch.testing.assert_close(cross_entropy_T, torchs_T, **EXACT)
    torch.testing.assert_close(g_TV, torch.autograd.grad(torchs_T.sum(), z_TV)[0], **EXACT)


def test_cross_entropy_is_megatrons(one_rank: None) -> None:
    """In fp32, on logits [s, b, v] as a model has them, with a weight for each token."""
    z_SBV, y_SB = logits(60, 503).float().view(20, 3, 503), labels(60, 503).view(20, 3)
    weight_SB = torch.rand(20, 3, generator=torch.Generator().manual_seed(2))
    theirs_SBV = z_SBV.clone().requires_grad_()
    theirs_SB = vocab_parallel_cross_entropy(theirs_SBV.clone(), y_SB)  # it overwrites its input
    (theirs_SB * weight_SB).sum().backward()
    vocab = Vocab(503, 0, parallel_state.get_tensor_model_parallel_group())
    loss_T, _, g_TV = differentiated(z_SBV.flatten(0, 1), y_SB.flatten(), CrossEntropy(), vocab, weight_SB.flatten())
    torch.testing.assert_close(loss_T, theirs_SB.detach().flatten(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(g_TV, theirs_SBV.grad.flatten(0, 1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["ce", "sed"])
def test_gradcheck_of_losses_without_stop_gradients(name: str) -> None:
    y_T = labels(5, 6, ignored=0.2)
    z_TV = logits(5, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: vocab_parallel_loss(z, y_T, ALL_LOSSES[name], Vocab(6))[0], (z_TV,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ALL_LOSSES)
def test_every_loss_reports_entropy_and_accuracy_of_the_softmax(name: str, dtype: torch.dtype) -> None:
    """Padding columns are not read. On a grid many labels share the largest logit, and are correct."""
    z_TV, y_T = logits(40, 9, grid=True).to(dtype), labels(40, 7, ignored=0.2)
    z_TV[:, 7:] = torch.nan
    values = token_values(z_TV, y_T, ALL_LOSSES[name], Vocab(7))
    kept_T, real_TV = y_T >= 0, z_TV[:, :7].double()
    entropy_T = Categorical(logits=real_TV).entropy() * kept_T
    correct_T = (real_TV.gather(1, y_T.clamp(min=0)[:, None])[:, 0] == real_TV.amax(-1)) & kept_T
    exact = {"atol": 1e-12, "rtol": 0} if dtype == torch.float64 else {"atol": 1e-6, "rtol": 1e-5}  # sums in fp32
    torch.testing.assert_close(values.entropy.double(), entropy_T, **exact)
    assert values.correct.tolist() == correct_T.tolist()
    assert 0 < correct_T.sum() < kept_T.sum()


@pytest.mark.parametrize("size", [1, 7, 9])
def test_entropy_and_max_prob_are_those_of_the_softmax_over_the_real_columns(size: int) -> None:
    z = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    entropy, top = entropy_and_max_prob(z, Vocab(size))
    p = z[:, :size].softmax(-1)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1), atol=1e-12, rtol=0)
    torch.testing.assert_close(top, p.amax(-1))
