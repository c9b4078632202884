"""Requests become sequences with free positions, in batches of equal length, and results end at the end token."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_sfr.kl_flow.flow_generate import record
from megatron_sfr.kl_flow.sampling.requests import (
    KEYS,
    Gap,
    Request,
    SampleSpec,
    batches,
    blank,
    canvas,
    infill,
    read_gaps,
    reply,
    whole_batches,
)
from megatron_sfr.kl_flow.sampling.sampler_options import SamplerOptions
from tests.data.segments.tokenizers_made import tokenizer_of


def test_a_reply_ends_before_the_end_token_and_is_padded_after_the_longest() -> None:
    request = reply([7, 8], 9, longest=4, end=3, key=5, told={})
    assert request.tokens == (7, 8, *(3,) * 7)
    area = canvas([SampleSpec(request, 0)], torch.device("cpu"))
    assert area.free_BS.tolist() == [[False] * 2 + [True] * 4 + [False] * 3]
    assert request.found([7, 8, 1, 2, 3, 3, 3, 3, 3]) == ([1, 2], True)
    assert request.found([7, 8, 1, 2, 2, 1, 3, 3, 3]) == ([1, 2, 2, 1], False)
    assert canvas([SampleSpec(reply([7], 9, None, 3, 5, {}), 0)], torch.device("cpu")).free_BS.sum() == 8


def gap(prefix: list[int], length: int, suffix: list[int]) -> Request:
    return infill([prefix, Gap(0, length), suffix], {})


def test_an_infill_is_between_its_texts_and_keeps_end_tokens() -> None:
    request = gap([1, 2], 3, [4])
    area = canvas([SampleSpec(request, 0)], torch.device("cpu"))
    assert area.free_BS.tolist() == [[False] * 2 + [True] * 3 + [False]]
    assert request.found([1, 2, 9, 0, 9, 4]) == ([9, 0, 9], True)


def test_several_gaps_and_gaps_of_unknown_length(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte_level")
    end, ids = tokenizer.eos_token_id, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    path = tmp_path / "gaps.jsonl"
    path.write_text(json.dumps({"parts": ["ab", 2, "c", {"at_most": 3}]}) + "\n", encoding="utf-8")
    (request,) = read_gaps(path, tokenizer, 9)
    first = len(ids("ab"))
    second = first + 2 + len(ids("c"))
    assert request.gaps == (Gap(first, first + 2), Gap(second, second + 3, end))
    free = canvas([SampleSpec(request, 0)], torch.device("cpu")).free_BS[0].nonzero()[:, 0].tolist()
    assert free == [first, first + 1, second, second + 1, second + 2]
    x, y, z = (ids(letter)[0] for letter in "xyz")
    tokens = [*ids("ab"), x, end, *ids("c"), y, end, z]
    assert request.found(tokens) == ([x, end, y], True), "an end token ends the second gap alone"
    assert request.found([*tokens[:-2], z, z]) == ([x, end, y, z, z], False)
    made = Namespace(tokenizer=tokenizer, options=SamplerOptions())
    row = record(SampleSpec(request, 0), tokens, 4, made)
    assert (row["text"], row["gaps"], row["finished"]) == ("abxcy", ["x", "y"], True)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (["only text"], "a list of texts and gaps"),
        ("text", "a list of texts and gaps"),
        (["a", 0], "a gap is its number of tokens"),
        (["a", {"at_most": True}], "a gap is its number of tokens"),
        (["a", {"length": 3}], "a gap is its number of tokens"),
        (["a", 99], "the model has 9 positions"),
        (["a\ud800", 2], "a text has half of a surrogate pair"),
    ],
)
def test_bad_parts_are_named(tmp_path: Path, parts: object, reason: str) -> None:
    path = tmp_path / "gaps.jsonl"
    path.write_text(json.dumps({"parts": parts}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"gaps.jsonl:1: .*{reason}"):
        read_gaps(path, tokenizer_of("byte_level"), 9)


def test_prefix_and_suffix_are_parts(tmp_path: Path) -> None:
    tokenizer, path = tokenizer_of("byte_level"), tmp_path / "gaps.jsonl"
    rows = {"prefix": "ab", "suffix": "c", "length": 2}, {"parts": ["ab", 2, "c"]}, {"suffix": "c", "length": 1}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pair, parts, suffix = read_gaps(path, tokenizer, 9)
    assert (pair.tokens, pair.gaps, pair.key) == (parts.tokens, parts.gaps, parts.key), "the same samples"
    assert (pair.told, suffix.told) == ({"prefix": "ab", "suffix": "c"}, {"prefix": "", "suffix": "c"})
    assert (suffix.gaps, suffix.key) == ((Gap(0, 1),), infill([Gap(0, 1), suffix.tokens[1:]], {}).key)


def test_noise_is_keyed_by_request_and_sample() -> None:
    numbers = {
        int(canvas([SampleSpec(request, sample)], torch.device("cpu")).sample_B[0])
        for request in (blank(4), gap([1], 2, [3]), gap([1], 3, [3]), gap([1, 3], 2, []))
        for sample in range(3)
    }
    assert len(numbers) == 12
    last = Request((1,), (Gap(0, 1),), key=KEYS - 1)
    assert canvas([SampleSpec(last, 1)], torch.device("cpu")).sample_B.tolist() == [0]


def test_batches_have_sequences_of_one_length_and_resuming_keeps_complete_ones() -> None:
    actual = batches([blank(5), blank(3), blank(5)], samples=2, size=3)
    assert [[len(expected.request.tokens) for expected in batch] for batch in actual] == [[3, 3], [5, 5, 5], [5]]
    assert [whole_batches(actual, lines) for lines in range(7)] == [0, 0, 2, 2, 2, 5, 6]
