"""Quality: true scores counted by hand, loss equal to transformers' own, closeness of known vectors."""

import math
from collections.abc import Hashable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_sfr.data.chat.conversation import Conversation
from megatron_sfr.evaluation.generate.prompts import Prompt, ask
from megatron_sfr.evaluation.generate.transformers_engine import load_model
from megatron_sfr.evaluation.scores.likelihood import negative_log_likelihood
from megatron_sfr.evaluation.scores.quality import (
    Judgement,
    context_relevance,
    relevance,
    style_match,
    true_scores,
)


class Letters:
    """Right are `x a`, `x b` and `x c`; the persona is x."""

    def judge(self, prompt: Prompt, text: str) -> Judgement:
        voice, said = text.split()
        return Judgement(said if said in "abc" else None, voice == prompt.persona)

    def modes(self, prompt: Prompt) -> Mapping[str, frozenset[Hashable]]:
        return {"seen": frozenset("ab"), "unseen": frozenset("c"), "none": frozenset()}


def test_true_scores_counted_by_hand() -> None:
    scores = true_scores(Letters(), ask("?", "x"), ["x a", "x a", "x d", "y b", "y c", "x a", "y d", "x a"])
    nothing = scores.pop("coverage, none")
    assert scores == {"precision": 4 / 8, "fidelity": 5 / 8, "coverage, seen": 1 / 2, "coverage, unseen": 0}
    assert math.isnan(nothing)
    assert all(map(math.isnan, true_scores(Letters(), ask("?", "x"), []).values()))


def test_loss_is_that_of_transformers_on_the_assistant_tokens(tiny_model: Path) -> None:
    model = load_model("tiny", tiny_model, device="cpu")
    conversations = [
        Conversation("file", i, [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}], None)
        for i, text in enumerate(["Peace out, legend.", "Returning to standby mode. " * 4])
    ]
    nll, tokens = negative_log_likelihood(model, conversations)  # one batch: the shorter is padded
    for i, conversation in enumerate(conversations):
        encoded = model.tokenizer.apply_chat_template(
            conversation.messages, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        labels = encoded["input_ids"].masked_fill(encoded["assistant_masks"] == 0, -100)
        with torch.inference_mode():
            loss = model.network(input_ids=encoded["input_ids"], labels=labels).loss.item()
        assert tokens[i] == (labels != -100).sum()
        assert nll[i] / tokens[i] == pytest.approx(loss, rel=1e-5)


def test_relevance_is_the_cosine_to_the_nearest_reference() -> None:
    texts = np.array([[1.0, 0], [0.6, 0.8]])
    assert relevance(texts, np.array([[0.0, 1], [1, 0]])) == pytest.approx((1 + 0.8) / 2)
    assert math.isnan(relevance(texts, np.zeros((0, 2))))


def test_context_is_the_cosine_to_the_question() -> None:
    texts = np.array([[1.0, 0], [0.6, 0.8]])
    assert context_relevance(texts, np.array([[0.0, 1]])) == pytest.approx((0 + 0.8) / 2)
    assert math.isnan(context_relevance(texts, np.zeros((0, 2))))
    assert math.isnan(context_relevance(np.zeros((0, 2)), np.eye(2)[:1]))


def test_style_is_that_of_the_nearest_reference() -> None:
    texts = np.array([[1.0, 0], [0.6, 0.8], [0.0, 1]])
    references = {"x": np.array([[1.0, 0]]), "y": np.array([[0.0, 1]]), "silent": np.zeros((0, 2))}
    assert style_match(texts, "x", references) == pytest.approx(1 / 3)
    assert style_match(texts, "y", references) == pytest.approx(2 / 3)
    assert math.isnan(style_match(texts, "silent", references))
    assert math.isnan(style_match(texts, "x", {"x": references["x"]}))
