"""Diversity metrics against values counted by hand, and their extremes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.evaluation.scores.diversity import (
    bleu,
    cross_style_bleu,
    distinct_n,
    self_bleu,
    self_bleu_all,
)
from megatron_sfr.evaluation.scores.tokenizers import bleu_metric, choose_tokenizer

TEXTS = ["the cat sat on the mat", "the dog sat on the mat", "a bird flew over the house"]


def test_distinct_n_counted_by_hand() -> None:
    assert distinct_n(["a b a b", "a b c"], 1) == 3 / 7  # a b c of 4 + 3 words
    assert distinct_n(["a b a b", "a b c"], 2) == 3 / 5  # ab ba bc of ab ba ab ab bc
    assert distinct_n(["a"], 2) != distinct_n(["a"], 2)  # NaN: no bigram at all


@given(st.lists(st.text("abc ", max_size=20), max_size=6), st.integers(1, 3))
def test_distinct_n_is_a_share_and_falls_when_all_is_said_twice(texts: list[str], n: int) -> None:
    once, twice = distinct_n(texts, n), distinct_n(texts * 2, n)
    assert math.isnan(once) or (0 < once <= 1 and twice == pytest.approx(once / 2))


def test_bleu_1_counted_by_hand() -> None:
    assert bleu(TEXTS[0], TEXTS[1], 1) == pytest.approx(5 / 6)  # the sat on the mat; equal lengths, no penalty
    assert bleu("the cat", "the cat sat on", 1) == pytest.approx(math.exp(1 - 4 / 2))  # precision 1, half as long
    assert bleu(TEXTS[0], TEXTS[1], 2) == pytest.approx(math.sqrt(5 / 6 * 3 / 5))  # sat-on on-the the-mat of 5


def test_self_bleu_is_the_mean_over_ordered_pairs() -> None:
    pairs = [bleu(a, b, 2) for a in TEXTS for b in TEXTS if a is not b]
    assert self_bleu(TEXTS, 2, pairs=100, seed=0) == pytest.approx(np.mean(pairs))
    assert self_bleu([TEXTS[0]] * 4, 4, pairs=100, seed=0) == pytest.approx(1)
    assert math.isnan(self_bleu(TEXTS[:1], 4, pairs=100, seed=0))


@pytest.mark.parametrize("text", ["", " \n", "...", "yes", "a longer reply, all the same", "今天天气很好"])
def test_replies_that_are_the_same_are_never_diverse(text: str) -> None:
    tokenizer = choose_tokenizer([text])
    assert self_bleu([text] * 4, 4, pairs=9, seed=0, tokenizer=tokenizer) == pytest.approx(1)
    assert self_bleu_all([text] * 4, 4, tokenizer) == pytest.approx(1)
    assert cross_style_bleu({"a": [text], "b": [text]}, 1, pairs=9, seed=0, tokenizer=tokenizer) == pytest.approx(1)
    distinct = distinct_n([text] * 4, 2, tokenizer)
    assert math.isnan(distinct) or distinct <= 1 / 4  # no value, or as few as there are


@given(st.lists(st.text("ab ", max_size=12), min_size=2, max_size=6), st.integers(1, 4))
def test_bleu_is_at_most_1_and_0_for_an_empty_reply_among_others(texts: list[str], n: int) -> None:
    assert all(0 <= bleu(a, b, n) <= 1 for a in texts for b in texts)
    assert bleu("", "a text", n) == bleu("a text", "", n) == 0


@given(st.lists(st.text("abc ", min_size=1, max_size=14).filter(str.strip), min_size=2, max_size=6), st.integers(1, 4))
def test_self_bleu_of_zhu_is_sacrebleu_with_all_others_as_references(texts: list[str], n: int) -> None:
    scores = [bleu_metric(n, "13a").sentence_score(a, texts[:i] + texts[i + 1 :]).score for i, a in enumerate(texts)]
    assert self_bleu_all(texts, n) == pytest.approx(np.mean(scores) / 100)


def test_self_bleu_of_zhu_counts_an_empty_reply_as_equal_to_another_only() -> None:
    assert self_bleu_all(["", "", "a b"], 4) == pytest.approx(2 / 3)
    assert self_bleu_all(["", "a b", "a b"], 4) == pytest.approx(2 / 3)
    assert math.isnan(self_bleu_all(["a"], 4))


@pytest.mark.parametrize(
    ("text", "tokenizer"),
    [
        ("The cat sat on the mat.", "13a"),
        ("", "13a"),
        ("Übergrößenträger fahren gern Rad.", "13a"),
        ("고양이가 매트 위에 앉았다.", "13a"),  # Korean has spaces
        ("The word 猫 means cat, and that is all that I know about it.", "13a"),
        ("今天天气很好，我们去公园吧。", "zh"),
        ("我们用 PyTorch 训练语言模型 with Megatron", "zh"),
        ("今日は天気がいいので、公園に行きましょう。", "char"),
        ("วันนี้อากาศดีมาก", "char"),
    ],
)
def test_the_tokenizer_is_selected_by_the_script(text: str, tokenizer: str) -> None:
    assert choose_tokenizer([text]) == tokenizer


def test_text_without_spaces_is_compared_by_its_tokens() -> None:
    replies = ["今天天气很好，我们去公园吧。", "今天天气很好，我们去学校吧。"]  # 12 of 14 characters in common
    assert bleu(*replies, 1, "13a") == 0  # each is one word or two
    assert bleu(*replies, 1) == bleu(*replies, 1, "zh")
    assert 0 < self_bleu(replies, 4, pairs=8, seed=0) < 1
    assert bleu(*replies, 1, "zh") == pytest.approx(12 / 14)
    assert self_bleu_all(replies, 4, "zh") == pytest.approx(bleu(*replies, 4, "zh"))
    assert distinct_n(replies, 2, "zh") == (13 + 3) / 26
    assert distinct_n(["a b c"], 2, "13a") == distinct_n(["a b c"], 2, "intl") == 1


def test_a_tokenizer_that_is_not_installed_is_refused() -> None:
    try:
        import MeCab  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"--bleu-tokenize ja-mecab needs sacrebleu\[ja\]"):
            bleu("今日", "今日", 1, "ja-mecab")
    else:
        assert bleu("今日は雨", "今日は雪", 1, "ja-mecab") == pytest.approx(2 / 3)


def test_capped_pairs_are_drawn_by_seed() -> None:
    texts = [f"{a} {b} {a} end" for a in "abcd" for b in "wxyz"]
    drawn = [self_bleu(texts, 1, pairs=10, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_cross_style_bleu_compares_personas_and_never_one_with_itself() -> None:
    same_within = {"x": ["one two three"] * 3, "y": ["four five six"] * 3}
    same_across = {"x": ["one two three", "four five six"], "y": ["one two three", "four five six"], "z": []}
    apart = cross_style_bleu(same_within, 1, pairs=8, seed=0)
    assert apart < 0.3  # sacrebleu smooths a match of nothing to a little above 0
    assert cross_style_bleu({**same_within, "y": same_within["x"]}, 1, pairs=8, seed=0) == pytest.approx(1)
    assert cross_style_bleu(same_across, 1, pairs=200, seed=0) == pytest.approx((1 + apart) / 2, abs=0.1)
    assert math.isnan(cross_style_bleu({"x": ["one"]}, 1, pairs=8, seed=0))


def test_cross_style_bleu_is_the_mean_over_ordered_pairs_of_personas() -> None:
    """One reply each and as many comparisons as ordered pairs: every pair is taken once, in both directions."""
    replies = {"x": "the cat sat", "y": "the cat sat on the mat", "z": "a dog"}
    for n in (1, 2, 3, 4):
        pairs = [bleu(replies[a], replies[b], n) for a in replies for b in replies if a != b]
        found = cross_style_bleu({name: [text] for name, text in replies.items()}, n, pairs=6, seed=3)
        assert found == pytest.approx(np.mean(pairs))
