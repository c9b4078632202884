"""Units of a reply: each token is in the sentence, and in the statements, where its first byte lies."""

from itertools import groupby

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_sfr.data.segments.segmenters import TokenUnits, Units, sentences_as_units, statements_as_units
from megatron_sfr.data.segments.sentences import sentence_starts
from megatron_sfr.data.segments.statements import statements
from megatron_sfr.data.segments.token_text import TokenText


@st.composite
def divided(draw) -> TokenText:
    """Sentences and lines, some of them of one letter, divided into tokens anyhow: a token may hold several."""
    text = draw(st.text("aB.?。 \n}@", min_size=1, max_size=40))
    inner = draw(st.sets(st.integers(1, len(text)), max_size=20)) - {len(text)}
    return TokenText(text, np.array([0, *sorted(inner), len(text)]))


@given(divided())
def test_a_token_is_in_the_sentence_where_it_begins(text: TokenText):
    starts = np.array(sentence_starts(text.text))
    N = len(text.begins) - 1
    sentence = {token: int((starts <= text.begins[token]).sum()) for token in range(N)}
    groups = [list(tokens) for _, tokens in groupby(range(N), key=sentence.__getitem__)]

    units = sentences_as_units(text)
    assert units.starts.tolist() == [tokens[0] for tokens in groups]
    assert units.ends.tolist() == [tokens[-1] + 1 for tokens in groups]


def tokens(*texts: str) -> TokenText:
    return TokenText("".join(texts), np.cumsum([0, *map(len, texts)]))


@example(tokens("x\na\n ", "b\n c"))  # both a and what it holds start in the first token, and so at the second
@example(tokens("x\na\n b\n", "}\n"))  # b lies within the first token, a ends in the second
@given(divided())
def test_a_token_is_in_the_statements_where_it_begins(text: TokenText):
    N = len(text.begins) - 1
    expected = {}
    for start, end in zip(*statements(text.text), strict=True):
        inside = [token for token in range(N) if start <= text.begins[token] < end]
        if inside:
            expected[inside[0]] = inside[-1] + 1  # of two that begin with one token, the later

    units = statements_as_units(text)
    assert dict(zip(units.starts.tolist(), units.ends.tolist(), strict=True)) == expected
    assert units.starts.tolist() == sorted(expected)


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 40), st.integers(1, 40))
def test_tokens_are_units_of_one_token(N: int, stride: int, offset: int, length: int):
    anchors = np.arange(0, N, stride)
    expected = Units(np.arange(N), np.arange(1, N + 1), N).ahead(anchors, offset, length)
    for x, y in zip(TokenUnits(N).ahead(anchors, offset, length), expected, strict=True):
        assert x.tolist() == y.tolist()
