"""Questions for a model and its answers: replies at every temperature, and its loss on sets of real replies.

Several models can run in parallel, each in a separate process, which is faster for small models on a CPU.
"""

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from megatron_sfr.evaluation.compare.questions import Answered, Questions
from megatron_sfr.evaluation.generate.engines import Engine
from megatron_sfr.evaluation.generate.sampling import Sampled
from megatron_sfr.evaluation.scores.likelihood import negative_log_likelihood
from megatron_sfr.runtime.failures import killed_workers
from megatron_sfr.runtime.lifetime import end_with_parent


@dataclass(frozen=True)
class Answers:
    """One model's replies, indexed by temperature, prompt and sample, and its losses as in `Answered`."""

    model: str
    temperatures: tuple[float, ...]
    replies: list[list[list[Sampled]]]
    losses: dict[str, tuple[np.ndarray, np.ndarray]]

    def answered(self) -> Answered:
        """What the scores read."""
        texts = [[[reply.text for reply in row] for row in rows] for rows in self.replies]
        return Answered(self.model, self.temperatures, texts, self.losses)


@dataclass(frozen=True)
class Hardware:
    """Where models run: torch device (None: a GPU if there is one), dtype, and number of models in parallel."""

    device: str | None = None
    dtype: str = "auto"
    processes: int = 1

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"processes is {self.processes}; give at least 1")


def answers(engine: Engine, questions: Questions, processes: int = 1) -> list[Answers]:
    """Every model's answers, in the order of the models; `processes` models run in parallel."""
    processes = min(processes, len(engine.models))
    tasks = [(engine, name, questions, place if processes > 1 else None) for place, name in enumerate(engine.models)]
    if processes == 1:
        return [_answer(*task) for task in tasks]
    spawn = multiprocessing.get_context("spawn")  # a forked child of a process with threads may hang
    threads = max(1, (os.cpu_count() or 1) // processes)
    pool = ProcessPoolExecutor(processes, spawn, _begin, (threads, spawn.RLock()))
    with killed_workers("run it again with fewer --processes"), pool:
        return list(pool.map(_answer, *zip(*tasks, strict=True)))


def _begin(threads: int, lock: object) -> None:
    import torch

    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent alone reports Ctrl-C
    torch.set_num_threads(threads)
    tqdm.set_lock(lock)


def _answer(engine: Engine, name: str, questions: Questions, position: int | None) -> Answers:
    model = engine.load(name, questions.sweep[0].template)
    total = len(questions.prompts) * sum(options.samples for options in questions.sweep)
    replies = []
    with tqdm(total=total, desc=name, unit="reply", dynamic_ncols=True, position=position) as bar:
        for options in questions.sweep:
            rows: list[list[Sampled]] = [[] for _ in questions.prompts]
            for p, reply in engine.sample(model, questions.prompts, options):
                rows[p].append(reply)
                bar.update()
            replies.append(rows)
    template = questions.sweep[0].template
    sets = questions.sets if engine.gives_losses else {}
    losses = {label: negative_log_likelihood(model, rows, template) for label, rows in sets.items()}
    return Answers(name, tuple(options.temperature for options in questions.sweep), replies, losses)
