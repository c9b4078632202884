"""Context parallelism changes no loss, gradient or weight: two ranks share each sequence, with and without packing.

On gloo, with attention that gathers keys and values. Packed conversations are padded and divided one by one, as for
Transformer Engine, with upstream's rotary embedding and multi-token prediction of such sequences. Not exercised:
Transformer Engine's attention.
"""

import pytest

from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.targets.embed import embed
from megatron_sfr.training.data.packing import padded_lengths

from . import test_objectives
from .launch import read_checkpoint, read_metrics
from .runs import Runs
from .settings import EACH_STEP, MICRO_BATCH_1, OVERLAPPED, PP2, SHARDED_OPTIMIZER, SP, TP2, TWO_CLIPS
from .test_layouts import MOMENT, TERMS, difference, trained
from .tiny import BLOCKS

pytestmark = pytest.mark.distributed
CP2 = ("--context-parallel-size", "2")
LAYOUTS = {
    "cp2-tp2-sp": (4, (*CP2, *TP2, SP)),
    "cp2-pp2": (4, (*CP2, *PP2)),
    "cp2-dp2": (4, (*CP2, *SHARDED_OPTIMIZER, *OVERLAPPED)),
}
# What needs every anchor of a sample or of a microbatch, and attention that does not reach the sequence's start.
ALL_ANCHORS = (
    *("--sfr-loss", "cka", "--sfr-weight", "0.01", "--sfr-mean", "microbatch", "--window-size", "8,0"),
    *test_objectives.SED,
)
# Where not two ranks alone share each sequence of the batch. Packed sequences come one at a time.
DIVIDED = {
    "packed": (4, (*CP2, *TP2, SP, *MICRO_BATCH_1)),
    "mtp-packed": (2, (*CP2, *MICRO_BATCH_1)),
    "mtp": (4, (*CP2, *PP2)),
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


@pytest.mark.parametrize("name", ["packed", "documents", "layer", "gem", "mtp", "mtp-packed"])
def test_of_packed_sequences_and_of_other_objectives(runs: Runs, name: str) -> None:
    """Attention within texts that both ranks share, measurements of anchors, statistics of targets, multi-token
    prediction. The token losses are TOFU, EAFT, cross-entropy, GEM, DFT and cross-entropy; SED is in the next test."""
    flags = test_objectives.OBJECTIVES[name]
    start = (*test_objectives.start(runs, flags), "--sfr-measure-interval", "1")
    ranks, layout = DIVIDED.get(name, (2, CP2))
    divided = runs.train(f"{name}-cp2", ranks, *start, *runs.with_data(flags), *layout)
    both = test_objectives.trained(runs, name), divided
    single, other = (read_checkpoint(run / "iter_0000003") for run in both)
    for prefix in (MOMENT, *test_objectives.parts(name)):
        assert difference(single, other, prefix) < (2e-5, "")
    test_objectives.check_equal_terms(*map(read_metrics, both))


def test_of_all_anchors_in_one_place_and_of_targets_that_one_rank_encodes(runs: Runs) -> None:
    start, store = (*runs.plain_start(), "--sfr-measure-interval", "1"), "online-cp2"
    later = {"later": True, "progress": False}
    runs.once(f"{store}.store", lambda _: embed(runs.prepared, "minilm", BLOCKS, output=runs.prepared / store, **later))
    online = ("--sfr-targets", "online", "--sfr-target-store", store)

    whole = runs.train("all-anchors", 1, *start, *ALL_ANCHORS)
    divided = runs.train("all-anchors-cp2", 2, *start, *ALL_ANCHORS, *online, *CP2)

    single, other = (read_checkpoint(run / "iter_0000003") for run in (whole, divided))
    for prefix in PARTS:
        assert difference(single, other, prefix) < (2e-5, "")
    records = [read_metrics(run) for run in (whole, divided)]
    test_objectives.check_equal_terms(*records)
    assert all(record["sfr grad ratio"] > 0.1 for record in records[0][1:])  # step 1 precedes its measurement
    assert records[1][0]["target wait"] > 0, "the encoder was not even loaded"


def test_the_packed_conversations_are_padded(runs: Runs) -> None:
    """Otherwise the test above would divide texts that have equal parts without padding."""
    lengths = PreparedData.open(runs.twenty_six).positions
    assert (padded_lengths(lengths, 4) != lengths).sum() > 10
