"""The dictionary example, from packages to records: copies, balance, the split, repeatability, missing packages."""

import json
from pathlib import Path

import pytest

from examples.dictionary_styles import prepare
from examples.dictionary_styles.dictd import SOURCES
from examples.dictionary_styles.overlap import is_copied, known_runs
from examples.dictionary_styles.selection import balance, draw, prompts, split
from examples.dictionary_styles.text import FOREIGN, REFERENCE
from tests.examples.made_up_dictionaries import write_all


def test_copies_are_recognized_by_their_words_not_by_their_subject() -> None:
    known = known_runs(["To frob a machine with great force until it yields or breaks for good."])
    assert is_copied("To FROB a machine, with great force, until it yields.", known)
    assert not is_copied("To hit a machine with a tub until somebody comes to repair it.", known)


def test_every_headword_is_on_one_side_and_no_validation_text_is_trained_on() -> None:
    words = [f"w{i}" for i in range(300)]
    books = {p: {w: [f"{p} {w}", "a gloss of two words"] for w in words[i:]} for i, p in enumerate("abc")}
    train, validation, leaked = split(books, 0.2, seed=1)
    assert {record.headword for record in train}.isdisjoint(record.headword for record in validation)
    assert {record.reply for record in train}.isdisjoint(record.reply for record in validation)
    assert len(train) + len(validation) + leaked == sum(2 * len(book) for book in books.values())
    assert 0.1 < len({record.headword for record in validation}) / 300 < 0.3
    smaller = split({"b": books["b"]}, 0.2, seed=1)[1]
    assert smaller == [record for record in validation if record.persona == "b"]  # whatever else is there


def test_balance_prefers_shared_headwords_and_keeps_to_its_limits() -> None:
    books = {"a": {f"w{i}": [f"{i}.{j}" for j in range(5)] for i in range(20)}, "b": {"w7": ["x"], "w13": ["y"]}}
    chosen = balance(books, most=10, most_senses=3, seed=0)
    assert set(list(chosen["a"])[:2]) == {"w7", "w13"}
    assert sum(map(len, chosen["a"].values())) == 10
    assert max(map(len, chosen["a"].values())) == 3
    assert chosen["b"] == books["b"]


def test_prompts_put_shared_headwords_first() -> None:
    books = {"a": {w: [w + " a"] for w in "uvwxyz"}, "b": {"x": ["x b", "x bb"]}}
    _, records, _ = split(books, 1.1, seed=0)
    asked = prompts(records, most=2, seed=0)
    assert [(record.persona, record.reply) for record in asked[:3]] == [("a", "x a"), ("b", "x b"), ("b", "x bb")]
    assert len({record.headword for record in asked}) == 2


def test_draws_do_not_depend_on_the_run() -> None:
    assert draw(0, "order", "tub") == draw(0, "order", "tub") != draw(1, "order", "tub")


def test_prepare_writes_the_same_rows_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dictionaries = write_all(tmp_path / "root")
    common = ["--dictionaries", str(dictionaries), "--validation-share", "0.3", "--quiet", "--output"]
    for name in ("one", "two"):
        assert prepare.main([*common, str(tmp_path / name)]) == 0
    assert prepare.main([*common, str(tmp_path / "other"), "--seed", "1"]) == 0
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["prompts.jsonl", "report.json", "train.jsonl", "validation.jsonl"]
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    assert (tmp_path / "one/train.jsonl").read_bytes() != (tmp_path / "other/train.jsonl").read_bytes()
    texts = [(tmp_path / "one" / name).read_text() for name in ("train.jsonl", "validation.jsonl")]
    sides = [[json.loads(line) for line in text.splitlines()] for text in texts]
    asked = [{record["messages"][0]["content"] for record in records} for records in sides]
    assert all(asked)
    assert asked[0].isdisjoint(asked[1])
    records = [record for side in sides for record in side]
    tubs = {record["persona"] for record in records if record["messages"][0]["content"] == "Define: tub"}
    assert tubs == {"webster", "wordnet", "bierce", "jargon", "foldoc", "vera", "fortunes"}  # FOLDOC by its alias
    table = json.loads((tmp_path / "one/report.json").read_text())["personas"]
    assert table["webster"]["dropped"] == {prepare.REPEATED_KEY: 1, REFERENCE: 1, FOREIGN: 1}
    assert table["foldoc"]["dropped"] == {prepare.REPEATED_KEY: 1, FOREIGN: 1}
    assert sum(counts["train records"] for counts in table.values()) == len(sides[0])
    assert "webster" in capsys.readouterr().out


def test_a_missing_package_is_named_with_the_command_that_gets_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dictionaries = write_all(tmp_path / "root")
    (dictionaries / SOURCES[2].file).unlink()
    (dictionaries / SOURCES[-1].file).unlink()
    assert prepare.main(["--dictionaries", str(dictionaries), "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "apt-get download dict-devil fortunes &&" in message
    assert f"dpkg -x $p {dictionaries}" in message
    assert not (tmp_path / "out").exists()
