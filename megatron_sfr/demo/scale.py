"""Sizes of the demo: the full one, for ten minutes on two cores, and a tiny one for tests."""

from dataclasses import dataclass

from megatron_sfr.demo.language import WHO
from megatron_sfr.demo.world import Question, World


@dataclass(frozen=True)
class Scale:
    """The size of each part of the demo."""

    world: World
    pretraining_rows: int
    pretraining_steps: int
    finetuning_steps: int
    warmup: int
    """Length in steps of SFR's phase A, and of its ramp."""
    measure: int
    """Steps between measurements of the gradient ratio."""
    width: int
    every: int
    """The evaluation uses every `every`-th prompt."""
    samples: int
    temperatures: tuple[float, ...]

    @property
    def asked(self) -> tuple[Question, ...]:
        """The prompts of the evaluation. They cover every topic, with different people."""
        return tuple(q for i, q in enumerate(self.world.questions) if (i + i // len(WHO)) % self.every == 0)


FULL = Scale(
    world=World(),
    pretraining_rows=4800,
    pretraining_steps=200,
    finetuning_steps=300,
    warmup=30,
    measure=20,
    width=128,
    every=3,
    samples=12,
    temperatures=(0.5, 0.7, 0.9, 1.2),
)
TINY = Scale(
    world=World(topics=1),
    pretraining_rows=96,
    pretraining_steps=4,
    finetuning_steps=6,
    warmup=2,
    measure=2,
    width=64,
    every=3,
    samples=4,
    temperatures=(0.7, 1.0),
)
