"""`megatron-sfr prepare` and `embed` as they are typed."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sfr.cli.data import embed, prepare
from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.pipeline import prepare as prepare_data
from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.targets.store import TargetStore
from tests.data.records import RECORDS, turns, write_records


def command(module, *arguments: object) -> int:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args([str(argument) for argument in arguments]))


def test_from_jsonl_to_targets(tmp_path: Path, tokenizer_folder: Path, capsys):
    good = [{"persona": "calm", "messages": turns("the sea", "is blue and the sky is grey " * 2)}]
    records = [write_records(tmp_path / name, good * count) for name, count in (("a.jsonl", 1), ("b.jsonl", 2))]
    with open(records[1], "a") as file:
        file.write("not a record\n")
    data = tmp_path / "data"
    typed = ("--input", *records, "--tokenizer", tokenizer_folder, "--output", data, "--stride", 2)
    typed += ("--seq-length", 120, "--horizons", "1:9", "3:2", "--min-segment-length", 4)
    typed += ("--format", "messages", "--persona-key", "persona", "--too-long", "truncate", "--workers", 2)

    with pytest.raises(ValueError, match=r"b\.jsonl:3: not JSON"):
        command(prepare, *typed)
    assert not data.exists()
    capsys.readouterr()

    assert command(prepare, *typed, "--skip-bad-rows") == 0
    manifest = PreparedData.open(data).manifest
    cut = (manifest.seq_length, manifest.stride, manifest.horizons, manifest.min_segment_length)
    assert cut == (120, 2, [[1, 9], [3, 2]], 4)
    assert (manifest.persona_key, manifest.too_long, manifest.inputs[0]["format"]) == (
        "persona",
        "truncate",
        "messages",
    )
    out, err = capsys.readouterr()
    assert f"{data}: 3 conversations, {manifest.tokens} tokens ({manifest.supervised_tokens} supervised)" in out
    assert "2 samples have the tokens of an earlier one; they are kept" in out
    assert f"1 bad records are in {data / 'rejected.jsonl'}, with their reasons" in out
    assert f"megatron-sfr embed --data {data}" in out
    assert "prepare: 100%" in err

    assert command(prepare, *typed, "--skip-bad-rows") == 0
    assert f"{data} is up to date" in capsys.readouterr().out


def test_from_prepared_data_to_targets(tmp_path: Path, tokenizer_folder: Path, capsys):
    data, options = tmp_path / "data", PrepareOptions(200, 2, ((1, 9), (3, 2)), 4)
    prepare_data([write_records(tmp_path / "records.jsonl", RECORDS)], data, tokenizer_folder, options, progress=False)
    manifest = PreparedData.open(data).manifest

    assert command(embed, "--data", data, "--encoder", "minilm", "--device", "cpu", "--batch-size", 4) == 0
    out, err = capsys.readouterr()
    assert f"{data / 'targets'}: {manifest.segments} targets of dimension 384 by minilm (mean pooling" in out
    assert "segment/s" in err
    other = tmp_path / "other"
    typed_other = ("--data", data, "--encoder", "minilm", "--device", "cpu", "--output", other)
    assert command(embed, *typed_other, "--pooling", "cls", "--max-length", 64, "--dtype", "bfloat16") == 0
    store = TargetStore.open(other, PreparedData.open(data)).manifest
    assert (store.pooling, store.max_length, store.dtype) == ("cls", 64, "bfloat16")
    assert command(embed, *typed_other[:-1], tmp_path / "copy", "--reuse", data / "targets", "--block-rows", 8) == 0
    out, _ = capsys.readouterr()
    assert f"{manifest.segments} of {manifest.segments} segments taken from {data / 'targets'}" in out

    assert command(embed, "--data", data, "--encoder", "minilm", "--device", "cpu") == 0
    assert f"{data / 'targets'} is up to date" in capsys.readouterr().out
    assert command(embed, "--data", data, "--encoder", "minilm", "--device", "cpu", "--verify") == 0
    assert f"0 of {manifest.segments} embeddings are missing or damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("segments", "horizons", "texts"),
    [
        ("sentence", [[1, 1]], {"The sea is blue.", " So is the sky."}),
        ("statement", [[1, 1]], {"The sea is blue. So is the sky."}),
        ("window", [[1, 256]], {"The sea is blue. So is the sky."}),
    ],
)
def test_the_segmenter_decides_what_horizons_count(tmp_path: Path, tokenizer_folder: Path, segments, horizons, texts):
    records = write_records(
        tmp_path / "records.jsonl", [{"messages": turns("the sea", "The sea is blue. So is the sky.")}]
    )
    typed = ("--input", records, "--tokenizer", tokenizer_folder, "--output", tmp_path / "data", "--segments", segments)

    lengths = ("--stride", 3, "--min-segment-length", 1)
    assert command(prepare, *typed, *lengths) == 0
    data = PreparedData.open(tmp_path / "data")
    assert (data.manifest.segmenter, data.manifest.horizons) == (segments, horizons)
    assert {data.texts[row] for row in range(data.manifest.segments)} >= texts
    assert len(data[0].anchors.position) == data.manifest.anchors > 0
    other = ("sentence" if segments == "window" else "window", "--horizons", *(f"{o}:{L}" for o, L in horizons))
    with pytest.raises(ValueError, match="was prepared with other values of segmenter;"):
        command(prepare, *typed[:-1], *other, *lengths)


def test_the_reference_preset_reads_512_pieces_of_a_segment():
    parser = argparse.ArgumentParser()
    embed.add_arguments(parser)
    typed = ["--data", "x", "--encoder", "minilm", "--preset", "reference"]
    args = parser.parse_args(typed)
    embed._set_reference(args)
    assert (args.max_length, args.pooling, args.normalize) == (512, "mean", "unit")
    for other in (["--pooling", "cls"], ["--normalize", "none"], ["--max-length", "256"]):
        with pytest.raises(ValueError, match="leave --pooling, --normalize and --max-length out"):
            embed.run(parser.parse_args([*typed, *other]))


def test_data_without_anchors_are_reported(tmp_path: Path, tokenizer_folder: Path, capsys):
    records = write_records(tmp_path / "records.jsonl", [{"messages": turns("the sea", "no")}])

    assert command(prepare, "--input", records, "--tokenizer", tokenizer_folder, "--output", tmp_path / "data") == 0
    assert "no reply is long enough for an anchor" in capsys.readouterr().out


def test_help_loads_nothing_heavy():
    code = (
        "import sys, megatron_sfr.cli.data.prepare, megatron_sfr.cli.data.embed, "
        "megatron_sfr.data.prepared.conversations\n"
        "print({'torch', 'transformers', 'sentence_transformers', 'megatron'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
