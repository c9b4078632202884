"""The loss for slime, on two tensor-parallel ranks with gloo, equals one process in value and gradient.

The ranks run this file as a program. slime is not installed here, since it is not on PyPI. `get_responses` below has
the signature that it has in slime at 00c2d6d, and its division by the rollout's temperature.
Shapes: T tokens of the batch, V columns, R response tokens.
"""

import sys
import types
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sfr.objectives.token.gem import GEM
from tests import warm

T, V, SIZE = 11, 8, 7
ARGS = Namespace(rollout_temperature=0.5, vocab_size=SIZE)
G = torch.Generator().manual_seed(0)
LOGITS_1TV = torch.randn(1, T, V, generator=G)
TOKENS = [torch.randint(SIZE, (6,), generator=G), torch.randint(SIZE, (5,), generator=G)]
BATCH = {"unconcat_tokens": TOKENS, "total_lengths": [6, 5], "response_lengths": [2, 3]}
RESPONSE_R = torch.tensor([3, 4, 7, 8, 9])  # the positions that predict the tokens of a response


def get_responses(
    logits: Tensor,
    *,
    args: Namespace,
    unconcat_tokens: list[Tensor],
    total_lengths: list[int],
    response_lengths: list[int],
    apply_temperature: bool = True,
) -> Any:
    logits = logits.squeeze(0) / (args.rollout_temperature if apply_temperature else 1.0)
    end = 0
    for tokens, total, response in zip(unconcat_tokens, total_lengths, response_lengths, strict=True):
        end += total
        yield logits[end - response - 1 : end - 1], tokens[-response:]


def run_rank(folder: Path) -> None:
    """Loss, cross-entropy and the gradient of this rank's half of the columns."""
    from megatron.core import parallel_state

    module = types.ModuleType("slime.backends.megatron_utils.loss")
    module.get_responses = get_responses  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    for name in ("slime", "slime.backends", "slime.backends.megatron_utils"):
        sys.modules[name] = types.ModuleType(name)
    from examples.slime_loss.gem_loss import loss

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, create_gloo_process_groups=False)
    logits_1TV = LOGITS_1TV.chunk(2, dim=-1)[rank].clone().requires_grad_()
    total, log = loss(ARGS, BATCH, logits_1TV, torch.sum)
    total.backward()
    torch.save((total.detach(), log, logits_1TV.grad), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_equal_one_process_at_temperature_1(tmp_path: Path) -> None:
    warm.run(__file__, str(tmp_path), ranks=2, check=True)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    z_RV = LOGITS_1TV[0, RESPONSE_R, :SIZE].clone().requires_grad_()
    y_R = torch.cat([TOKENS[0][-2:], TOKENS[1][-3:]])
    expected = GEM(beta=0.7).loss(z_RV, y_R).sum()
    expected.backward()
    for total, log, _ in ranks:
        torch.testing.assert_close(total, expected.detach())
        assert log["loss"] == total
        torch.testing.assert_close(log["cross_entropy"], torch.nn.functional.cross_entropy(z_RV, y_R, reduction="sum"))
    gradient_TV = torch.cat([gradient for _, _, gradient in ranks], dim=-1)[0]
    torch.testing.assert_close(gradient_TV[RESPONSE_R, :SIZE], z_RV.grad)
    gradient_TV[RESPONSE_R, :SIZE] = 0
    assert not gradient_TV.any()


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
