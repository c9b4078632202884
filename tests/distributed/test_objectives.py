"""Every token objective and every kind of term gives the same numbers however the batch and the model are split (P9,
G5, S5): Adam's first moments after three steps hold the gradients of all three, the weights what came of them.

Not exercised: context parallelism (test_contexts.py).
"""

from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_sfr.objectives.token.loss_base import TokenLoss
from megatron_sfr.objectives.token.registry import LOSSES, path_of
from megatron_sfr.option_names import to_arguments
from tests.objectives.token.token_cases import ALL_LOSSES

from .launch import read_checkpoint, read_metrics
from .runs import Runs, begin_with
from .settings import LATE, MICRO_BATCH_1, OVERLAPPED, PP2, RECOMPUTE, SHARDED_OPTIMIZER, SMOOTH, SP, TEACHER, TP2, VPP
from .test_layouts import MOMENT, difference

pytestmark = pytest.mark.distributed
LOOKED_AT = ("entropy", "lock share", "fork share", "lock entropy", "fork entropy", "future dispersion")
TWO_HORIZONS = ("--train-data-path", "{two_horizons}")
TWENTY_SIX = ("--train-data-path", "{twenty_six}", "--seq-length", "200", "--max-position-embeddings", "200")
PER_CONVERSATION = ("--sfr-time-per", "sequence", "--sfr-anchors", "nearest", "--sfr-gate", "dynamic")
FIRST_FIT = ("--sfr-packing", "first_fit_decreasing", "--global-batch-size", "8")
WHITEN = ("--sfr-target-scale", "whiten")
WHITEN_EMA = (*WHITEN, "--sfr-whiten", "ema", "--sfr-whiten-decay", "0.5")
# With thresholds that separate the positions of a model that knows next to nothing: its entropies are near ln 501.
LOCK_FORK = ("--sfr-lock-fork-interval", "1", "--sfr-lock-top", "0", "--sfr-fork-dispersion", "0.9")
AROUND_6_2091 = ("--sfr-lock-entropy", "6.2090", "--sfr-fork-entropy", "6.2092")
AROUND_6_2097 = ("--sfr-lock-entropy", "6.2096", "--sfr-fork-entropy", "6.2098")
NEAREST = ("--sfr-anchors", "nearest", "--sfr-time-per", "sequence")
MTP = ("--mtp-num-layers", "1")
SED = ("--objective", "sed", "--sed-top-k", "5", "--sed-threshold", "0.015", "--sed-weight", "50")

# Flags beside those of a token loss, which override its settings: kinds of SFR to train it with.
BESIDE_LOSSES: dict[str, tuple[str, ...]] = {
    "gem": ("--sfr-head", "adaln", "--sfr-time", "logit_normal", *TWO_HORIZONS, *WHITEN),
    "gem-logsigmoid": ("--gem-slope", "0.3", "--sfr-loss", "cosine"),
    "sed": (*SED[2:], *WHITEN_EMA),
    "dft": ("--sfr-loss", "cka", "--sfr-weight", "0.001", *LOCK_FORK, *AROUND_6_2097),
}


def loss_flags(loss: TokenLoss) -> tuple[str, ...]:
    """The flags that select a loss with its options; by its dotted path if it is not of this package."""
    kind = type(loss)
    [name] = [name for name, registered in LOSSES.items() if registered.loss is kind]
    own = not kind.__module__.startswith("megatron_sfr.")
    flags = ["--objective", path_of(kind) if own else name]
    for option, value in to_arguments(loss).items():
        flags += [f"--{option.replace('_', '-')}", str(value)]
    return tuple(flags)


