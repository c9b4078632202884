"""The text of tokens: exactly what the tokenizer decodes, in any script, however it is divided among slices."""

import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from megatron_sfr.data.chat.loss_mask import RecordError
from megatron_sfr.data.segments.token_text import token_bytes, token_text
from tests.data.segments.tokenizers_made import EOS, KINDS, LINES, ids_of, tokenizer_of

EXACT = ("byte_level", "byte_fallback", "unigram")  # these lose nothing, but for blanks at the start
SCRIPTS = st.text(max_size=60) | st.lists(st.sampled_from([*LINES, EOS, " ", "\n", "\u0301", "👧", "蓝"])).map("".join)


def all_scripts(test):
    for line in [*LINES, f"{LINES[3]}{EOS} {LINES[1]}", " 蓝", "\ufffd蓝\ufffd"]:
        test = example(line)(test)
    return test


@pytest.mark.parametrize("kind", KINDS)
def test_slices_that_tile_the_tokens_tile_the_text_that_is_decoded(kind: str):
    tokenizer = tokenizer_of(kind)

    @all_scripts
    @given(SCRIPTS)
    def check(typed: str):
        ids = ids_of(typed, kind) or ids_of("a", kind)
        text = token_text(np.array(ids), tokenizer)
        decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert text.text == decoded
        assert text.begins.tolist() == sorted(text.begins)
        assert len(text.begins) == len(ids) + 1
        assert "".join(text.between(i, i + 1) for i in range(len(ids))) == decoded
        if kind in EXACT:
            table = token_bytes(tokenizer)
            assert b"".join(table[id] for id in ids).lstrip(b" ") == decoded.lstrip(" ").encode()

    check()


@all_scripts
@example("<0xE4>")
@given(SCRIPTS)
def test_byte_level_tokens_spell_what_was_typed(typed: str):
    table = token_bytes(tokenizer_of("byte_level"))

    assert b"".join(table[id] for id in ids_of(typed, "byte_level")) == typed.replace(EOS, "").encode()


@pytest.mark.parametrize("kind", EXACT)
def test_a_character_belongs_to_the_token_of_its_first_byte(kind: str):
    tokenizer = tokenizer_of(kind)
    table = token_bytes(tokenizer)
    for line in LINES:
        ids = np.array(ids_of(line, kind))
        text = token_text(ids, tokenizer)
        at, begun = 0, []
        spelled = b"".join(table[id] for id in ids)
        blanks = len(spelled) - len(text.text.encode())
        for id in ids:
            begun.append(len([b for b in spelled[max(at, blanks) : at + len(table[id])] if b & 0xC0 != 0x80]))
            at += len(table[id])
        assert [len(text.between(i, i + 1)) for i in range(len(ids))] == begun
    assert 0 in begun or kind != "byte_level", "é lies in two tokens: nothing was split"


def test_a_token_named_like_a_byte_is_a_byte_only_for_the_byte_fallback_decoder():
    spelled = PreTrainedTokenizerFast(tokenizer_object=KINDS["byte_level"]())
    spelled.add_tokens(["<0x41>"])
    for tokenizer, expected in ((tokenizer_of("byte_fallback"), b"A"), (spelled, b"<0x41>")):
        assert token_bytes(tokenizer)[tokenizer.get_vocab()["<0x41>"]] == expected


def test_what_a_slice_decodes_to_by_itself_is_not_its_text():
    tokenizer = tokenizer_of("byte_level")
    ids = np.array(ids_of("a👧b", "byte_level"))
    text = token_text(ids, tokenizer)
    assert "\ufffd" in tokenizer.decode(ids[:2])
    assert [text.between(0, 2), text.between(2, len(ids))] == ["a👧", "b"]

    tokenizer = tokenizer_of("byte_fallback")
    ids = np.array(ids_of("The sea is", "byte_fallback"))
    text = token_text(ids, tokenizer)
    word = next(i for i in range(1, len(ids)) if text.between(i, i + 1).startswith(" "))
    assert tokenizer.decode(ids[word:]) == text.between(word, len(ids)).removeprefix(" ")


def test_an_emoji_of_several_is_cut_between_code_points_only():
    family = "👩‍👩‍👧‍👦"
    ids = np.array(ids_of(family, "byte_level"))
    text = token_text(ids, tokenizer_of("byte_level"))

    parts = [text.between(i, i + 1) for i in range(len(ids))]
    assert "".join(parts) == family
    assert len([part for part in parts if part]) > 1


@given(st.sampled_from(LINES), st.integers(0, 60), st.integers(1, 60), st.sampled_from(["byte_level", "byte_fallback"]))
def test_tokens_that_begin_or_end_inside_a_character_have_the_whole_ones(line: str, start: int, n: int, kind: str):
    tokenizer = tokenizer_of(kind)
    ids = np.array(ids_of(line, kind))[start:][:n]
    if len(ids) == 0:
        return
    data = b"".join(token_bytes(tokenizer)[id] for id in ids)
    text = token_text(ids, tokenizer)

    assert text.text.lstrip(" ") == data.decode(errors="ignore").lstrip(" ")
    assert "".join(text.between(i, i + 1) for i in range(len(ids))) == text.text
    assert "\ufffd" not in text.text


@pytest.mark.parametrize("kind", EXACT)
def test_the_first_token_at_or_after_a_character(kind: str):
    for line in LINES:
        ids = np.array(ids_of(line, kind))
        text = token_text(ids, tokenizer_of(kind))
        firsts = [sum(len(text.between(k, k + 1)) for k in range(i)) for i in range(len(ids))]
        bearing = [i for i in range(len(ids)) if text.between(i, i + 1)]
        for character in range(len(text.text)):
            holder = max(i for i in bearing if firsts[i] <= character)
            expected = holder if firsts[holder] == character else holder + 1
            assert text.tokens_at([character]).tolist() == [expected]
        assert text.tokens_at([len(text.text)]).tolist() == [len(ids)]


def words(vocabulary: str, decoder) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("vocabulary", "decoder", "error", "reason"),
    [
        ("abc", decoders.CTC(), RecordError, "decodes b'' where its tokens spell b'b', so segments have no exact text"),
        (
            "abc",
            decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "x")]),
            ValueError,
            "writes token 'b' over the one",
        ),
        ("!?蓝", decoders.Fuse(), ValueError, "has no token of Latin letters or digits"),
    ],
)
def test_a_tokenizer_without_exact_texts_is_refused(vocabulary: str, decoder, error, reason: str):
    with pytest.raises(error, match=re.escape(reason)):
        token_text(np.array([2, 1, 1]), words(vocabulary, decoder))
