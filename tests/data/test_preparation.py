"""`prepare`: which rows it takes and which it sets aside, where it stops, and the options that it refuses."""

import json
import re
from pathlib import Path

import pytest

from megatron_sfr.data.preparation import PrepareOptions, prepare
from megatron_sfr.data.prepared import PreparedData
from tests.data.rows import HORIZONS, OPTIONS, ROWS, turns, write_rows

BAD = {
    "not a row": ("{", "not JSON"),
    "too long": (json.dumps({"messages": turns("the sea", "sky " * 999)}), "tokens, which is over sequence length 200"),
    "no mask": (json.dumps({"messages": turns("the sea", "\n\nsky")}), "the tokenizer joins the start of reply 1"),
}


@pytest.mark.parametrize(("row", "reason"), BAD.values(), ids=BAD)
def test_a_bad_row_stops_and_leaves_nothing_or_is_set_aside(tmp_path: Path, tokenizer_folder: Path, row, reason):
    good = tmp_path / "good.jsonl"
    rows = tmp_path / "rows.jsonl"
    write_rows(good, ROWS)
    rows.write_text(json.dumps(ROWS[0]) + "\n" + row + "\n" + json.dumps(ROWS[1]))
    skip = PrepareOptions(200, 4, HORIZONS, 4, skip_bad_rows=True)

    with pytest.raises(ValueError, match=f"^{re.escape(str(rows))}:2: .*{reason}"):
        prepare([good, rows], tmp_path / "out", tokenizer_folder, OPTIONS, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.jsonl", "rows.jsonl"]

    manifest = prepare([good, rows], tmp_path / "out", tokenizer_folder, skip, progress=False)
    assert (manifest.samples, manifest.rejected) == (6, 1)
    (rejected,) = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert (rejected["file"], rejected["line"], rejected["row"]) == (str(rows), 2, row)
    assert reason in rejected["reason"]
    with pytest.raises(ValueError, match=reason):  # not "up to date"
        prepare([good, rows], tmp_path / "out", tokenizer_folder, OPTIONS, progress=False)
    assert len(PreparedData.open(tmp_path / "out")) == 6


def test_the_longest_conversation_that_fits_is_taken(tmp_path: Path, tokenizer_folder: Path):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS[1:2])
    length = prepare([rows], tmp_path / "free", tokenizer_folder, OPTIONS, progress=False).tokens

    exact = PrepareOptions(length - 1, 4, HORIZONS, 4)
    assert prepare([rows], tmp_path / "exact", tokenizer_folder, exact, progress=False).tokens == length
    with pytest.raises(ValueError, match=f"{length} tokens, which is over sequence length {length - 2}"):
        prepare([rows], tmp_path / "less", tokenizer_folder, PrepareOptions(length - 2, 4, HORIZONS, 4), progress=False)


@pytest.mark.parametrize(
    ("content", "reason"),
    [("", "rows.jsonl$"), ("\n\n", "rows.jsonl$"), ("{\n{\n", "rows.jsonl; the first of 2 bad rows: .*:1: not JSON")],
)
def test_no_usable_row_is_an_error(tmp_path: Path, tokenizer_folder: Path, content: str, reason: str):
    (tmp_path / "rows.jsonl").write_text(content)
    skip = PrepareOptions(skip_bad_rows=True)

    with pytest.raises(ValueError, match=f"no usable rows in .*{reason}"):
        prepare([tmp_path / "rows.jsonl"], tmp_path / "out", tokenizer_folder, skip, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_a_horizon_without_text_has_no_target(tmp_path: Path, tokenizer_folder: Path):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS[:1])
    options = PrepareOptions(seq_length=200, stride=1, horizons=((1, 9), (2, 1)), min_segment_length=1)
    prepare([rows], tmp_path / "out", tokenizer_folder, options, progress=False)
    sample = PreparedData.open(tmp_path / "out")[0]

    last = int(sample.loss_mask.sum()) - 1  # of the reply: its end token, which has no text
    found = list(zip(sample.anchors.ordinal.tolist(), sample.anchors.horizon.tolist(), strict=True))
    assert found == [(j, horizon) for j in range(last) for horizon in (0, 1) if (j, horizon) != (last - 1, 1)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stride": 0}, "stride is 0"),
        ({"seq_length": -1}, "seq_length is -1"),
        ({"min_segment_length": 0}, "min_segment_length is 0"),
        ({"horizons": ()}, "0 horizons; give 1 to 16"),
        ({"segmenter": "word"}, "segmenter 'word' is unknown; choose from window, sentence, statement"),
    ],
)
def test_impossible_options_are_refused(options: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        PrepareOptions(**options)
