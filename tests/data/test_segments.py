"""Anchors and segments: where they stand, and that a target is a function of its own reply's future only (P8)."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sfr.data.segments import DistinctTexts, future_segments, segment_text
from megatron_sfr.data.template import load_tokenizer


@st.composite
def replies(draw) -> tuple[int, tuple[tuple[int, int], ...]]:
    """The length of a conversation and the replies in it, each after at least one prompt token."""
    spans, at = [], 0
    for gap, length in draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=4)):
        spans.append((at + gap, at + gap + length))
        at += gap + length
    return at + draw(st.integers(0, 3)), tuple(spans)


CUTS = st.tuples(st.integers(1, 9), st.integers(1, 20), st.integers(1, 20)).map(
    lambda cut: {"stride": cut[0], "segment_length": max(cut[1:]), "min_segment_length": min(cut[1:])}
)


@settings(deadline=None)
@given(replies(), CUTS)
def test_anchors_stand_at_every_stride_that_has_enough_future(conversation, cut):
    _, spans = conversation

    segments = list(future_segments(spans, **cut))

    expected = [
        (start + j - 1, min(start + j + cut["segment_length"], end), response, j, end - start)
        for response, (start, end) in enumerate(spans)
        for j in range(end - start)
        if j % cut["stride"] == 0 and end - start - j >= cut["min_segment_length"]
    ]
    assert [(s.position, s.end, s.response, s.ordinal, s.length) for s in segments] == expected


def test_the_first_anchor_conditions_on_nothing_of_the_reply():
    (first, second) = future_segments([(4, 10)], stride=3, segment_length=4, min_segment_length=2)

    assert (first.position, first.end, first.ordinal) == (3, 8, 0)
    assert (second.position, second.end, second.ordinal) == (6, 10, 3)


def test_a_target_changes_with_its_own_future_only(tokenizer_folder):
    tokenizer = load_tokenizer(str(tokenizer_folder))

    @settings(max_examples=50, deadline=None)
    @given(replies(), CUTS, st.randoms(use_true_random=False))
    def check(conversation, cut, random):
        length, spans = conversation
        tokens = np.array([random.randrange(4, len(tokenizer)) for _ in range(length)], np.int32)
        for segment in future_segments(spans, **cut):
            text = segment_text(tokens, segment, tokenizer)
            other = tokens.copy()
            outside = np.r_[: segment.position + 1, segment.end : length]
            other[outside] = [random.randrange(len(tokenizer)) for _ in outside]
            assert segment_text(other, segment, tokenizer) == text
            start, end = spans[segment.response]
            assert start <= segment.position + 1 < segment.end <= end

    check()


def test_the_text_is_what_the_reader_sees(tokenizer_folder):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    ids = tokenizer("x<|im_start|>it 's  the sea , don't<|im_end|>", add_special_tokens=False)["input_ids"]
    (segment,) = future_segments([(1, len(ids))], stride=99, segment_length=99, min_segment_length=1)

    assert segment_text(np.array(ids), segment, tokenizer) == "it 's  the sea , don't"


def test_texts_are_numbered_by_content():
    texts = DistinctTexts()

    assert [texts.row(text) for text in ("a", "b", "a", "", "ab")] == [
        (0, True),
        (1, True),
        (0, False),
        (2, True),
        (3, True),
    ]
    assert len(texts) == 4
