"""The layouts, resumes, phases and objectives that the distributed tests train: {processes: {name: flags}}."""

from megatron_sfr.objectives.token.loss_base import TokenLoss
from megatron_sfr.objectives.token.registry import LOSSES, path_of
from megatron_sfr.option_names import to_arguments
from tests.objectives.token.token_cases import ALL_LOSSES, CLOSED_FORM_LOSSES

TP2, PP2 = ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")
SP, VPP = "--sequence-parallel", ("--num-layers-per-virtual-pipeline-stage", "1")
SHARDED_OPTIMIZER = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
RATIO = ("--sfr-weight-control", "ratio", "--train-iters", "4")
LATE = ("--sfr-warmup", "detached", "--sfr-warmup-steps", "1")  # the average starts when the head has learnt for a step
SMOOTH = ("--sfr-ema", "smooth", "--sfr-ema-decay", "0.5", *LATE)
TEACHER = ("--sfr-ema", "teacher", "--sfr-ema-decay", "0.5", *LATE)
GATE = ("--sfr-gate", "dynamic", "--sfr-gate-ratio", "1.01", "--sfr-gate-bins", "4")
WHITEN = ("--sfr-target-scale", "whiten")
WHITEN_EMA = (*WHITEN, "--sfr-whiten", "ema", "--sfr-whiten-decay", "0.5")
TWO_HORIZONS = ("--train-data-path", "{two_horizons}")
TWENTY_SIX = ("--train-data-path", "{twenty_six}", "--seq-length", "200", "--max-position-embeddings", "200")
PER_CONVERSATION = ("--sfr-time-per", "sequence", "--sfr-anchors", "nearest", "--sfr-gate", "dynamic")
# With thresholds that part the positions of a model that knows next to nothing: all its entropies are near ln 501.
LOCK_FORK = ("--sfr-lock-fork-interval", "1", "--sfr-lock-top", "0", "--sfr-fork-dispersion", "0.9")
AROUND_6_2084 = ("--sfr-lock-entropy", "6.2083", "--sfr-fork-entropy", "6.2085")
AROUND_6_2093 = ("--sfr-lock-entropy", "6.2092", "--sfr-fork-entropy", "6.2094")
APART: dict[str, tuple[str, ...]] = {
    "packed": (*TWENTY_SIX, *TEACHER, "--global-batch-size", "26"),
    "packed-sequence": (*TWENTY_SIX, *PER_CONVERSATION, "--global-batch-size", "26"),
}

# Head and backbone are clipped in every step, each by its own norm, and the head has its own learning rate.
TWO_CLIPS = ("--clip-grad", "0.5", "--sfr-clip-grad", "0.1", "--sfr-head-lr-mult", "0.5")

# Each trains on from the same checkpoint with TWO_CLIPS: {processes: {name: flags}}.
LAYOUTS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {"single": (), "micro-batch-4": ("--micro-batch-size", "4"), "recompute": RECOMPUTE},
    2: {
        "tp2": TP2,
        "tp2-sp": (*TP2, SP),
        "pp2": PP2,
        "pp2-vpp": (*PP2, *VPP),
        "dp2": (),
        "dp2-sharded": (*SHARDED_OPTIMIZER, "--overlap-grad-reduce", "--overlap-param-gather"),
    },
    4: {
        "tp2-pp2": (*TP2, *PP2),
        "tp2-pp2-sp": (*TP2, *PP2, SP),
        "tp2-dp2-sharded": (*TP2, *SHARDED_OPTIMIZER),
    },
}
# Each runs 4 steps straight, and again with a stop after 2.
RESUMES: dict[int, dict[str, tuple[str, ...]]] = {
    1: {"resume-single": (), "resume-bf16": ("--bf16",)},
    2: {
        "resume-pp2": PP2,
        "resume-dp2-buckets": ("--use-distributed-optimizer",),
        "resume-dp2-sharded": SHARDED_OPTIMIZER,
        "resume-smooth-bf16-sharded": (
            "--bf16",
            *SHARDED_OPTIMIZER,
            "--overlap-grad-reduce",
            "--overlap-param-gather",
            *SMOOTH,
        ),
        "resume-smooth-bf16-dp2": ("--bf16", *SMOOTH),
        "resume-teacher": (*PP2, *TEACHER, *GATE, "--sfr-target-scale", "whiten", "--sfr-whiten", "ema"),
    },
}
# As a run of LAYOUTS or RESUMES, with targets that are encoded meanwhile: {processes: {name: (its twin, flags)}}.
ONLINE: dict[int, dict[str, tuple[str, tuple[str, ...]]]] = {
    2: {"online-dp2": ("dp2", ())},
    4: {"online-tp2-pp2-sp": ("tp2-pp2-sp", (*TP2, *PP2, SP))},
}
ONLINE_STOPPED, ITS_TWIN = "online-stopped", "resume-single-straight"

