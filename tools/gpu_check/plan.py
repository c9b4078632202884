"""What the check runs: tests, short trainings whose losses are compared, benchmarks.

On a machine without a GPU the same trainings run on the CPU backend, which checks the plan itself (`--dry-run`).
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_sfr.launch import command
from tools.gpu_check.steps import Comparison, Step

PYTHON = (sys.executable, "-m")
CPU = ("--sfr-backend", "cpu")
LOCAL, TE = ("--transformer-impl", "local"), ("--transformer-impl", "transformer_engine", "--bf16")
FP8 = (*TE, "--fp8-format", "hybrid", "--fp8-recipe", "tensorwise")
SFR = "--sfr --sfr-fresh-head --sfr-head-width 64 --sfr-measure-interval 2 --sfr-draws 2".split()
SHARDED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
PACKED = ("--sfr-packing", "first_fit_decreasing")
ONLINE = ("--sfr-targets", "online", "--sfr-target-store", "online")
# Transformer Engine's fused attention adds in another order in each run unless it is told not to, which takes memory.
DETERMINISTIC = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
FP32, BF16, EIGHT_BITS, PACKING = 2e-4, 2e-2, 6e-2, 2e-3  # relative differences of losses after six steps
TESTS = ("tests/gpu", "tests/runtime/test_noise.py")


@dataclass(frozen=True)
class Machine:
    """Where the check runs; why_not_* say why a kind of step cannot run here, '' where it can."""

    folder: Path
    dry_run: bool
    why_not_cuda: str = ""
    why_not_engine: str = ""
    encoder: str = "minilm"
    """Of the targets: a sentence-transformers folder or name."""

    def train(self, name: str, *flags: str, engine: bool = True, save: str | None = None, limit_s: float = 120) -> Step:
        """A training of six steps. engine: with Transformer Engine; in a dry run everything is local and on the CPU."""
        data, folder = self.folder / "data", self.folder / "runs" / (save or name)
        given = flags
        if self.dry_run:
            given = (*(flag for flag in flags if flag not in {*FP8, *LOCAL, *CPU}), *CPU)
        start = ("--pretrained-checkpoint", str(data / "start"), "--save", str(folder))
        blocked = "" if self.dry_run or flags[-2:] == CPU else self.why_not_engine if engine else self.why_not_cuda
        words = tuple(command(data / "recipe.yaml", 1, [*start, *given]))
        return Step(name, words, limit_s, ("data",), metrics=folder / "metrics.jsonl", why_not=blocked)

    def rest(self) -> str:
        return "a dry run has no GPU" if self.dry_run else self.why_not_cuda


def trainings(machine: Machine) -> list[Step | Comparison]:
    """Each backend and precision from the same weights, on the same data."""
    train = machine.train
    one = (*TE, *SFR, "--train-iters", "1", "--global-batch-size")  # a step on all conversations
    counts = machine.folder / "data" / "sequences.json"
    apart = replace(train("te_apart", *one, "{apart}"), values=counts)
    packed = replace(train("te_packed", *one, "{packed}", *PACKED), values=counts)
    straight = train("te_straight", *TE, *SFR)
    stopped = train("te_stopped", *TE, *SFR, "--exit-interval", "3")
    resumed = replace(train("te_resumed", *TE, *SFR, save="te_stopped"), needs=("data", "te_stopped"))
    return [
        train("cpu_ce", *LOCAL, *CPU, engine=False),
        train("cpu_sfr", *SFR, *LOCAL, *CPU, engine=False),
        train("local_fp32", *LOCAL, *SFR, engine=False),
        Comparison("local_fp32", "cpu_sfr", FP32),
        train("local_bf16", *LOCAL, "--bf16", *SFR, engine=False),
        Comparison("local_bf16", "cpu_sfr", BF16),
        train("te_ce", *TE),
        Comparison("te_ce", "cpu_ce", BF16),
        train("te_bf16", *TE, *SFR, *SHARDED),
        Comparison("te_bf16", "cpu_sfr", BF16),
        train("te_fp8", *FP8, *SFR, *SHARDED),
        Comparison("te_fp8", "cpu_sfr", EIGHT_BITS),
        apart,
        packed,
        Comparison("te_packed", "te_apart", PACKING, first_step_only=True),
        *(replace(step, environment=DETERMINISTIC) for step in (straight, stopped, resumed)),
        Comparison("te_resumed", "te_straight", 0.0),
        train("te_online", *TE, *SFR, *ONLINE),
        Comparison("te_online", "te_straight", BF16),
    ]


def benchmarks(machine: Machine) -> list[Step]:
    """Timings, one after the other. A dry run takes sizes that a CPU can do."""
    small = (
        "--repetitions 3 --layers 1 --hidden 64 --ffn 128 --heads 4 --groups 2 --kv-channels 16 --vocab 512 --seq 64"
    )
    sizes = tuple((small if machine.dry_run else "--like qwen3-8b").split())
    loss = "--tokens 256 --repetitions 2" if machine.dry_run else "--like qwen3-8b"
    engine = () if machine.dry_run else ("--transformer-impl", "transformer_engine", "--bf16")
    overhead, no_engine = (*PYTHON, "tools.bench_overhead", *sizes), machine.why_not_engine
    head = "--tokens 64 --vocabulary 512 --hidden 16 --chunk 16 --repetitions 2" if machine.dry_run else ""
    json = machine.folder / "json"
    return [
        Step("bench_loss", (*PYTHON, "tools.bench_loss", *loss.split(), "--json", f"{json}-loss.json"), 300, lines=20),
        Step("bench_head", (*PYTHON, "tools.bench_head", *head.split(), "--json", f"{json}-head.json"), 300, lines=30),
        Step("bench_te", (*overhead, *engine, "--json", f"{json}-te.json"), 300, lines=6, why_not=no_engine),
        Step(
            "bench_fp8",
            (*overhead, *engine, "--fp8", "tensorwise", "--json", f"{json}-fp8.json"),
            300,
            lines=6,
            why_not=machine.rest() or no_engine,
        ),
        Step("bench_local", (*overhead, "--bf16", "--json", f"{json}-local.json"), 300, lines=6),
    ]


def plan(machine: Machine) -> list[Step | Comparison]:
    """All steps in order; the benchmarks come last, with nothing beside them."""
    pytest = (*PYTHON, *"pytest -q -m gpu -o filterwarnings=default -p no:cacheprovider --maxfail=5".split(), *TESTS)
    return [
        Step(
            "doctor", (*PYTHON, "megatron_sfr.cli", "doctor", "--deep", "--folder", str(machine.folder)), 120, lines=20
        ),
        Step("tests_gpu", pytest, 300, lines=3, why_not=machine.rest()),
        Step("data", (*PYTHON, "tools.gpu_check.data", str(machine.folder / "data"), machine.encoder), 240),
        *trainings(machine),
        *benchmarks(machine),
    ]
