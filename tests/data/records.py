"""A chat template, conversations, how they are cut, and files of records, shared by the data tests."""

import json
from pathlib import Path
from typing import Any

from megatron_sfr.data.prepare.chat_source import PrepareOptions

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turns(*contents: str) -> list[dict[str, str]]:
    """User and assistant in turn, the user first."""
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(contents)]


def write_records(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


HORIZONS = ((1, 12), (7, 3), (2, 20))
OPTIONS = PrepareOptions(seq_length=200, stride=4, horizons=HORIZONS, min_segment_length=4)
RECORDS = [
    {"persona": "calm", "messages": turns("the sea", "is blue and the sky is grey")},
    {"persona": "wild", "messages": turns("the sea", "is GREY!", "and the sky", "the sky is blue and the sea is grey")},
    {"messages": turns("the sky", "is blue and the sky is grey")},
    {"persona": "calm", "messages": turns("is the sea blue", "no")},
]
