"""`megatron-sfr inspect`: supervised text is marked, letters are not cut, counts and futures are the folder's."""

import argparse
import pty
import re
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from megatron_sfr.cli.data import inspect
from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.data.prepared.conversations import Anchors, PreparedData, Sample
from megatron_sfr.data.prepared.inspect import counts, pieces
from tests.data.records import HORIZONS, RECORDS, turns, write_records


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    records = [*RECORDS, RECORDS[0], {"messages": turns("\x1b[31mred <b>", "the sea is blü 🌊")}, {"messages": []}]
    options = PrepareOptions(200, 4, HORIZONS, 4, skip_bad_rows=True)
    prepare(
        [write_records(folder / "records.jsonl", records)], folder / "out", tokenizer_folder, options, progress=False
    )
    return folder / "out"


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    return inspect.run(parser.parse_args([str(argument) for argument in arguments]))


def test_a_sample_is_readable_in_a_pipe(prepared: Path, capsys):
    assert run("--data", prepared, "--sample", 1, "--anchors", 2) == 0
    out = capsys.readouterr().out

    data = PreparedData.open(prepared)
    sample = data[1]
    assert f"sample 1, persona wild: {len(sample.tokens)} tokens, {int(sample.loss_mask.sum())} supervised" in out
    assert re.findall(r"\[\[(.*?)\]\]", out) == [
        "is GREY!<|im_end|>",
        "the sky is blue and the sea is grey<|im_end|>",
    ]
    assert "<|im_start|>assistant\n[[is GREY!<|im_end|>]]\n<|im_start|>user\nand the sky<|im_end|>" in out
    a = sample.anchors
    assert f"{len(a.position)} anchors\n" in out
    where = f"before token {a.ordinal[1]} of {a.length[1]} of reply {a.response[1] + 1}"
    horizon = ":".join(map(str, HORIZONS[a.horizon[1]]))
    assert f"  position {a.position[1]}, {where}, horizon {horizon}\n    {data.texts[a.segment[1]]}\n" in out
    assert f"  {len(a.position) - 2} more (--anchors {len(a.position)})\n" in out
    assert "\x1b" not in out


def test_colours_and_what_the_data_must_not_do_to_a_terminal(prepared: Path, capsys, monkeypatch):
    green = "\x1b[32mthe sea is blü 🌊<|im_end|>\x1b[0m"
    for choice, no_color, is_green in (("always", "1", True), ("auto", "", False), ("never", "", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        run("--data", prepared, "--sample", 5, "--color", choice)
        out = capsys.readouterr().out
        assert (green in out) == is_green
        assert "\\x1b[31mred" in out


def test_a_terminal_has_colours_unless_they_are_disabled(monkeypatch):
    ours, terminals = pty.openpty()
    with open(ours, "rb"), open(terminals, "w") as terminal, redirect_stdout(terminal):
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("NO_COLOR", "")
        assert inspect._colour("auto")
        monkeypatch.setenv("NO_COLOR", "1")
        assert not inspect._colour("auto")
        assert inspect._colour("always")
        monkeypatch.setenv("NO_COLOR", "")
        monkeypatch.setenv("TERM", "dumb")
        assert not inspect._colour("auto")


def test_the_counts(prepared: Path, capsys):
    assert run("--data", prepared, "--counts") == 0
    out = capsys.readouterr().out

    data = PreparedData.open(prepared)
    found = dict(counts(data))
    assert found["inputs"] == "records.jsonl (messages)"
    assert found["conversations"] == "6; 1 duplicates, 0 truncated, 1 rejected"
    assert found["personas"] == "2: calm 3, wild 1, none 2"
    longest = max(len(data[i].tokens) for i in range(6))
    assert found["lengths"].endswith(f"longest: {longest} (at most 200 + 1)")
    share = sum(int(data[i].loss_mask.sum()) for i in range(6)) / sum(len(data[i].tokens) for i in range(6))
    assert f"({share:.1%})" in found["tokens"]
    for name, text in found.items():
        assert f"  {name:<14}{text}\n" in out
    assert "sample" not in out


def test_a_seed_chooses_the_same_sample_again(prepared: Path, capsys):
    shown = []
    for seed in (1, 1, 2, 3, 4, 5, 6):
        run("--data", prepared, "--seed", seed)
        shown.append(re.search(r"sample \d", capsys.readouterr().out)[0])
    assert shown[0] == shown[1]
    assert len(set(shown)) > 1


def test_letters_of_several_tokens_are_not_cut(tokenizer_folder: Path):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    tokens = np.array(tokenizer("a🌊b", add_special_tokens=False)["input_ids"], np.int32)
    assert len(tokens) == 6, "the wave is four of them"
    none = Anchors(*np.empty((6, 0), np.int32))

    for border in range(7):
        mask = (np.arange(6) >= border).astype(np.uint8)
        found = pieces(Sample(tokens, mask, none, ""), tokenizer)
        assert "".join(piece.text for piece in found) == "a🌊b"
        supervised = "".join(piece.text for piece in found if piece.supervised)
        assert supervised == {0: "a🌊b", 5: "b", 6: ""}.get(border, "🌊b")


def test_the_page_shows_a_few_samples_and_stands_alone(prepared: Path, tmp_path: Path, capsys):
    path = tmp_path / "new" / "page.html"
    assert run("--data", prepared, "--html", path, "--seed", 0) == 0
    assert len(re.findall(r"<h2>Sample \d", path.read_text())) == 5
    assert str(path) in capsys.readouterr().out
    for other in ("--counts", "--verify"):
        with pytest.raises(SystemExit):
            run("--data", prepared, "--html", path, other)
        assert "not allowed with argument" in capsys.readouterr().err

    run("--data", prepared, "--html", tmp_path / "page.html", "--sample", 5)
    page = (tmp_path / "page.html").read_text()
    assert "<mark>the sea is blü 🌊&lt;|im_end|&gt;</mark>" in page
    assert "red &lt;b&gt;" in page
    assert "http" not in page
    sample = PreparedData.open(prepared)[5]
    assert page.count(" of ") == len(sample.anchors.position)


def test_what_cannot_be_shown_is_said(prepared: Path, make_tokenizer):
    for number in (6, -1):
        with pytest.raises(ValueError, match=f"there is no sample {number}; give one from 0 to 5"):
            run("--data", prepared, "--sample", number)
    other = make_tokenizer("{{ 'another template' }}")
    with pytest.raises(ValueError, match="prepared with another tokenizer or chat template than"):
        run("--data", prepared, "--tokenizer", other)
