"""A prepared folder of conversations, new for each test."""

from pathlib import Path

import pytest

from megatron_sfr.data.prepare.pipeline import prepare
from tests.data.records import OPTIONS, RECORDS, write_records


@pytest.fixture
def prepared(tmp_path: Path, tokenizer_folder: Path) -> Path:
    prepare(
        [write_records(tmp_path / "records.jsonl", RECORDS)],
        tmp_path / "out",
        tokenizer_folder,
        OPTIONS,
        progress=False,
    )
    return tmp_path / "out"
