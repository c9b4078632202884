"""`prepare`: which records it accepts and rejects, where it stops, and which options it refuses."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sfr.data.chat.template_options import SampleOptions
from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.data.prepared.conversations import PreparedData
from tests.data.records import HORIZONS, OPTIONS, RECORDS, turns, write_records

BAD = {
    "not a record": ("{", "not JSON"),
    "too long": (json.dumps({"messages": turns("the sea", "sky " * 999)}), "tokens, which is over sequence length 200"),
    "no mask": (
        json.dumps({"messages": turns("the sea", "\n\nsky")}),
        "before reply 1 with .* in one token",
    ),
}


@pytest.mark.parametrize(("record", "reason"), BAD.values(), ids=BAD)
def test_a_bad_record_stops_without_output_or_is_rejected(
    tmp_path: Path, tokenizer_folder: Path, capsys, record, reason
):
    good = tmp_path / "good.jsonl"
    records = tmp_path / "records.jsonl"
    write_records(good, RECORDS)
    records.write_text(json.dumps(RECORDS[0]) + "\n" + record + "\n" + json.dumps(RECORDS[1]))
    skip = PrepareOptions(200, 4, HORIZONS, 4, skip_bad_rows=True)

    with pytest.raises(ValueError, match=f"^{re.escape(str(records))}:2: .*{reason}"):
        prepare([records], tmp_path / "out", tokenizer_folder, OPTIONS, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.jsonl", "records.jsonl"]

    with pytest.raises(ValueError, match=f"^{re.escape(str(records))}:2: .*{reason}"):
        prepare([good, records], tmp_path / "out", tokenizer_folder, OPTIONS, progress=False)
    capsys.readouterr()
    manifest = prepare([good, records], tmp_path / "out", tokenizer_folder, skip)
    assert f"resumes at {good}:5, where" in capsys.readouterr().out, "the good file is done"
    assert (manifest.samples, manifest.rejected) == (6, 1)
    (rejected,) = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert (rejected["file"], rejected["line"], rejected["row"]) == (str(records), 2, record)
    assert re.search(reason, rejected["reason"])
    with pytest.raises(ValueError, match=reason):  # not "up to date"
        prepare([good, records], tmp_path / "out", tokenizer_folder, OPTIONS, progress=False)
    assert len(PreparedData.open(tmp_path / "out")) == 6


def test_a_folder_of_an_earlier_release_without_one_of_the_options_is_up_to_date(
    tmp_path: Path, tokenizer_folder: Path, capsys
):
    records = write_records(tmp_path / "records.jsonl", RECORDS)
    prepare([records], tmp_path / "out", tokenizer_folder, OPTIONS, progress=False)
    manifest = tmp_path / "out" / "manifest.json"
    fields = json.loads(manifest.read_text())
    del fields["chat"]["reply_end"]
    manifest.write_text(json.dumps(fields))
    capsys.readouterr()

    prepare([records], tmp_path / "out", tokenizer_folder, OPTIONS)
    assert "is up to date" in capsys.readouterr().out
    other = replace(OPTIONS, chat=SampleOptions(reply_end="next-turn"))
    with pytest.raises(ValueError, match="was prepared with other values of reply_end; choose another"):
        prepare([records], tmp_path / "out", tokenizer_folder, other, progress=False)


def test_the_longest_conversation_that_fits_is_selected(tmp_path: Path, tokenizer_folder: Path):
    records = write_records(tmp_path / "records.jsonl", RECORDS[1:2])
    length = prepare([records], tmp_path / "free", tokenizer_folder, OPTIONS, progress=False).tokens

    exact = PrepareOptions(length - 1, 4, HORIZONS, 4)
    assert prepare([records], tmp_path / "exact", tokenizer_folder, exact, progress=False).tokens == length
    with pytest.raises(ValueError, match=f"{length} tokens, which is over sequence length {length - 2}"):
        prepare(
            [records], tmp_path / "less", tokenizer_folder, PrepareOptions(length - 2, 4, HORIZONS, 4), progress=False
        )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "records.jsonl$"),
        ("\n\n", "records.jsonl$"),
        ("{\n{\n", "records.jsonl; the first of 2 bad records: .*:1: not JSON"),
    ],
)
def test_no_usable_row_is_an_error(tmp_path: Path, tokenizer_folder: Path, content: str, reason: str):
    (tmp_path / "records.jsonl").write_text(content)
    skip = PrepareOptions(skip_bad_rows=True)

    with pytest.raises(ValueError, match=f"no usable records in .*{reason}"):
        prepare([tmp_path / "records.jsonl"], tmp_path / "out", tokenizer_folder, skip, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.jsonl"]


def test_a_truncated_conversation_keeps_its_start_and_the_futures_of_its_anchors(
    tmp_path: Path, tokenizer_folder: Path
):
    long = {"messages": turns("the sea", "the sea is blue", "and the sky", "the sky is grey and the sea is blue " * 9)}
    records = write_records(tmp_path / "records.jsonl", [RECORDS[2], long, RECORDS[2]])
    whole = prepare([records], tmp_path / "whole", tokenizer_folder, OPTIONS, progress=False)
    cut = PrepareOptions(100, 4, HORIZONS, 4, too_long="truncate")
    manifest = prepare([records], tmp_path / "cut", tokenizer_folder, cut, progress=False)
    assert (whole.truncated, whole.duplicates) == (0, 1)
    assert (manifest.truncated, manifest.duplicates, manifest.samples) == (1, 1, 3)

    data, full = PreparedData.open(tmp_path / "cut"), PreparedData.open(tmp_path / "whole")
    for index in (0, 2):
        assert (data[index].tokens == full[index].tokens).all()
    sample, before = data[1], full[1]
    assert sample.tokens.tolist() == before.tokens[:101].tolist()
    assert sample.loss_mask.tolist() == before.loss_mask[:101].tolist()
    inside = before.anchors.position + 1 < 101
    assert 0 < inside.sum() < len(inside)
    for name in ("position", "response", "ordinal", "horizon"):
        assert getattr(sample.anchors, name).tolist() == getattr(before.anchors, name)[inside].tolist()
    texts = [data.texts[row] for row in sample.anchors.segment]
    assert texts == [full.texts[row] for row in before.anchors.segment[inside]], "beyond the cut as well"
    of_last = sample.anchors.response == 1
    kept = int(sample.loss_mask.sum()) - int(sample.anchors.length[~of_last][0])
    assert set(sample.anchors.length[of_last].tolist()) == {kept}
    assert (sample.anchors.ordinal < sample.anchors.length).all()


def test_a_conversation_without_a_remaining_reply_is_a_bad_record(tmp_path: Path, tokenizer_folder: Path):
    records = write_records(tmp_path / "records.jsonl", [*RECORDS, {"messages": turns("the sea " * 99, "is blue")}])
    cut = PrepareOptions(100, 4, HORIZONS, 4, too_long="truncate")

    with pytest.raises(ValueError, match=r"records\.jsonl:5: the first 101 of \d+ tokens hold nothing of a reply"):
        prepare([records], tmp_path / "out", tokenizer_folder, cut, progress=False)


def test_formats_may_differ_from_file_to_file_and_are_said(tmp_path: Path, tokenizer_folder: Path, capsys):
    alpaca = {"instruction": "the sea", "output": "is blue and the sky is grey", "style": "calm"}
    paths = [write_records(tmp_path / "a.jsonl", RECORDS[2:3]), write_records(tmp_path / "b.jsonl", [alpaca])]

    manifest = prepare(paths, tmp_path / "out", tokenizer_folder, PrepareOptions(persona_key="style"))

    assert capsys.readouterr().out == "a.jsonl: messages\nb.jsonl: alpaca\n"
    assert [record["format"] for record in manifest.inputs] == ["messages", "alpaca"]
    assert (manifest.persona_key, manifest.personas) == ("style", {"": 1, "calm": 1})
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the record is messages in a file of alpaca"):
        prepare(paths, tmp_path / "one", tokenizer_folder, PrepareOptions(format="alpaca"), progress=False)


def test_a_horizon_without_text_has_no_target(tmp_path: Path, tokenizer_folder: Path):
    records = write_records(tmp_path / "records.jsonl", RECORDS[:1])
    options = PrepareOptions(seq_length=200, stride=1, horizons=((1, 9), (2, 1)), min_segment_length=1)
    prepare([records], tmp_path / "out", tokenizer_folder, options, progress=False)
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
        ({"format": "text"}, "format is 'text'; choose messages, sharegpt, alpaca"),
        ({"too_long": "drop"}, "too_long is 'drop'; choose error, truncate"),
        ({"segmenter": "word"}, "segmenter is 'word'; choose window, sentence, statement"),
    ],
)
def test_impossible_options_are_refused(options: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        PrepareOptions(**options)


def test_a_sample_for_each_reply_keeps_the_persona_and_the_futures_of_its_reply(tmp_path: Path, tokenizer_folder: Path):
    messages = turns("the sea", "is GREY and the sky", "and the sky", "the sky is blue and the sea is grey")
    records = write_records(
        tmp_path / "records.jsonl",
        [{"persona": "wild", "messages": messages}, {"persona": "calm", "messages": messages[:2]}],
    )
    each = replace(OPTIONS, chat=SampleOptions(turns="each"))
    whole = prepare([records], tmp_path / "whole", tokenizer_folder, OPTIONS, progress=False)
    manifest = prepare([records], tmp_path / "each", tokenizer_folder, each, progress=False)

    data, together = PreparedData.open(tmp_path / "each"), PreparedData.open(tmp_path / "whole")
    assert (manifest.samples, manifest.conversations, whole.samples, whole.conversations) == (3, 2, 2, 2)
    assert manifest.personas == {"wild": 2, "calm": 1}
    assert [data[i].persona for i in range(3)] == ["wild", "wild", "calm"]
    assert manifest.chat is not None
    assert manifest.chat["turns"] == "each"
    assert manifest.supervised_tokens == whole.supervised_tokens

    def targets(data: PreparedData, sample: int, response: int) -> list[tuple[int, int, int, str]]:
        a = data[sample].anchors
        entries = zip(a.response, a.ordinal, a.length, a.horizon, a.segment, strict=True)
        return [(o, n, h, data.texts[int(s)]) for r, o, n, h, s in entries if r == response]

    for number in (0, 1):  # both replies of the first conversation have the targets that they have in one sample
        assert targets(data, number, 0) == targets(together, 0, number)
    assert {int(r) for i in range(3) for r in data[i].anchors.response} == {0}
    with pytest.raises(ValueError, match=r"was prepared with other values of turns; choose another"):
        prepare([records], tmp_path / "whole", tokenizer_folder, each, progress=False)
    assert prepare([records], tmp_path / "each", tokenizer_folder, each, progress=False) == manifest


def test_a_record_gives_all_of_its_samples_or_none(tmp_path: Path, tokenizer_folder: Path):
    records = write_records(
        tmp_path / "records.jsonl", [{"messages": turns("the sea", "grey", "sky", "sky " * 999)}, RECORDS[0]]
    )
    options = replace(OPTIONS, skip_bad_rows=True, chat=SampleOptions(turns="each"))

    manifest = prepare([records], tmp_path / "out", tokenizer_folder, options, progress=False)

    assert (manifest.samples, manifest.conversations, manifest.rejected) == (1, 1, 1)
