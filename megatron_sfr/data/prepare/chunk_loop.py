"""The loop of preparation: chunks through the workers into the files of a folder, from where these end, with a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_sfr.data.prepare.worker_pool import ordered_map
from megatron_sfr.storage.jsonl import BadRow, Place


class Totals(Protocol):
    """What the files hold up to `place`."""

    place: Place
    rejected: int
    first_bad: str

    @property
    def rows(self) -> int: ...


class EncodedChunk(Protocol):
    @property
    def bad(self) -> list[BadRow]: ...


class Files[C: EncodedChunk](Protocol):
    """What chunks are added to."""

    @property
    def totals(self) -> Totals: ...
    def add(self, chunk: C) -> None: ...


@dataclass(frozen=True)
class Bar:
    """How far a run is: `done` tells it of a place, in units of which there are `total`."""

    total: int
    done: Callable[[Place], int]
    unit: str
    show: bool


def write_chunks[T, C: EncodedChunk](
    files: Files[C], chunks: Iterable[T], encoder: Callable[[T], C], bar: Bar, *, workers: int, skip_bad_rows: bool
) -> None:
    """Adds the chunks in order; the first bad row is a ValueError unless they are skipped."""
    from tqdm import tqdm

    totals: Any = files.totals
    start, rows_before = bar.done(totals.place), totals.rows
    if totals.rejected and not skip_bad_rows:  # of an earlier run, which skipped them
        raise ValueError(totals.first_bad)
    options: dict[str, Any] = {"desc": "prepare", "unit": bar.unit, "unit_scale": True, "disable": not bar.show}
    with (
        tqdm(total=bar.total, initial=start, **options) as line,
        closing(ordered_map(encoder, chunks, workers)) as done,
    ):
        for chunk in done:
            if chunk.bad and not skip_bad_rows:
                raise ValueError(str(chunk.bad[0]))
            files.add(chunk)
            rate = (totals.rows - rows_before) / max(line.format_dict["elapsed"], 1e-9)
            line.set_postfix_str(f"{totals.rows:,} rows, {rate:,.0f} rows/s", refresh=False)
            line.update(bar.done(totals.place) - line.n)
