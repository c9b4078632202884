"""Horizons as they are typed, and that all folders of a run have the same."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.data.prepared.open import horizons_of
from megatron_sfr.data.segments.segmenters import format_horizons, parse_horizons
from tests.data.records import turns, write_records


@given(st.lists(st.tuples(st.integers(1, 10**9 - 1), st.integers(1, 10**9 - 1)), min_size=1, max_size=16, unique=True))
def test_what_is_written_is_read(horizons: list[tuple[int, int]]):
    assert parse_horizons(format_horizons(horizons).split()) == tuple(horizons)


def test_the_whole_reply_is_a_horizon():
    assert parse_horizons(["reply", "1:256"]) == ((0, 0), (1, 256))
    assert format_horizons([[0, 0], [1, 256]]) == "reply 1:256"
    with pytest.raises(ValueError, match="horizon reply is given twice"):
        parse_horizons(["reply", "reply"])


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("256", "horizon '256' is not OFFSET:LENGTH; give two whole numbers, such as 1:256"),
        ("1:", "horizon '1:' is not OFFSET:LENGTH"),
        ("1:2:3", "horizon '1:2:3' is not OFFSET:LENGTH"),
        ("1:256 a:b", "horizon 'a:b' is not OFFSET:LENGTH"),
        ("1:256 1.5:2", "horizon '1.5:2' is not OFFSET:LENGTH"),
        ("1:256 0:4", "horizon 0:4 begins before the token to predict; give an offset of at least 1"),
        ("-1:4", "horizon -1:4 begins before the token to predict; give an offset of at least 1"),
        ("33:0", "horizon 33:0 holds nothing; give a length of at least 1"),
        ("1:256 33:96 1:256", "horizon 1:256 is given twice; give each horizon once"),
        (" ".join(f"{o}:1" for o in range(1, 18)), "17 horizons; give 1 to 16 of them"),
        ("", "0 horizons; give 1 to 16 of them, such as 1:256"),
    ],
)
def test_bad_horizons_are_named(typed: str, reason: str):
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}"):
        parse_horizons(typed.split())


def test_all_folders_of_a_run_have_the_same_horizons(tmp_path: Path, tokenizer_folder: Path):
    records = write_records(tmp_path / "records.jsonl", [{"messages": turns("the sea", "is blue")}])
    for name, horizons in (("a", ((1, 8),)), ("b", ((1, 8),)), ("c", ((1, 8), (9, 2)))):
        options = PrepareOptions(horizons=horizons, stride=7 if name == "b" else 32)  # strides may differ
        prepare([records], tmp_path / name, tokenizer_folder, options, progress=False)

    assert horizons_of([tmp_path / "a", str(tmp_path / "b")]) == ((1, 8),)
    assert horizons_of([tmp_path / "c"]) == ((1, 8), (9, 2))
    with pytest.raises(ValueError, match="differ in their horizons") as caught:
        horizons_of([tmp_path / name for name in "abc"])
    assert f"{tmp_path / 'a'} has 1:8, {tmp_path / 'c'} has 1:8 9:2; prepare them with the same --horizons" in str(
        caught.value
    )
    sentences = PrepareOptions(horizons=((1, 8),), segmenter="sentence")
    prepare([records], tmp_path / "s", tokenizer_folder, sentences, progress=False)
    assert horizons_of([tmp_path / "s"]) == ((1, 8),)
    with pytest.raises(ValueError, match="differ in what their horizons count") as caught:
        horizons_of([tmp_path / "a", tmp_path / "s"])
    assert f"{tmp_path / 'a'} counts by window, {tmp_path / 's'} counts by sentence; prepare" in str(caught.value)
    with pytest.raises(ValueError, match="does not exist; run: megatron-sfr prepare"):
        horizons_of([tmp_path / "none"])
