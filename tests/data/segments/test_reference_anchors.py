"""Anchors of `prepare --preset reference` and the horizon `reply`: what their texts are, and where they stand."""

import argparse
from pathlib import Path

import numpy as np
import pytest

from megatron_sfr.cli.data import prepare as prepare_command
from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.document_source import DocumentOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.prepared.open import horizons_of
from megatron_sfr.data.segments.anchors import Cut, futures
from megatron_sfr.data.segments.reference_anchors import reference_futures
from megatron_sfr.data.segments.segmenters import WHOLE_REPLY
from tests.data.records import turns, write_records
from tests.data.segments.tokenizers_made import LINES, ids_of, tokenizer_of

REPLIES = ((2, 12), (15, 40))  # a stream of 35 tokens


def letters(n: int) -> tuple[np.ndarray, str]:
    """Tokens of the byte-level tokenizer, one a letter, and their text."""
    text = "".join(chr(ord("a") + i * i % 26) for i in range(n))
    vocabulary = tokenizer_of("byte_level").get_vocab()
    return np.array([vocabulary[letter] for letter in text], np.int32), text


def test_windows_start_after_the_token_that_was_read_and_run_into_the_next_reply() -> None:
    tokens, text = letters(42)
    stream = [*range(2, 12), *range(15, 40)]
    expected = [
        (stream[t], "".join(text[i] for i in stream[t + 1 : t + 1 + 8]), t)
        for t in range(0, 35, 4)
        if len(stream[t + 1 : t + 1 + 8]) >= 3
    ]
    cut = Cut(4, [(1, 8)], 3)
    found = list(reference_futures(tokens, REPLIES, tokenizer_of("byte_level"), cut))
    assert [(s.position, target, s.ordinal) for s, target in found] == expected
    assert expected[2] == (10, text[11] + text[15:22], 8), "this one is of both replies"
    assert {(s.response, s.length, s.horizon) for s, _ in found} == {(0, 35, 0)}


@pytest.mark.parametrize(("N", "anchors"), [(16, []), (17, [0]), (48, [0]), (49, [0, 32])])
def test_the_defaults_need_16_tokens_after_the_anchor(N: int, anchors: list[int]) -> None:
    tokens, _ = letters(N + 1)
    found = reference_futures(tokens, [(1, N + 1)], tokenizer_of("byte_level"), Cut(32, [(1, 256)], 16))
    assert [s.ordinal for s, _ in found] == anchors


def test_its_text_is_the_decoded_slice_with_torn_characters() -> None:
    tokens = np.array(ids_of(LINES[1], "byte_level"), np.int32)
    tokenizer = tokenizer_of("byte_level")
    texts = [text for _, text in reference_futures(tokens, [(0, len(tokens))], tokenizer, Cut(1, [(1, 3)], 1))]
    assert texts == [tokenizer.decode(tokens[t + 1 : t + 4]) for t in range(len(tokens) - 1)]
    assert any("\ufffd" in text for text in texts)


@pytest.mark.parametrize("segmenter", ["window", "sentence"])
def test_the_horizon_reply_is_the_complete_reply_at_each_anchor(segmenter: str) -> None:
    tokens, text = letters(42)
    cut = Cut(4, [WHOLE_REPLY], 99, segmenter)
    found = list(futures(tokens, REPLIES, tokenizer_of("byte_level"), cut))
    for response, (start, end) in enumerate(REPLIES):
        mine = [(s.position, s.ordinal, target) for s, target in found if s.response == response]
        assert mine == [(start + j - 1, j, text[start:end]) for j in range(0, end - start, 4)]
    stream = list(reference_futures(tokens, REPLIES, tokenizer_of("byte_level"), cut))
    assert [s.ordinal for s, _ in stream] == list(range(0, 35, 4))
    assert {target for _, target in stream} == {text[2:12] + text[15:40]}


def test_a_truncated_conversation_has_no_target_beyond_the_cut(tmp_path: Path, tokenizer_folder: Path) -> None:
    records = write_records(tmp_path / "records.jsonl", [{"messages": turns("sea", "the sea is blue " * 30)}])
    options = PrepareOptions(seq_length=40, stride=8, too_long="truncate", anchor_rule="reference")
    prepare([records], tmp_path / "data", tokenizer_folder, options, progress=False)
    data = PreparedData.open(tmp_path / "data")
    sample = data[0]
    assert len(sample.tokens) == 41
    assert sample.loss_mask[-2:].tolist() == [1, 0], "40 inputs, the last of which is supervised"
    N = int(sample.loss_mask.sum())
    assert set(sample.anchors.length.tolist()) == {N}
    kept = sample.tokens[:40][sample.loss_mask[:40] == 1]
    texts = [data.texts[int(record)] for record in sample.anchors.segment]
    decoded = [tokenizer_text(tokenizer_folder, kept[t + 1 :]) for t in sample.anchors.ordinal.tolist()]
    assert texts == decoded


def tokenizer_text(folder: Path, ids: np.ndarray) -> str:
    from megatron_sfr.data.chat.tokenizer import load_tokenizer

    text: str = load_tokenizer(str(folder)).decode(ids, skip_special_tokens=True)
    return text


def test_the_preset_is_kept_in_the_manifest_and_does_not_mix(tmp_path: Path, tokenizer_folder: Path) -> None:
    records = write_records(tmp_path / "records.jsonl", [{"messages": turns("sea", "the sea is blue " * 9)}])
    parser = argparse.ArgumentParser()
    prepare_command.add_arguments(parser)
    for name, more in (("theirs", ["--preset", "reference"]), ("ours", [])):
        typed = ["--input", str(records), "--tokenizer", str(tokenizer_folder), "--output", str(tmp_path / name), *more]
        prepare_command.run(parser.parse_args([*typed, "--workers", "1"]))
    rules = [PreparedData.open(tmp_path / name).manifest.anchor_rule for name in ("theirs", "ours")]
    assert rules == ["reference", "replies"]
    with pytest.raises(ValueError, match="prepare all folders of a run with the same options"):
        horizons_of([tmp_path / "theirs", tmp_path / "ours"])


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="the reference preset counts tokens"):
        PrepareOptions(anchor_rule="reference", segmenter="sentence")
    with pytest.raises(ValueError, match="horizon reply is for conversations"):
        DocumentOptions(horizons=(WHOLE_REPLY,))
