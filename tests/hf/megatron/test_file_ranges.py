"""Ranges of files are copied completely, inside the kernel or not, and a file that is too short is an error."""

import os
from pathlib import Path

import pytest

from megatron_sfr.hf.megatron import file_ranges
from megatron_sfr.hf.megatron.file_ranges import FileRange


@pytest.mark.parametrize("refusal", [None, OSError("not between these file systems"), 0])
def test_a_range_is_copied_to_its_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: OSError | int | None
) -> None:
    """In the kernel; where that fails; and where it stops early, here after one call."""
    content, calls = os.urandom(10_000), []
    (tmp_path / "source").write_bytes(content)
    monkeypatch.setattr(file_ranges, "BUFFER_BYTES", 1000)
    in_kernel = os.copy_file_range

    def copy(source: int, target: int, count: int, start: int, position: int) -> int:
        calls.append(count)
        if refusal is not None and len(calls) == 2:
            if isinstance(refusal, OSError):
                raise refusal
            return refusal
        return in_kernel(source, target, min(count, 3000), start, position)

    monkeypatch.setattr(os, "copy_file_range", copy)
    with (tmp_path / "target").open("w+b", buffering=0) as target:
        target.write(b"head")
        FileRange(tmp_path / "source", 17, 9000).copy_to(target.fileno(), 6)
        target.seek(0)
        assert target.read() == b"head\0\0" + content[17:9017]
    assert calls == ([9000, 6000] if refusal is not None else [9000, 6000, 3000])


def test_a_source_that_ends_early(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"12345")
    with (
        (tmp_path / "target").open("wb") as target,
        pytest.raises(ValueError, match="source ends at byte 5: it was cut"),
    ):
        FileRange(tmp_path / "source", 2, 9).copy_to(target.fileno(), 0)
