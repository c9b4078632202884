"""How large the demo is: the full one, for ten minutes on two cores, and a tiny one that only shows that it runs."""

from dataclasses import dataclass

from megatron_sfr.demo.language import WHO
from megatron_sfr.demo.world import Question, World


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    world: World
    pretraining_rows: int
    pretraining_steps: int
    finetuning_steps: int
    warmup: int  # steps of SFR's head on detached states, and again of the ramp
    measure: int  # steps between measurements of the gradient ratio
    width: int
    every: int  # of the world's prompts, each `every`-th is asked in the evaluation
    samples: int
    temperatures: tuple[float, ...]

    @property
    def asked(self) -> tuple[Question, ...]:
        """The prompts of the evaluation: every topic is among them, and about different people."""
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