# Flags beside those of a token loss, which override its settings: kinds of SFR to train it with.
BESIDE_LOSSES: dict[str, tuple[str, ...]] = {
    "gem": ("--sfr-head", "adaln", "--sfr-time", "logit_normal", *TWO_HORIZONS, *WHITEN),
    "gem-logsigmoid": ("--gem-slope", "0.3", "--sfr-loss", "cosine"),
    "sed": ("--sed-top-k", "5", "--sed-threshold", "0.015", "--sed-weight", "50", *WHITEN_EMA),
    "dft": ("--sfr-loss", "cka", "--sfr-weight", "0.001", *LOCK_FORK, *AROUND_6_2093),
}
NOT_TRAINED = {"ce", "sed-10", "sed-128"}  # all other runs train cross-entropy; k matters only to the kernels


def loss_flags(loss: TokenLoss) -> tuple[str, ...]:
    """The flags that select a loss with its options; by its dotted path if it is not of this package."""
    kind = type(loss)
    [name] = [name for name, registered in LOSSES.items() if registered.loss is kind]
    own = not kind.__module__.startswith("megatron_sfr.")
    flags = ["--objective", path_of(kind) if own else name]
    for option, value in to_arguments(loss).items():
        flags += [f"--{option.replace('_', '-')}", str(value)]
    return tuple(flags)


TOKEN_LOSSES = {
    label: (*loss_flags(loss), *BESIDE_LOSSES.get(label, ()))
    for label, loss in ALL_LOSSES.items()
    if label not in NOT_TRAINED
}
# Every token loss and kind of term in a few combinations; each with the layouts below against one process.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    **TOKEN_LOSSES,
    "mse": ("--sfr-loss", "mse", "--sfr-weight-control", "ratio"),
    "smooth": SMOOTH,
    "teacher": (*TEACHER, "--sfr-weight-control", "ratio"),
    "gate": ("--sfr-gate", "static", "--sfr-gate-threshold", "1e9", "--sfr-gate-bins", "4"),  # closed from step 2 on
    "reference": ("--sfr-preset", "reference", "--sfr-head-width", "24", *LATE),
    "layer": (
        "--sfr-layer",
        "4",
        "--sfr-anchors",
        "nearest",
        "--sfr-time-per",
        "sequence",
        *TWO_HORIZONS,
        *LOCK_FORK,
        *AROUND_6_2084,
    ),
    # 26 conversations fit 8 rows of 200 tokens: a step is an epoch, and so it is for "apart", which does not pack.
    "packed": (*TWENTY_SIX, "--sfr-packing", "first_fit_decreasing", *TEACHER),
    "packed-sequence": (*TWENTY_SIX, "--sfr-packing", "first_fit_decreasing", *PER_CONVERSATION),
    "documents": ("--train-data-path", "{documents}", "--dataloader-inter-document-masking", *TEACHER),
    "mtp": ("--mtp-num-layers", "1", "--vocab-size", "512"),  # upstream's own loss counts padded columns: have none
}
OBJECTIVE_LAYOUTS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {"single": ()},
    2: {
        "tp2-sp": (*TP2, SP),
        "dp2": ("--micro-batch-size", "4", *SHARDED_OPTIMIZER, "--overlap-grad-reduce", "--overlap-param-gather"),
        "pp2-vpp": (*PP2, *VPP, *RECOMPUTE),
    },
    4: {"tp4": ("--tensor-model-parallel-size", "4"), "tp2-pp2": (*TP2, *PP2), "tp2-pp2-sp": (*TP2, *PP2, SP)},
}


