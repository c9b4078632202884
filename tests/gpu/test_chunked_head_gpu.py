"""The chunked LM head on a GPU: gradients, peak memory, and no wait of the host for the device; needs a CUDA device.

Shapes: T positions, H hidden size, V columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.objectives.token.chunked_head import ChunkPlan, LMHead, chunked_loss
from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
from megatron_sfr.objectives.token.token_loss import vocab_parallel_loss

pytestmark = pytest.mark.gpu
T, H, V, CHUNK = 4096, 1024, 152064, 1024


@contextmanager
def no_wait() -> Iterator[None]:
    """Context in which an operation that waits for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_half_the_tokens_in_chunks_equal_all_logits_without_a_wait() -> None:
    g = torch.Generator("cuda").manual_seed(0)
    h_TH = torch.randn(T, H, generator=g, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight_VH = (torch.randn(V, H, generator=g, device="cuda") / H**0.5).bfloat16().requires_grad_()
    y_T, index_N = torch.randint(V, (T,), generator=g, device="cuda"), torch.arange(0, T, 2, device="cuda")
    total_VH = torch.zeros(V, H, device="cuda")

    def project(h_CH: Tensor) -> Tensor:
        with torch.no_grad():
            return h_CH @ weight_VH.t()

    head = LMHead(project, weight_VH, Vocab(V), accumulator_VH=total_VH)
    y_N = y_T[index_N]
    for attempt in ("compiles the kernels", "is measured"):
        h_TH.grad = None
        total_VH.zero_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with no_wait() if attempt == "is measured" else torch.enable_grad():
            total, *_ = chunked_loss(h_TH, index_N, y_N, CrossEntropy(), head, ChunkPlan(CHUNK))
            total.backward(inputs=[h_TH])
    assert torch.cuda.max_memory_allocated() - before <= 2 * CHUNK * V * 2
    chunked_h, chunked_total = h_TH.grad, total.detach()
    h_TH.grad = None
    loss_N, _ = vocab_parallel_loss(h_TH[index_N] @ weight_VH.t(), y_N, CrossEntropy(), Vocab(V))
    loss_N.sum().backward()
    torch.testing.assert_close(chunked_total, loss_N.sum().detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(chunked_h, h_TH.grad, rtol=2e-2, atol=2e-2)  # bf16
    error = (total_VH - weight_VH.grad.float()).norm() / weight_VH.grad.float().norm()
    assert error < 1e-2  # products in bf16
