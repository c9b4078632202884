"""Anchors and segments: where they stand, and that a target is a function of its own reply's future only (P8)."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sfr.data.segments import DistinctTexts, future_segments, segment_text, text_digest
from megatron_sfr.data.template import load_tokenizer


@st.composite
def replies(draw) -> tuple[int, tuple[tuple[int, int], ...]]:
    """The length of a conversation and the replies in it, each after at least one prompt token."""
    spans, at = [], 0
    for gap, length in draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=4)):
        spans.append((at + gap, at + gap + length))
        at += gap + length
    return at + draw(st.integers(0, 3)), tuple(spans)


HORIZONS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=4, unique=True)
CUTS = st.fixed_dictionaries(
    {"stride": st.integers(1, 9), "horizons": HORIZONS, "min_segment_length": st.integers(1, 20)}
)


@settings(deadline=None)
@given(replies(), CUTS)
def test_anchors_stand_at_every_stride_that_has_enough_future(conversation, cut):
    length, spans = conversation
    tokens = list(range(length))

    segments = list(future_segments(spans, **cut))

    expected = []
    for response, (start, end) in enumerate(spans):
        y = tokens[start:end]
        for j in range(0, len(y), cut["stride"]):
            for horizon, (o, L) in enumerate(cut["horizons"]):
                future = y[j + o - 1 :][:L]
                if len(future) == L or len(future) >= cut["min_segment_length"]:
                    expected.append((start + j - 1, future, response, j, len(y), horizon))
    found = [(s.position, tokens[s.start : s.end], s.response, s.ordinal, s.length, s.horizon) for s in segments]
    assert found == expected
    assert [(s.position, s.horizon) for s in segments] == sorted((s.position, s.horizon) for s in segments)


@given(replies(), st.integers(1, 9), st.integers(1, 20), st.integers(1, 20))
def test_one_horizon_of_offset_1_has_what_follows_the_position(conversation, stride, length, least):
    _, spans = conversation
    cut = {"stride": stride, "horizons": [(1, max(length, least))], "min_segment_length": min(length, least)}

    for segment in future_segments(spans, **cut):
        end = spans[segment.response][1]
        assert segment.start == segment.position + 1
        assert segment.end == min(segment.start + max(length, least), end)
        assert end - segment.start >= min(length, least)


def test_the_first_anchor_conditions_on_nothing_of_the_reply():
    (first, second) = future_segments([(4, 10)], stride=3, horizons=[(1, 4)], min_segment_length=2)

    assert (first.position, first.start, first.end, first.ordinal) == (3, 4, 8, 0)
    assert (second.position, second.start, second.end, second.ordinal) == (6, 7, 10, 3)


def test_P8_a_target_changes_with_its_own_future_only(tokenizer_folder):
    tokenizer = load_tokenizer(str(tokenizer_folder))

    @settings(max_examples=50, deadline=None)
    @given(replies(), CUTS, st.randoms(use_true_random=False))
    def check(conversation, cut, random):
        length, spans = conversation
        tokens = np.array([random.randrange(4, len(tokenizer)) for _ in range(length)], np.int32)
        for segment in future_segments(spans, **cut):
            text = segment_text(tokens, segment, tokenizer)
            other = tokens.copy()
            outside = np.r_[: segment.start, segment.end : length]
            other[outside] = [random.randrange(len(tokenizer)) for _ in outside]
            assert segment_text(other, segment, tokenizer) == text
            start, end = spans[segment.response]
            assert segment.position < segment.start < segment.end <= end
            assert start <= segment.position + 1

    check()


def test_the_text_is_what_the_reader_sees(tokenizer_folder):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    ids = tokenizer("x<|im_start|>it 's  the sea , don't<|im_end|>", add_special_tokens=False)["input_ids"]
    (segment,) = future_segments([(1, len(ids))], stride=99, horizons=[(1, 99)], min_segment_length=1)

    assert segment_text(np.array(ids), segment, tokenizer) == "it 's  the sea , don't"


def test_texts_are_numbered_by_content():
    texts = DistinctTexts()

    assert [texts.row(text_digest(text)) for text in ("a", "b", "a", "", "ab")] == [
        (0, True),
        (1, True),
        (0, False),
        (2, True),
        (3, True),
    ]
    assert len(texts) == 4