def has_layout(objective: str, layout: str) -> bool:
    """Token objectives are cut in every way; terms in two that together hold TP, PP, SP, DP and micro-batches."""
    if objective == "mtp":  # with sequence parallelism upstream's local norm refuses it, and so do we
        return layout in ("single", "dp2", "tp2-pp2")
    if layout == "pp2-vpp":  # where each stage needs to know the conversations
        return objective in ("packed", "documents")
    if objective in TOKEN_LOSSES:
        gathered = objective not in CLOSED_FORM_LOSSES  # a loss in plain torch: only the vocabulary's split matters
        return layout in (("single", "tp2-sp") if gathered else ("single", "dp2", "tp2-sp", "tp4", "tp2-pp2"))
    return layout in ("single", "dp2", "tp2-pp2-sp")


# KL-flow: two positions more than the rows have, one for the time; each trains on from a checkpoint of its kind.
KL_FLOW = ("--training-task", "kl-flow", "--seq-length", "84", "--max-position-embeddings", "84")
TIED = ("--recipe", "{tied}")  # beside the first recipe
KL_FLOWS: dict[str, tuple[str, ...]] = {
    "token": ("--kl-flow-infill", "0.5"),
    "adaln": ("--kl-flow-time", "adaln", "--normalization", "LayerNorm"),
    "documents": (*TIED, "--train-data-path", "{documents}", "--kl-flow-infill", "0.5"),
}
KL_FLOW_LAYOUTS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {"single": (), "micro-batch-4": ("--micro-batch-size", "4"), "recompute": RECOMPUTE},
    2: {
        "tp2": TP2,
        "tp2-sp": (*TP2, SP),
        "pp2-vpp": (*PP2, *VPP),
        "dp2-sharded": (*SHARDED_OPTIMIZER, "--overlap-grad-reduce", "--overlap-param-gather"),
    },
    4: {"tp2-pp2": (*TP2, *PP2), "tp2-pp2-sp": (*TP2, *PP2, SP)},
}
KL_FLOW_RESUME = ("--bf16", *TP2, SP, "--train-iters", "4", "--kl-flow-infill", "0.5")


def has_kl_flow(name: str, layout: str) -> bool:
    """The token in every layout; what differs from it where that can show."""
    if name == "adaln":
        return layout not in ("recompute", "micro-batch-4")
    return name == "token" or layout in ("single", "tp2-pp2-sp", "dp2-sharded")


# Single-process runs about phases; gradients are clipped in every step.
CLIP = ("--clip-grad", "0.05")
DETACHED = ("--sfr", "--sfr-warmup", "detached", "--sfr-warmup-steps", "9", *CLIP)
# A static gate that closes after the first step, which belongs to phase A.
CLOSED = ("--sfr", "--sfr-gate", "static", "--sfr-gate-threshold", "1e9", *LATE, *CLIP)
PHASES: dict[str, tuple[str, ...]] = {
    "plain": CLIP,
    "weight-0": ("--sfr", "--sfr-weight", "0", *CLIP),
    "detached": DETACHED,
    "closed": CLOSED,
    "ramp-0": ("--sfr", "--sfr-ramp-steps", "3", *CLIP),
    "head-only": ("--sfr", "--sfr-warmup-steps", "9", "--weight-decay", "0"),
    "clipped-head": ("--sfr", "--sfr-clip-grad", "0.01", *CLIP),
    "unclipped-head": ("--sfr", "--sfr-clip-grad", "0", *CLIP),
    "slow-head": ("--sfr", "--sfr-head-lr-mult", "0.25", "--train-iters", "1"),
    "weight-on-loss": ("--sfr", "--sfr-weight-on", "loss", "--sfr-weight", "50", "--train-iters", "1", *CLIP),
    "weight-50": ("--sfr", "--sfr-weight", "50", "--train-iters", "1", *CLIP),
    "weight-1": ("--sfr", "--train-iters", "1", *CLIP),
}
# Layouts in which a head without a weight changes no bit of the backbone; each also runs without a head, "plain".
UNTOUCHED_LAYOUTS: dict[str, tuple[str, ...]] = {
    "tp2": TP2,
    "pp2": PP2,
    "dp2-sharded": (*SHARDED_OPTIMIZER, "--overlap-grad-reduce", "--overlap-param-gather"),
    "dp2-sharded-bf16": ("--bf16", *SHARDED_OPTIMIZER),
}
UNTOUCHED = {"plain": CLIP, "detached": DETACHED, "closed": CLOSED}
