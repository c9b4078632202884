"""What the page reads: a fixed number of replies, however many there are."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_sfr.evaluation.compare.curves import Curve, Scorer
from megatron_sfr.evaluation.compare.questions import Answered, EvaluationOptions
from megatron_sfr.evaluation.compare.report_html import explore
from megatron_sfr.evaluation.generate.prompts import Asked, ask
from megatron_sfr.evaluation.generate.sampling import SamplingOptions
from megatron_sfr.evaluation.page.reply_explorer import PERSONAS, PROMPTS


class Counted(Sequence[Sequence[str]]):
    """One reply to each entry, which records the entries that are read."""

    def __init__(self, entries: int) -> None:
        self.entries, self.read = entries, list[int]()

    def __len__(self) -> int:
        return self.entries

    def __getitem__(self, i: Any) -> Any:
        self.read.append(i)
        return [f"reply {i}"]


def test_only_the_replies_on_the_page_are_read() -> None:
    asked = [Asked(ask(f"Why {p}?", f"persona {k}")) for p in range(200) for k in range(PERSONAS + 3)]
    scorer = Scorer(asked, {}, EvaluationOptions(SamplingOptions()), None)
    replies = Counted(len(asked))
    answered = Answered("a", (0.5,), [replies])
    curve = Curve("a", (0.5,), {"empty": np.zeros((1, 200))}, {}, {})
    found = explore(scorer, [answered], [curve], [0.5])
    assert len(replies.read) == PROMPTS * PERSONAS
    assert [len(shown) for _, shown in found.prompts] == [PERSONAS] * PROMPTS
    assert {question for question, _ in found.prompts} <= {f"Why {p}?" for p in range(200)}
    assert found.prompts[1][1][0].text == f"reply {replies.read[PERSONAS]}"
    assert f"{PROMPTS} of 200 prompts" in found.about
