"""Samples for the measurement, in pieces that are saved: a saved piece is not sampled again."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from megatron_sfr.evaluation.generate.transformers_engine import load_model
from megatron_sfr.hf.megatron.megatron_checkpoint import find_checkpoint
from megatron_sfr.kl_flow.sampling.sampler_options import METHODS, Method
from megatron_sfr.storage.atomic import replacing
from megatron_sfr.storage.provenance import contents_of

from .gaps import Gap
from .writers import Autoregressive, Denoiser, Rows

Kind = Literal["texts", "gaps"]


@dataclass(frozen=True)
class Plan:
    """What is compared, and how much of it is sampled."""

    steps: tuple[int, ...] = (8, 32, 128)
    methods: tuple[Method, ...] = METHODS
    temperatures: tuple[float, ...] = (1.0, 0.7)
    texts: int = 64
    gaps: int = 128
    batch_size: int = 32


@dataclass(frozen=True)
class Asked:
    """What all models are asked for."""

    length: int
    starts: tuple[int, ...]
    """The first token of each text of the autoregressive model."""
    gaps: tuple[Gap, ...]


@dataclass(frozen=True)
class Folder:
    """A folder of saved pieces, each with the options and models that it depends on."""

    path: Path

    def piece(self, name: str, depends: Any, make: Callable[..., Rows], *given: Any) -> Rows:
        """The saved result of make(*given), or its result now, which is saved."""
        file = self.path / f"{name.replace(' ', '-')}.json"
        depends = json.loads(json.dumps(depends))
        if file.exists():
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["depends"] == depends:
                return kept["rows"]
        print(f"sampling {name}", flush=True)
        rows = make(*given)
        with replacing(file) as out:
            json.dump({"depends": depends, "rows": rows}, out)
        return rows


def sampled(
    folder: Folder, plan: Plan, asked: Asked, checkpoint: Path, baseline: Path, backend: Literal["cpu", "cuda"]
) -> Iterator[tuple[Kind, str, Sequence[Sequence[int]]]]:
    """(kind, model, tokens) of every piece: whole texts, and the tokens that fill each gap."""
    of = {"asked": asdict(asked), "texts": plan.texts, "batch_size": plan.batch_size}
    flow = cache(lambda: Denoiser(checkpoint, backend, plan.batch_size))  # loaded when a piece is not there
    old = cache(lambda: Autoregressive(load_model("baseline", baseline), plan.batch_size))

    def write_old(temperature: float) -> Rows:
        return old().texts(asked.starts, asked.length, temperature)

    def fill_old(temperature: float) -> Rows:
        return old().fill(asked.gaps, temperature)

    def write(method: Method, steps: int) -> Rows:
        return flow().texts(plan.texts, method, steps)

    def fill(method: Method, steps: int) -> Rows:
        return flow().fill(asked.gaps, method, steps)

    depends = of | {"model": contents_of(baseline)}
    for t in plan.temperatures:
        name = f"autoregressive T={t:g}"
        yield "texts", name, folder.piece(f"texts {name}", depends, write_old, t)
        yield "gaps", name, folder.piece(f"gaps {name}", depends, fill_old, t)
    depends = of | {"model": contents_of(find_checkpoint(checkpoint))}
    for method in plan.methods:
        for n in plan.steps:
            name = f"KL-flow {method} {n}"
            yield "texts", name, folder.piece(f"texts {name}", depends, write, method, n)
            yield "gaps", name, folder.piece(f"gaps {name}", depends, fill, method, n)
