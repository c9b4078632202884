"""Statistics at a position, against transformers' values and sums by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.evaluation.lock_fork.token_statistics import positions, read, token_statistics


def test_statistics_counted_by_hand() -> None:
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05], [1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    nll, entropy, top, tail = token_statistics(p.log(), torch.tensor([1, 0, 3]), 0.9)
    assert nll.tolist() == pytest.approx([-math.log(0.3), 0, math.log(4)], abs=1e-6)
    by_hand = -sum(x * math.log(x) for x in (0.5, 0.3, 0.15, 0.05))
    assert entropy.tolist() == pytest.approx([by_hand, 0, math.log(4)], abs=1e-6)
    assert top.tolist() == pytest.approx([0.5, 1, 0.25])
    assert tail.tolist() == pytest.approx(
        [0.05, 0, 0], abs=1e-6
    )  # .5 + .3 + .15 reach .9; of equal quarters all four are needed


def test_positions_are_those_that_predict_supervised_tokens(data: PreparedData) -> None:
    where = positions(data, [3, 7])
    assert len(where.token) == sum(int(data[i].loss_mask.sum()) for i in (3, 7))
    for sample, place, token in zip(where.sample, where.place, where.token, strict=True):
        assert data[sample].loss_mask[place + 1] == 1
        assert data[sample].tokens[place + 1] == token
    for sample in (3, 7):
        relative = where.relative[where.sample == sample]
        np.testing.assert_allclose(relative, np.arange(len(relative)) / len(relative))
        assert set(where.persona[where.sample == sample]) == {data[sample].persona}


def test_readings_equal_transformers_values(tiny_model: Path, data: PreparedData) -> None:
    network = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    where = positions(data, [0, 5])
    reading, hidden = read(network, data, where, 0.95)
    assert hidden.shape == (len(where.token), network.config.hidden_size)
    for sample in (0, 5):
        tokens = torch.from_numpy(data[sample].tokens).long()[None]
        mask = torch.from_numpy(data[sample].loss_mask)[None] > 0
        with torch.inference_mode():
            output = network(input_ids=tokens, labels=tokens.masked_fill(~mask, -100))
            logits = network.lm_head(hidden[torch.from_numpy(where.sample == sample)])
        assert reading.nll[where.sample == sample].mean() == pytest.approx(output.loss.item(), rel=1e-5)
        torch.testing.assert_close(logits, output.logits[0, :-1][mask[0, 1:]])  # the hidden state gives these logits


def test_samples_without_a_reply_are_refused(data: PreparedData) -> None:
    with pytest.raises(ValueError, match="no supervised token"):
        positions(data, [])
