"""The speed of a run, logged beside its losses: time of a step, tokens/s, TFLOP/s, MFU, waits, memory, time left.

Time is that of Megatron's timer `interval-time`, which stops during validation and checkpoints. The scalars are named
`speed/...`.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

from megatron_sfr.runtime.devices import BF16, FP8, peak, peak_memory
from megatron_sfr.runtime.parallel import largest_of_all
from megatron_sfr.runtime.replacements import Replacement, wrapper
from megatron_sfr.training.timing.operations import backbone_operations

PREFIX = "speed/"


class SpeedLog:
    """Measures the steps of a process. Every rank has one: waits and memory are the largest of all ranks."""

    def __init__(self, device: str | None, wandb: Callable[[], Any] = lambda: None) -> None:
        """
        Args:
            device: name of this rank's GPU; None on CPU.
            wandb: returns upstream's W&B writer, on the rank that has one.
        """
        self.device, self.wandb = device, wandb
        self.waited = 0.0  # seconds for the batches of the training steps since the last report
        self.last = (0, 0.0)  # the step of the last report, and the time of training until then
        self.first: tuple[int, float] | None = None  # the step of the first report, and its time of day

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yields the next batch, and adds the time that the caller waits for it to `waited`."""
        started = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - started
        yield batch

    def measure(self, step: int, steps: int, trained: float, sequences: int, operations: float, args: Any) -> dict:
        """The speed of the steps since the last report. A collective call of all ranks.

        Args:
            step: number of steps that the run has made.
            steps: how many of them this process has made, for its first report.
            trained: seconds that this process has trained.
            sequences: sequences of a step.
            operations: floating-point operations of a step.
        """
        last, before = self.last
        steps, seconds, now = step - last if last else steps, trained - before, time.time()
        wait, memory = largest_of_all([1e3 * self.waited / steps, peak_memory() / 1e9])
        self.waited, self.last, self.first = 0.0, (step, trained), self.first or (step, now)
        first, began = self.first
        each = (now - began) / (step - first) if step > first else seconds / steps  # with validation and checkpoints
        tokens = sequences * args.seq_length * steps / seconds
        rate = operations * steps / seconds / args.world_size / 1e12
        found = {
            "step seconds": seconds / steps,
            "tokens per second": tokens,
            "tokens per second per GPU": tokens / args.world_size,
            "TFLOPs per second per GPU": rate,
            "data wait ms": wait,
            "peak memory GB": memory,
            "seconds left": each * max(0, args.train_iters - step),
        }
        if (highest := peak_of(self.device, args)) is not None:
            found["MFU"] = rate / highest
        return {PREFIX + name: value for name, value in found.items()}

    def write(self, step: int, scalars: dict[str, float], writer: Any) -> None:
        """Writes the speed to TensorBoard, metrics.jsonl and W&B. writer: TensorBoard's, on the rank that has one."""
        if writer is None:
            return
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, step)
        if (wandb := self.wandb()) is not None:
            wandb.log(scalars, step)


def peak_of(device: str | None, args: argparse.Namespace) -> float | None:
    """TFLOP/s of a GPU in the precision of a run; None for fp32, on CPU, and for other GPUs."""
    if device is None or not (args.bf16 or args.fp16):
        return None
    return peak(device, FP8 if args.fp8 else BF16)


def replacements(speed: SpeedLog) -> tuple[Replacement, ...]:
    """The name of upstream that is replaced, on every rank, so that it also logs the speed."""
    return (
        Replacement(
            "megatron.training.training",
            "training_log",
            wrapper(lambda log: _with_speed(log, speed)),
            "logs a step's time and TFLOP/s only with two flags, and no tokens/s, MFU, waits or time left",
            ("loss_dict", "total_loss_dict", "learning_rate", "iteration"),
        ),
    )


def _with_speed(training_log: Callable[..., Any], speed: SpeedLog) -> Callable[..., Any]:
    """Upstream's log of a step, after the speed of the steps since the last report."""

    @functools.wraps(training_log)
    def log(losses: Any, totals: dict[str, Any], rate: Any, iteration: int, *rest: Any, **options: Any) -> Any:
        from megatron.core.num_microbatches_calculator import get_num_microbatches
        from megatron.training.global_vars import get_args, get_tensorboard_writer, get_timers

        args = get_args()
        if iteration % args.log_interval == 0:
            timer = get_timers()("interval-time")
            timer.elapsed(reset=False)  # brings its active time up to now
            steps = totals.get("advanced iterations", 0) + totals.get("skipped iterations", 0) + 1
            sequences = args.micro_batch_size * args.data_parallel_size * get_num_microbatches()
            counts = options.get("seqlen_squared_sum_in_batch"), options.get("total_real_tokens_in_batch")
            operations = backbone_operations(args, sequences, *counts)
            scalars = speed.measure(iteration, steps, timer.active_time(), sequences, operations, args)
            speed.write(iteration, scalars, get_tensorboard_writer())
        return training_log(losses, totals, rate, iteration, *rest, **options)

    return log
