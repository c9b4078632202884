"""The closed-form gradient of cross-entropy is autograd's, in float64, with padded columns and masked tokens."""

import torch

from megatron_sfr.objectives.cross_entropy import logit_gradient
from megatron_sfr.objectives.vocab import Vocab


def test_equals_autograd() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(6, 11, generator=g, requires_grad=True)
    y, mask = torch.randint(0, 9, (6,), generator=g), torch.tensor([1.0, 0, 1, 1, 0, 1])
    padded = z.masked_fill(torch.arange(11) >= 9, float("-inf"))
    (torch.nn.functional.cross_entropy(padded, y, reduction="none") * mask).sum().backward()
    found = logit_gradient(padded.detach(), y, mask, Vocab())
    assert torch.allclose(found, z.grad, atol=1e-6)
    assert not found[:, 9:].any()
    assert not found[mask == 0].any()
