"""Chunks of the LM head change no loss, gradient or weight, in any layout.

All other trainings of these tests have chunks too (tiny.py): what they compare holds for several chunks per microbatch.
"""

from pathlib import Path

import pytest

from . import test_layouts, test_objectives
from .launch import read_checkpoint, read_metrics
from .runs import Runs, begin_with
from .settings import EACH_STEP, OVERLAPPED, PP2, SHARDED_OPTIMIZER, TWO_CLIPS
from .test_layouts import LAYOUTS, MOMENT, TERMS, TIED, difference
from .tiny import write_recipe

pytestmark = pytest.mark.distributed
WHOLE = ("--loss-chunk-tokens", "0")
# Buckets so small that the output layer's weight is gathered on its own, while the layers before it compute.
OWN_BUCKET = (*SHARDED_OPTIMIZER, *OVERLAPPED, "--ddp-bucket-size", "2000")


def check_equal(whole: Path, chunked: Path, steps: tuple[int, ...]) -> None:
    for step in steps:
        both = [read_checkpoint(run / f"iter_{step:07d}") for run in (whole, chunked)]
        parts = [part for part in ("decoder.", "embedding.", "output_layer.", "flow_head.") if any(
            name.startswith(part) for name in both[0]
        )]  # fmt: skip
        for prefix in (MOMENT, *parts):
            assert difference(*both, prefix) < (1e-6, "")
    for row, row_found in zip(*map(read_metrics, (whole, chunked)), strict=True):
        assert [row_found[t] for t in TERMS if t in row] == pytest.approx([row[t] for t in TERMS if t in row], rel=1e-6)


@pytest.mark.parametrize("layout", ["single", "tp2-sp", "tp2-pp2"])
def test_chunks_change_no_number(runs: Runs, layout: str) -> None:
    ranks, flags = LAYOUTS[layout]
    whole = runs.train(f"{layout}-whole", ranks, *runs.start(), *TWO_CLIPS, *EACH_STEP, *flags, *WHOLE)
    check_equal(whole, test_layouts.trained(runs, layout), (1, 3))


def test_weights_that_arrive_during_the_forward_pass_are_not_stale(runs: Runs) -> None:
    """Two replicas with sharded optimizers, whose gathering of weights overlaps the forward pass."""
    flags = (*runs.start(), *TWO_CLIPS, *EACH_STEP, *OWN_BUCKET)
    whole, chunked = (runs.train(f"buckets{name}", 2, *flags, *more) for name, more in (("-whole", WHOLE), ("", ())))
    check_equal(whole, chunked, (1, 3))


def test_tied_embeddings(runs: Runs) -> None:
    """The output layer's gradient joins the embedding's: in one process, and on two pipeline stages."""
    recipe = runs.once("tied.yaml", lambda path: write_recipe(path, runs.prepared, **TIED))
    single = runs.train("tied", 1, recipe=recipe)
    check_equal(runs.train("tied-whole", 1, *WHOLE, recipe=recipe), single, (3,))
    start = begin_with(single)
    both = (
        runs.train("tied-pp2-whole", 2, *start, *PP2, *WHOLE, recipe=recipe),
        runs.train("tied-pp2", 2, *start, *PP2, recipe=recipe),
    )
    check_equal(*both, (3,))


def test_packed_sequences(runs: Runs) -> None:
    start = (*runs.plain_start(), "--sfr-measure-interval", "1")
    flags = runs.with_data(test_objectives.OBJECTIVES["packed"])
    whole = runs.train("packed-whole", 1, *start, *flags, *WHOLE)
    check_equal(whole, test_objectives.trained(runs, "packed"), (3,))
