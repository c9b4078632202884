"""What `token_loss` refuses: arguments that would give a number without meaning, or a message of torch."""

from typing import Any

import pytest
import torch

import megatron_sfr as sfr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(2, 2, dtype=torch.int64)}, r"labels \(2, 2\) torch.int64 do not fit: give floating"),
        ({"labels": torch.zeros(2, 3, dtype=torch.int32)}, r"labels \(2, 3\) torch.int32 do not fit: give floating"),
        (
            {"labels": torch.full((2, 3), 8)},
            r"^a label is 8, and the vocabulary has 8 tokens; give -100 to ignore one$",
        ),
        ({"labels": torch.full((2, 3), 6), "vocab_size": 6}, r"^a label is 6, and the vocabulary has 6 tokens"),
        (
            {"labels": torch.zeros(2, 3, dtype=torch.int64, device="meta")},
            r"^logits are on cpu and labels on meta: move",
        ),
        ({"loss": "gem"}, r"^loss is 'gem': give an instance of a TokenLoss, such as GEM\(beta=0.7\)$"),
        ({"loss": sfr.GEM}, r"^loss is <class '.*GEM'>: give an instance of a TokenLoss"),
        ({"vocab_size": 9}, r"^vocab_size is 9; the logits have 8 columns, so give 1 to 8$"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    given = {"logits": torch.zeros(2, 3, 8), "labels": torch.full((2, 3), 5), "loss": sfr.GEM()}
    assert sfr.token_loss(**given)[0].shape == (2, 3)
    with pytest.raises(ValueError, match=message):
        sfr.token_loss(**given | change)