TOFU, EAFT, DFT = (loss_flags(ALL_LOSSES[name]) for name in ("tofu", "eaft", "dft"))
# The first setting of each loss, and further ones that are listed above. All other runs train cross-entropy. ASFT needs
# a reference: test_asft.py trains it.
TOKEN_LOSSES = {
    label: (*loss_flags(ALL_LOSSES[label]), *BESIDE_LOSSES.get(label, ()))
    for name, registered in LOSSES.items()
    for i, label in enumerate(registered.examples)
    if name not in ("ce", "asft") and (i == 0 or label in BESIDE_LOSSES)
}
# Every token loss and kind of auxiliary loss in a few combinations; each with the layouts below against one process.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    **TOKEN_LOSSES,
    "mse": ("--sfr-loss", "mse", "--sfr-weight-control", "ratio"),
    "smooth": SMOOTH,
    "teacher": (*TEACHER, "--sfr-weight-control", "ratio"),
    "gate": ("--sfr-gate", "static", "--sfr-gate-threshold", "1e9", "--sfr-gate-bins", "4"),  # closed from step 2 on
    # The mean over a microbatch, as in the authors' code, depends on how the batch is split.
    "reference": ("--sfr-preset", "reference", "--sfr-mean", "tokens", "--sfr-head-width", "24", *LATE),
    "layer": ("--sfr-layer", "4", *NEAREST, *TWO_HORIZONS, *LOCK_FORK, *AROUND_6_2091),
    # 26 conversations fit 8 sequences of 200 tokens: a step is an epoch, and so it is in UNPACKED. These train other
    # objectives than cross-entropy for test_contexts.py, which divides their sequences.
    "packed": (*TWENTY_SIX, *FIRST_FIT, *TEACHER, *TOFU),
    "packed-sequence": (*TWENTY_SIX, *FIRST_FIT, *PER_CONVERSATION),
    "documents": ("--train-data-path", "{documents}", "--dataloader-inter-document-masking", *TEACHER, *EAFT),
    "mtp": (*MTP, *DFT),
    "mtp-packed": (*MTP, *TWENTY_SIX, *FIRST_FIT),
}
UNPACKED = {
    "packed": (*TWENTY_SIX, *TEACHER, *TOFU, "--global-batch-size", "26"),
    "packed-sequence": (*TWENTY_SIX, *PER_CONVERSATION, "--global-batch-size", "26"),
    "mtp-packed": (*MTP, *TWENTY_SIX, "--global-batch-size", "26"),
}
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {  # name: processes, flags
    "single": (1, ()),
    "tp2-sp": (2, (*TP2, SP)),
    "dp2": (2, (*MICRO_BATCH_1, *SHARDED_OPTIMIZER, *OVERLAPPED)),
    "pp2-vpp": (2, (*PP2, *VPP, *RECOMPUTE)),
    "tp4": (4, ("--tensor-model-parallel-size", "4")),
    "tp2-pp2": (4, (*TP2, *PP2)),
    "tp2-pp2-sp": (4, (*TP2, *PP2, SP)),
}


def has_layout(objective: str, layout: str) -> bool:
    """Terms have two layouts, most of them with TP, PP, SP, DP and microbatches in them. Token losses see neither the
    pipeline nor other replicas; the one that selects tokens by their rank in the vocabulary is split over four ranks
    too."""
    if objective == "mtp-packed":  # compared with the same conversations apart, and divided in test_contexts.py
        return layout == "single"
    if objective == "mtp":
        return layout in ("single", "dp2", "tp2-pp2-sp")
    if layout == "pp2-vpp":  # where each stage needs to know the conversations
        return objective in ("packed", "documents")
    if objective in TOKEN_LOSSES:
        if layout in ("tp4", "tp2-pp2"):
            return objective == "sed"
        return layout in ("single", "tp2-sp") or (layout == "dp2" and objective in BESIDE_LOSSES)
    return layout in ("single", "dp2", "tp2-sp" if objective in ("mse", "smooth", "gate") else "tp2-pp2-sp")


CASES = [(name, layout) for layout in LAYOUTS for name in OBJECTIVES if layout != "single" and has_layout(name, layout)]


def trained(runs: Runs, name: str, layout: str = "single") -> Path:
    """Three steps of an objective in a layout, measured at each."""
    ranks, flags = LAYOUTS[layout]
    return _trained(runs, f"{name}-{layout}", ranks, *OBJECTIVES[name], *flags)


