"""Context parallelism changes no loss, gradient or weight: two ranks share each sequence, with and without packing.

On gloo, with attention that gathers keys and values. Not exercised: Transformer Engine's attention.
"""

import pytest

from . import test_objectives
from .launch import read_checkpoint, read_metrics
from .runs import Runs
from .settings import EACH_STEP, OVERLAPPED, PP2, SHARDED_OPTIMIZER, SP, TP2, TWO_CLIPS
from .test_layouts import MOMENT, TERMS, difference, trained

pytestmark = pytest.mark.distributed
CP2 = ("--context-parallel-size", "2")
LAYOUTS = {
    "cp2": (2, CP2),
    "cp2-tp2-sp": (4, (*CP2, *TP2, SP)),
    "cp2-pp2": (4, (*CP2, *PP2)),
    "cp2-dp2": (4, (*CP2, *SHARDED_OPTIMIZER, *OVERLAPPED)),
}
PARTS = (MOMENT, "decoder.", "embedding.", "output_layer.", "flow_head.")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dividing_sequences_changes_no_number(runs: Runs, layout: str) -> None:
    ranks, flags = LAYOUTS[layout]
    both = trained(runs, "single"), runs.train(layout, ranks, *runs.start(), *TWO_CLIPS, *EACH_STEP, *flags)
    for step in (1, 3):
        single, other = (read_checkpoint(run / f"iter_{step:07d}") for run in both)
        for prefix in PARTS if step == 1 else PARTS[1:]:
            assert difference(single, other, prefix) < (1e-5, "")
    for row, row_found in zip(*map(read_metrics, both), strict=True):
        assert [row_found[t] for t in TERMS] == pytest.approx([row[t] for t in TERMS], rel=1e-5)


@pytest.mark.parametrize("name", ["packed", "documents", "layer", "gem"])
def test_of_packed_sequences_and_of_other_objectives(runs: Runs, name: str) -> None:
    """Attention within texts that both ranks share, measurements of anchors, statistics of targets."""
    start = (*runs.plain_start(), "--sfr-measure-interval", "1")
    flags = runs.with_data(test_objectives.OBJECTIVES[name])
    divided = runs.train(f"{name}-cp2", 2, *start, *flags, *CP2)
    both = test_objectives.trained(runs, name), divided
    single, other = (read_checkpoint(run / "iter_0000003") for run in both)
    for prefix in PARTS:
        assert difference(single, other, prefix) < (2e-5, "")
    test_objectives.check_equal_terms(*map(read_metrics, both))
