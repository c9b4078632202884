"""The training runs that the distributed tests look at: three starts of torchrun serve them all."""

from pathlib import Path

import pytest

from .launch import train_many
from .tiny import write_prepared, write_recipe

TP2, PP2 = ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")
SP, VPP = "--sequence-parallel", ("--num-layers-per-virtual-pipeline-stage", "1")
SHARDED_OPTIMIZER = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
RATIO = ("--sfr-weight-control", "ratio", "--train-iters", "4")

# Each trains on from the same checkpoint: {processes: {name: flags}}.
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
    },
}
# Single-process runs about phases; clipping would couple the backbone to the head's gradient norm.
PHASES: dict[str, tuple[str, ...]] = {
    "plain": ("--clip-grad", "0"),
    "weight-0": ("--sfr", "--sfr-weight", "0", "--clip-grad", "0"),
    "detached": ("--sfr", "--sfr-warmup", "detached", "--sfr-warmup-steps", "9", "--clip-grad", "0"),
    "ramp-0": ("--sfr", "--sfr-ramp-steps", "3", "--clip-grad", "0"),
    "head-only": ("--sfr", "--sfr-warmup-steps", "9", "--weight-decay", "0"),
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all runs, a folder each; checkpoints of every step."""
    folder = tmp_path_factory.mktemp("runs")
    prepared = write_prepared(folder / "data")
    recipe = write_recipe(folder / "recipe.yaml", prepared)
    plain = write_recipe(folder / "plain.yaml", prepared, sfr=False)
    tied = write_recipe(folder / "tied.yaml", prepared, untie_embeddings_and_output_weights=False)

    def run(source: Path, name: str, *flags: str) -> list[str]:
        return ["--recipe", str(source), "--save", str(folder / name), "--save-interval", "1", *flags]

    def layouts(processes: int) -> list[list[str]]:
        start = ("--pretrained-checkpoint", str(folder / "start"))
        return [run(recipe, name, *start, *flags) for name, flags in LAYOUTS[processes].items()]

    def resumes(processes: int) -> list[list[str]]:
        listing = []
        for name, flags in RESUMES[processes].items():
            listing.append(run(recipe, f"{name}-straight", *RATIO, *flags))
            listing += [run(recipe, name, *RATIO, *flags, "--exit-interval", stop) for stop in ("2", "4")]
        return listing

    phases = [run(plain, name, *flags) for name, flags in PHASES.items()]
    start = run(recipe, "start", "--train-iters", "1")
    fresh = ("--pretrained-checkpoint", str(folder / "plain"), "--sfr-fresh-head")
    validation = ("--valid-data-path", str(prepared), "--eval-iters", "2", "--eval-interval", "1")
    others = [
        run(recipe, "validated", "--pretrained-checkpoint", str(folder / "start"), *validation),
        run(tied, "tied"),
        run(recipe, "fresh-head", *fresh),
        run(recipe, "asynchronous", "--async-save", "--pretrained-checkpoint", str(folder / "start")),
    ]
    train_many(1, [start, *layouts(1), *resumes(1), *phases, *others], folder)
    tied_start = ("--pretrained-checkpoint", str(folder / "tied"))
    tied_runs = [run(tied, "tied-pp2", *tied_start, *PP2), run(tied, "tied-tp2", *tied_start, *TP2)]
    crossing = [
        run(recipe, "crossing", *RATIO, *TP2, "--exit-interval", "2"),
        run(recipe, "crossing", *RATIO, *PP2, "--exit-interval", "4"),
        run(recipe, "crossing-straight", *RATIO, *TP2),
    ]
    train_many(2, [*layouts(2), *resumes(2), *tied_runs, *crossing], folder)
    train_many(4, layouts(4), folder)
    return folder
