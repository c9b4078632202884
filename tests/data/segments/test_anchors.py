"""Anchors and segments: their positions, and that a target depends only on the future of its own reply (P8)."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.data.segments.anchors import Cut, DistinctTexts, Segment, futures, text_digest
from megatron_sfr.data.segments.segmenters import Segmenter
from megatron_sfr.data.segments.token_text import token_text
from tests.data.segments.tokenizers_made import LINES, ids_of, tokenizer_of


@st.composite
def replies(draw) -> tuple[int, tuple[tuple[int, int], ...]]:
    """The length of a conversation and the replies in it, each after at least one prompt token."""
    spans, at = [], 0
    for gap, length in draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=4)):
        spans.append((at + gap, at + gap + length))
        at += gap + length
    return at + draw(st.integers(0, 3)), tuple(spans)


HORIZONS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=4, unique=True)
CUTS = st.builds(Cut, st.integers(1, 9), HORIZONS, st.integers(1, 20))
LETTERS = "".join(chr(letter) for letter in range(0x61, 0x61 + 26))


def letters(n: int) -> tuple[np.ndarray, str]:
    """Tokens of the byte-level tokenizer, one a letter, and their text."""
    text = "".join(LETTERS[i * i % 26] for i in range(n))
    vocabulary = tokenizer_of("byte_level").get_vocab()
    return np.array([vocabulary[letter] for letter in text], np.int32), text


@given(replies(), CUTS)
def test_anchors_stand_at_every_stride_that_has_enough_future(conversation, cut):
    length, turns = conversation
    tokens, text = letters(length)

    expected = []
    for response, (start, end) in enumerate(turns):
        y = text[start:end]
        for j in range(0, len(y), cut.stride):
            for horizon, (o, L) in enumerate(cut.horizons):
                future = y[j + o - 1 :][:L]
                if len(future) == L or len(future) >= cut.min_segment_length:
                    expected.append((start + j - 1, future, response, j, len(y), horizon))
    segments = list(futures(tokens, turns, tokenizer_of("byte_level"), cut))
    found = [(s.position, text, s.response, s.ordinal, s.length, s.horizon) for s, text in segments]
    assert found == expected
    assert [text[s.start : s.end] for s, _ in segments] == [future for _, future in segments]


@given(st.sampled_from(LINES), CUTS)
def test_a_window_is_what_its_tokens_decode_to_where_that_is_exact(line, cut):
    tokens, tokenizer = np.array(ids_of(line, "byte_level"), np.int32), tokenizer_of("byte_level")
    for segment, text in futures(tokens, [(0, len(tokens))], tokenizer, cut):
        decoded = tokenizer.decode(tokens[segment.start : segment.end])
        assert text == decoded or "\ufffd" in decoded


def test_a_target_of_blanks_is_dropped():
    tokens = np.array([tokenizer_of("byte_level").get_vocab()[letter] for letter in "aĠĠĊa"], np.int32)

    assert [s.ordinal for s in segments_of(tokens, Cut(1, [(1, 1)], 1), [(0, 5)])] == [0, 4]
    assert [s.ordinal for s in segments_of(tokens, Cut(1, [(1, 2)], 1), [(0, 5)])] == [0, 3, 4]


def test_the_first_anchor_conditions_on_nothing_of_the_reply():
    (first, second) = segments_of(letters(10)[0], Cut(3, [(1, 4)], 2), [(4, 10)])

    assert (first.position, first.start, first.end, first.ordinal) == (3, 4, 8, 0)
    assert (second.position, second.start, second.end, second.ordinal) == (6, 7, 10, 3)


@pytest.mark.parametrize("segmenter", get_args(Segmenter))
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "unigram"])
def test_P8_a_target_changes_with_its_own_future_only(kind: str, segmenter: Segmenter):
    """With what is before it, and with other turns, nothing changes; and it is the text of its own tokens."""
    pool = np.array(ids_of(" ".join(LINES) * 3, kind), np.int32)

    @settings(max_examples=40)
    @given(replies(), CUTS, st.integers(0, 40), st.randoms(use_true_random=False))
    def check(conversation, cut, at, random):
        cut = replace(cut, segmenter=segmenter)
        length, turns = conversation
        tokens = pool[at : at + length]
        for start, end in turns:
            others = np.array([random.randrange(len(tokenizer_of(kind))) for _ in range(length)], np.int32)
            others[start:end] = tokens[start:end]
            alone = list(futures(tokens, [(start, end)], tokenizer_of(kind), cut))
            assert list(futures(others, [(start, end)], tokenizer_of(kind), cut)) == alone
            whole = token_text(tokens[start:end], tokenizer_of(kind))
            for segment, text in alone:
                assert start <= segment.position + 1 <= segment.start < segment.end <= end
                assert text == whole.between(segment.start - start, segment.end - start)

    check()


TEXT = "It is. The sea\nis grey! “So?”\n\nYes. 海是蓝色的。天空是灰色的！ end"
SENTENCES = ["It is.", " The sea\n", "is grey!", " “So?”\n\n", "Yes.", " 海是蓝色的。", "天空是灰色的！", " end"]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "unigram"])
@pytest.mark.parametrize(("offset", "length"), [(1, 1), (1, 3), (2, 1), (3, 2), (1, 99), (9, 1), (10**9, 1)])
def test_targets_are_the_sentences_that_start_at_or_after_the_token_to_predict(kind: str, offset: int, length: int):
    tokens = np.array(ids_of(TEXT, kind), np.int32)
    text = token_text(tokens, tokenizer_of(kind))
    assert text.text == TEXT
    starts = np.cumsum([0, *map(len, SENTENCES)])[:-1]
    assert all(text.begins[text.tokens_at([start])[0]] == start for start in starts), "no token straddles here"

    expected = []
    for j in range(len(tokens)):
        first = int((text.tokens_at(starts) < j).sum()) + offset - 1
        there = SENTENCES[first : first + length]
        if there:
            expected.append((j, "".join(there)))
    found = futures(tokens, [(0, len(tokens))], tokenizer_of(kind), Cut(1, [(offset, length)], 1, "sentence"))
    assert [(segment.ordinal, text) for segment, text in found] == expected


def test_a_token_that_straddles_a_boundary_belongs_to_the_sentence_of_its_first_byte():
    tokenizer = tokenizer_of("byte_level")
    vocabulary = tokenizer.get_vocab()
    joined = Tokenizer(models.BPE({**vocabulary, "eĊ": len(vocabulary), "eĊb": len(vocabulary) + 1}, []))
    joined.decoder = tokenizer.backend_tokenizer.decoder
    tokens = np.array([*ids_of("th", "byte_level"), len(vocabulary) + 1, *ids_of("lue\nsky", "byte_level")])
    cut = Cut(1, [(1, 1)], 1, "sentence")

    found = futures(tokens, [(0, len(tokens))], PreTrainedTokenizerFast(tokenizer_object=joined), cut)
    texts = {segment.ordinal: text for segment, text in found}
    straddling = int(np.flatnonzero(tokens == len(vocabulary) + 1)[0])
    assert (texts[0], texts[straddling], texts[straddling + 1]) == ("the\nb", "lue\n", "lue\n")


def test_a_horizon_of_statements_follows_what_ends_before_the_next():
    branch, end = "    if x:\n        y\n", "    return 1\n\n"
    whole = "def f(x):\n" + branch + end
    code = whole + "f(2)\ng\n"
    tokens = np.array(ids_of(code, "byte_level"), np.int32)
    spelled = token_text(tokens, tokenizer_of("byte_level"))
    cut = Cut(1, [(1, 1), (2, 1), (1, 2)], 1, "statement")

    targets: dict[int, list[str]] = {}
    for segment, target in futures(tokens, [(0, len(tokens))], tokenizer_of("byte_level"), cut):
        targets.setdefault(segment.ordinal, []).append(target)
    assert targets[0] == [whole, "f(2)\n", whole + "f(2)\n"]
    head, last = spelled.tokens_at([code.index("(x)"), code.index("g\n")])
    assert targets[int(head)] == [branch, end, branch + end]
    assert targets[int(last)] == ["g\n", "g\n"], "(2, 1) has no statement"


def test_what_the_end_cuts_short_needs_its_tokens():
    tokens = np.array(ids_of("It is. So. No.", "byte_level"), np.int32)

    def ordinals(least: int) -> list[tuple[int, int]]:
        cut = Cut(1, [(1, 1), (1, 2)], least, "sentence")
        return [(s.ordinal, s.horizon) for s in segments_of(tokens, cut, [(0, len(tokens))])]

    last = int(token_text(tokens, tokenizer_of("byte_level")).tokens_at([10])[0])
    assert (last, 0) in ordinals(99), "one sentence is there, whole"
    assert (last, 1) not in ordinals(len(tokens) - last + 1), "of two there is one"
    assert (last, 1) in ordinals(len(tokens) - last)


@pytest.mark.parametrize("segmenter", get_args(Segmenter))
def test_a_long_document_takes_no_longer_than_its_length(segmenter: Segmenter):
    line = np.array(ids_of("The sea is blue. Is it?\n  Yes (it is).\n", "byte_level"), np.int32)
    tokens = np.tile(line, 200_000 // len(line))

    found = 0
    for segment, text in futures(
        tokens, [(1, len(tokens))], tokenizer_of("byte_level"), Cut(32, [(1, 9)], 1, segmenter)
    ):
        found += 1
        assert 0 <= segment.position < segment.start < segment.end <= len(tokens)
        assert len(text) < 9 * 40
    assert found >= len(tokens) // 32 - 1


def segments_of(tokens: np.ndarray, cut: Cut, turns: list[tuple[int, int]]) -> list[Segment]:
    return [segment for segment, _ in futures(tokens, turns, tokenizer_of("byte_level"), cut)]


def test_the_text_is_what_the_reader_sees(tokenizer_folder):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    ids = tokenizer("x<|im_start|>it 's  the sea , don't<|im_end|>", add_special_tokens=False)["input_ids"]
    ((_, text),) = futures(np.array(ids), [(1, len(ids))], tokenizer, Cut(99, [(1, 99)], 1))

    assert text == "it 's  the sea , don't"


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


def test_an_empty_thought_is_part_of_no_target():
    ids = ids_of("<think>\n\n</think>\n\nthe sea is blue and grey", "byte_level")
    bare = ids_of("the sea is blue and grey", "byte_level")
    skipped = len(ids) - len(bare)
    tokens = np.array([0, 0, *ids], np.int32)
    cut = Cut(4, ((1, 6), (3, 4)), 1)

    found = list(futures(tokens, [(2, len(tokens))], tokenizer_of("byte_level"), cut))

    expected = list(futures(np.array([0, 0, *bare], np.int32), [(2, 2 + len(bare))], tokenizer_of("byte_level"), cut))
    assert [text for _, text in found] == [text for _, text in expected]
    assert [(s.position, s.ordinal) for s, _ in found] == [
        (s.position + skipped, s.ordinal + skipped) for s, _ in expected
    ]
    assert {s.length for s, _ in found} == {len(ids)}
    only = np.array([0, 0, *ids_of("<think>\n\n</think>\n\n", "byte_level")], np.int32)
    assert list(futures(only, [(2, len(only))], tokenizer_of("byte_level"), cut)) == []