def _trained(runs: Runs, name: str, ranks: int, *flags: str) -> Path:
    return runs.train(name, ranks, *start(runs, flags), "--sfr-measure-interval", "1", *runs.with_data(flags))


def start(runs: Runs, flags: Sequence[str]) -> tuple[str, ...]:
    """Flags that begin with a backbone that has the layers that the flags ask for, and a fresh head."""
    if MTP[0] not in flags:
        return runs.plain_start()
    return *begin_with(runs.train("plain-mtp", 1, *MTP, "--train-iters", "1", recipe=runs.plain)), "--sfr-fresh-head"


@pytest.mark.parametrize(("objective", "layout"), CASES)
def test_P9_layout_changes_no_number(runs: Runs, objective: str, layout: str) -> None:
    both = [trained(runs, objective, x) for x in ("single", layout)]
    single, other = (read_checkpoint(run / "iter_0000003") for run in both)
    for prefix in (MOMENT, *parts(objective)):
        assert difference(single, other, prefix) < (2e-5, "")
    check_equal_terms(*map(read_metrics, both))


def parts(objective: str) -> list[str]:
    """The beginnings of the names of a model's tensors."""
    return ["decoder.", "embedding.", "output_layer.", "flow_head.", *(["mtp."] if objective.startswith("mtp") else [])]


def check_equal_terms(expected: list[dict[str, float]], found: list[dict[str, float]]) -> None:
    for row, row_found in zip(expected, found, strict=True):
        ours = [t for t in row if t.startswith("sfr") or t.endswith("loss") or t == "grad-norm"]
        ours += [t for t in row if t in LOOKED_AT]
        assert [row_found[t] for t in ours] == pytest.approx([row[t] for t in ours], rel=2e-5, abs=1e-7)


@pytest.mark.parametrize("name", UNPACKED)
def test_packing_changes_no_number(runs: Runs, name: str) -> None:
    """26 conversations in 8 sequences, against one each: losses, gradients of three steps, weights."""
    both = _trained(runs, f"{name}-apart", 1, *UNPACKED[name]), trained(runs, name)
    apart, packed = (read_checkpoint(run / "iter_0000003") for run in both)
    for prefix in (MOMENT, *parts(name)):
        assert difference(apart, packed, prefix) < (2e-5, "")
    check_equal_terms(*map(read_metrics, both))


def test_each_setting_does_something(runs: Runs) -> None:
    """Otherwise the test above would compare a term that is not there."""
    singles = {name: trained(runs, name) for name in OBJECTIVES}
    last = {name: read_metrics(run)[-1] for name, run in singles.items()}
    for objective in TOKEN_LOSSES:
        name = objective.partition("-")[0]
        assert last[objective][f"{name} loss"] != pytest.approx(last[objective]["lm loss"], rel=1e-4)
    assert last["gate"]["sfr gate"] == 0
    for objective in ("layer", "dft"):
        assert all(0.05 < last[objective][share] < 0.95 for share in ("lock share", "fork share"))
        assert last[objective]["lock entropy"] < last[objective]["entropy"] < last[objective]["fork entropy"]
    assert 0.9 < last["layer"]["future dispersion"] < 1.1
    assert "future dispersion" not in last["dft"]
    assert last["mtp"]["mtp_1 loss"] > 1
    assert 0 <= last["mtp"]["mtp_1_acceptance_rate"] <= 100
    states = {name: read_checkpoint(run / "iter_0000003") for name, run in singles.items()}
    assert states["sed"]["flow_head.state.batches"] == 3
    assert states["gem"]["flow_head.net.horizon.weight"].shape[0] == 2
    assert states["gem"]["flow_head.state.target_mean"].any()
    assert not any(name.startswith("flow_head.net") for name in states["dft"])
    averages = [name for name in states["teacher"] if name.startswith("flow_head.ema")]
    assert len(averages) > 5
    assert any((states["teacher"][n] != states["teacher"][n.replace(".ema.", ".net.")]).any() for n in averages)
    heads = ("mse", "smooth", "gate", "reference")
    assert len({states[name]["flow_head.net.output.weight"].sum().item() for name in heads}) == len(heads)
