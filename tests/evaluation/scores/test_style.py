"""The style classifier: it learns a style and not the answers, and its ceiling is cross-fitted."""

import math
import random

import numpy as np
import pytest

from megatron_sfr.evaluation.scores.style import Styled, StyleJudge

MANNERS = {"pirate": "arr {} ye scurvy dog", "butler": "very good sir {} if I may", "robot": "beep {} unit complete"}


def rows(manners: dict[str, str], prompts: int) -> list[Styled]:
    """Every prompt has an answer of its own words, said in every manner."""
    rng = random.Random(0)
    answers = [" ".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(prompts)]
    return [Styled(str(i), name, text.format(answers[i])) for i in range(prompts) for name, text in manners.items()]


def test_a_manner_is_heard_in_words_that_were_never_seen() -> None:
    judge = StyleJudge(rows(MANNERS, 20))
    assert judge.share("unknown prompt", "pirate", ["arr q r s ye scurvy dog", "very good sir t if I may"]) == 0.5
    assert judge.share("3", "butler", ["very good sir x y z if I may"]) == 1


def test_real_replies_are_judged_by_a_classifier_that_has_not_seen_their_prompt() -> None:
    """Personas that differ in nothing but the answer to each prompt cannot be told apart: chance is the ceiling."""
    rng = random.Random(1)
    noise = [Styled(str(i), name, " ".join(rng.choices("abcdefgh", k=8))) for i in range(60) for name in ("x", "y")]
    judge = StyleJudge(noise)
    assert np.mean([judge.share(row.shared, row.persona, [row.text]) for row in noise]) == pytest.approx(0.5, abs=0.15)
    real = rows(MANNERS, 20)
    judge = StyleJudge(real)
    assert np.mean([judge.share(row.shared, row.persona, [row.text]) for row in real]) == 1


def test_what_cannot_be_judged_has_no_value() -> None:
    judge = StyleJudge(rows(MANNERS, 3))
    assert math.isnan(judge.share("0", "pirate", []))
    assert math.isnan(judge.share("0", "ghost", ["boo"]))
    with pytest.raises(ValueError, match="two personas"):
        StyleJudge(rows({"pirate": MANNERS["pirate"]}, 5))
