"""The damage of tools/faults is the same for the same seed, changes what it is given, and copes with any drawing."""

import json
import random

import pytest

from tools.faults import damage, hostile_text

RECORD = json.dumps({"messages": [{"role": "user", "content": "é"}], "n": 1, "x": None})
HEADER = json.dumps({"__metadata__": {}, "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
INPUTS = {
    "RECORDS": f"{RECORD}\n{RECORD}\n".encode(),
    "JSON": RECORD.encode(),
    "SAFETENSORS": len(HEADER).to_bytes(8, "little") + HEADER + bytes(4),
    "RECIPES": b"lr: 1\nsave: run\n",
    "CHAT_TEMPLATES": b"{% for message in messages %}{{ message.content }}{% endfor %}",
    "TRACKERS": b"2",
}


@pytest.mark.parametrize("kind", INPUTS)
def test_damage_is_reproducible_and_real(kind: str) -> None:
    data = INPUTS[kind]
    for function in getattr(damage, kind, None) or getattr(hostile_text, kind):
        first, again = ([function(data, random.Random(seed)) for seed in range(100)] for _ in range(2))
        assert first == again
        assert any(damaged != data for damaged in first)
        assert all(isinstance(damaged, bytes) for damaged in first)
