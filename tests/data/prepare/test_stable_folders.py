"""Prepared folders hold the same bytes from release to release: `folders.json` has the checksums of their files.

A change that means to alter them deletes that file; the first test then writes it again, and fails.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.document_source import DocumentOptions
from megatron_sfr.data.prepare.pipeline import prepare
from tests.data.records import HORIZONS, RECORDS, turns, write_records

EXPECTED = Path(__file__).with_name("folders.json")
PLACES = {"tokenizer", "tokenizer_sha256", "inputs", "corpus"}  # differ from machine to machine
LONG = "the sea is blue. And the sky is grey!\nYes, é 雪 it is; no more of it.\n\n"
CODE = "def sea(x):\n    if x:\n        return x\n    return sky(x)\n\n\nclass Sky:\n    blue = 1\n"


def chats(folder: Path) -> list[Path]:
    """Three formats, with bad records, blank lines, repeated records and a conversation that is too long."""
    messages = [*RECORDS, {"messages": []}, {"persona": "long", "messages": turns("sea", LONG * 9)}, *RECORDS[:2]]
    shared = [
        {"from": "human", "value": "the sea"},
        {"from": "gpt", "value": LONG},
        {"from": "human", "value": "and"},
        {"from": "gpt", "value": CODE},
    ]
    alpaca = [{"instruction": f"sea {i}", "output": LONG[i:], "persona": "calm"} for i in range(9)]
    paths = [
        write_records(folder / "messages.jsonl", messages),
        write_records(folder / "sharegpt.jsonl", [{"conversations": shared, "system": "sky"}] * 3),
        write_records(folder / "alpaca.jsonl", alpaca),
    ]
    with open(paths[0], "ab") as file:
        file.write(b"\n\n{broken\n" + json.dumps(RECORDS[0]).encode())
    return paths


def texts(folder: Path) -> Path:
    records: list[Any] = [{"text": LONG * n + CODE} for n in range(5)]
    return write_records(folder / "texts.jsonl", [*records, {"text": " "}, {"other": 1}, {"text": "sea"}])


def prepare_chats(folder: Path, tokenizer: Path, **options: Any) -> Path:
    cut = PrepareOptions(seq_length=120, too_long="truncate", skip_bad_rows=True, min_segment_length=3, **options)
    prepare(chats(folder), folder / "out", tokenizer, cut, progress=False)
    return folder / "out"


def prepare_texts(folder: Path, tokenizer: Path, **options: Any) -> Path:
    cut = DocumentOptions(min_segment_length=3, skip_bad_rows=True, **options)
    prepare([texts(folder)], folder / "out", tokenizer, cut, progress=False)
    return folder / "out"


def prepare_corpus(folder: Path, tokenizer: Path) -> Path:
    corpus = prepare_texts(folder, tokenizer) / "documents"
    cut = DocumentOptions(stride=7, horizons=((1, 2), (2, 1)), segmenter="sentence")
    prepare([corpus], folder / "indexed", tokenizer, cut, progress=False)
    return folder / "indexed"


CASES: dict[str, Callable[[Path, Path], Path]] = {
    "chats, windows": lambda folder, tokenizer: prepare_chats(folder, tokenizer, stride=4, horizons=HORIZONS),
    "chats, sentences": lambda folder, tokenizer: prepare_chats(
        folder, tokenizer, stride=3, horizons=((1, 1), (2, 3)), segmenter="sentence"
    ),
    "chats, statements": lambda folder, tokenizer: prepare_chats(
        folder, tokenizer, stride=1, horizons=((1, 1),), segmenter="statement"
    ),
    "texts": lambda folder, tokenizer: prepare_texts(folder, tokenizer, stride=5, horizons=((1, 9),)),
    "indexed corpus": prepare_corpus,
}


def found(output: Path) -> dict[str, Any]:
    """The manifest, checksums of the files in it, without what differs from machine to machine."""
    manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in manifest.items() if name not in PLACES}
    return kept | {"formats": [record["format"] for record in manifest["inputs"]]}


def write_expected(tokenizer: Path, folder: Path) -> None:
    cases = {}
    for number, (name, make) in enumerate(CASES.items()):
        (folder / str(number)).mkdir(parents=True)
        cases[name] = found(make(folder / str(number), tokenizer))
    EXPECTED.write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")  # upstream warns where it has to guess it


@pytest.mark.parametrize("case", CASES)
def test_a_prepared_folder_has_the_bytes_that_it_always_had(tmp_path: Path, tokenizer_folder: Path, case: str):
    if not EXPECTED.exists():
        write_expected(tokenizer_folder, tmp_path / "all")
        pytest.fail(f"{EXPECTED} is written again: look at what changed in it")
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))[case]
    actual = found(CASES[case](tmp_path, tokenizer_folder))
    assert {name: actual[name] for name in expected} == expected
