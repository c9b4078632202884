"""The plain passes move at most 20 bytes per bf16 logit and allocate at most 2; the counter itself is tested too."""

import pytest
import torch

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.objectives.token.token_loss import vocab_parallel_loss
from tests.objectives.token.token_cases import CLOSED_FORM_LOSSES
from tools.traffic import Traffic

T, V = 256, 16384  # 8 MiB of logits in bf16, against blocks of 1 MiB


@pytest.mark.parametrize("name", CLOSED_FORM_LOSSES)
def test_plain_passes_stay_within_the_target(name: str) -> None:
    z_TV = torch.randn(T, V, dtype=torch.bfloat16, requires_grad=True)
    y_T = torch.arange(T)
    with Traffic(z_TV) as traffic:
        loss_T, _ = vocab_parallel_loss(z_TV, y_T, CLOSED_FORM_LOSSES[name], Vocab(V), overwrite=True)
        torch.autograd.grad(loss_T.sum(), z_TV)
    assert 6 <= traffic.memory / z_TV.numel() <= 20
    assert traffic.peak / z_TV.numel() <= 2


def test_the_counter_on_operations_of_known_traffic() -> None:
    z = torch.randn(64, 100)
    numel, index = z.numel(), torch.zeros(64, 1, dtype=torch.int64)
    cases = {
        "views move nothing": (lambda: z.view(-1)[:10].t(), 0),
        "a copy reads and writes": (lambda: z + 1, 8 * numel),
        "in place too": (lambda: z.mul_(2), 8 * numel),
        "filling only writes": (lambda: z.zero_(), 4 * numel),
        "empty memory is not written": (lambda: torch.empty_like(z), 0),
        "only the kind is read": (lambda: torch.zeros_like(z), 4 * numel),
        "a gather touches a column": (lambda: z.gather(1, index), 4 * 64),
        "a scatter reads and writes a column": (lambda: z.scatter_add_(1, index, torch.ones(64, 1)), 8 * 64),
        "rows are filled": (lambda: z.index_fill_(0, torch.tensor([1, 2]), 0), 4 * 200),
        "a broadcast row is read once": (lambda: z.copy_(torch.ones(1).expand(64, 100)), 4 * numel),
        "out= is written": (lambda: torch.exp(z, out=z), 8 * numel),
    }
    for name, (operation, expected) in cases.items():
        with Traffic(z) as traffic:
            operation()
        assert traffic.memory == expected, name


def test_the_counter_knows_the_peak() -> None:
    z = torch.randn(64, 100)
    with Traffic(z) as traffic:
        a = z + 1
        b = a + 1
        del a
        b = b + 1
        del b
    assert (traffic.peak, traffic.live) == (2 * z.numel() * 4, 0)
