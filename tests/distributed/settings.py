"""Flags that the trainings of several test files have in common."""

from megatron_sfr.training.lm_head import CHUNK_TOKENS

TP2, PP2 = ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")
SP, VPP = "--sequence-parallel", ("--num-layers-per-virtual-pipeline-stage", "1")
SHARDED_OPTIMIZER = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
OVERLAPPED = ("--overlap-grad-reduce", "--overlap-param-gather")
MICRO_BATCH_1, MICRO_BATCH_4 = ("--micro-batch-size", "1"), ("--micro-batch-size", "4")  # of 4 sequences a step
RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
EACH_STEP, HALFWAY = ("--save-interval", "1"), ("--save-interval", "2")  # of the four steps of RATIO
RATIO = ("--sfr-weight-control", "ratio", "--train-iters", "4")
LATE = ("--sfr-warmup", "detached", "--sfr-warmup-steps", "1")  # the EMA starts when the head has learned for a step
SMOOTH = ("--sfr-ema", "smooth", "--sfr-ema-decay", "0.5", *LATE)
TEACHER = ("--sfr-ema", "teacher", "--sfr-ema-decay", "0.5", *LATE)

# Head and backbone are clipped in every step, each by its own norm, and the head has its own learning rate.
TWO_CLIPS = ("--clip-grad", "0.5", "--sfr-clip-grad", "0.1", "--sfr-head-lr-mult", "0.5")
CLIP = ("--clip-grad", "0.05")  # in every step, too

# KL-flow: two positions more than the sequences have, one for the time.
KL_FLOW = (
    *("--training-task", "kl-flow", "--seq-length", "84", "--max-position-embeddings", "84"),
    *("--loss-chunk-tokens", str(CHUNK_TOKENS)),  # the default: it has no chunks
)
