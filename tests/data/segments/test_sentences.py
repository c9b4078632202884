"""Sentences in the scripts of the world, as models write them; and that pieces of a text tile it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.data.segments.sentences import sentence_starts

TEXTS = {
    "stops and blanks": ["The sea is blue.", " Is it?", "  Yes!", " Really?!", " No..."],
    "quotes and brackets": ['He said "Yes."', " (It is.)", " 'So?'", " “Good.”", " Then he left."],
    "full stops inside": ["It is 3.14 m, e.g. here, i.e. in U.S. waters etc. and so on."],
    "people": ["Mr. Bach and Dr. J. S. Bach left.", " They (cf. Fig. 3, p. 4) went."],
    "list": ["Two things:\n", "1. First.", " Second.\n", "2.1. Third\n", "  a. Fourth.\n\n", "- Fifth\r\n", "- Sixth"],
    "markdown": ["**Bold.**", " _So._", " Call `f.`", " Then `g.h` is.\n\n", "# Title\n", "Text"],
    "blank lines": ["\n\n  First\n \n\n", "  Second\u2028", "Third \n"],
    "Chinese": ["海是蓝色的。", "天是灰的！", "“真的？”", "「是的。」", "他说：“好。”", "走了……好。"],
    "Japanese": ["海は青い。", "本当？！", "（そう。）"],
    "Hindi": ["यह किताब है।", " वह कलम है॥", " क्षि।"],
    "Arabic": ["السماء زرقاء.", " هل أنت هنا؟", " نعم."],
    "Hebrew": ["השמיים כחולים.", " באמת?", " כן."],
    "Thai": ["ทะเลสีฟ้า ท้องฟ้าสีเทา\n", "ใช่"],
    "German": ["Er sagte: „Ja.“", " Dann ging er."],
    "combining marks": ["Oui e\u0301.\u0301", " Non\u200d."],
    "emoji": ["Yes!", " 👩‍👩‍👧‍👦 Good.", " 👍🏽 Fine."],
    "blank": [" \n "],
    "nothing": [""],
}


def sentences(text: str) -> list[str]:
    starts = sentence_starts(text)
    return [text[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]


@pytest.mark.parametrize("expected", TEXTS.values(), ids=TEXTS)
def test_where_sentences_start(expected: list[str]):
    assert sentences("".join(expected)) == expected


@given(st.text('aB1.!?。। \n\r")“(*,\u0301\u200d不।', max_size=40))
def test_sentences_are_not_blank_and_ascend(text: str):
    starts = sentence_starts(text)

    assert starts == sorted(set(starts))
    assert starts[0] == 0
    if text.strip():
        assert all(sentence.strip() for sentence in sentences(text))


@pytest.mark.parametrize("text", [". ", ".", " ", "\n ", ".)", ". 1", "“", ".“", "a.a", "1.", "*"])
def test_a_long_text_takes_no_longer_than_its_length(text: str):
    sentence_starts(text * 100_000)  # for hours, were it quadratic
