"""Trainings and their data, each made when a test first asks for it, once for all processes of the test session."""

import json
import shutil
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from megatron_sfr.hf.megatron.tracker import TRACKER

from . import tiny
from .launch import train
from .settings import CLIP, EACH_STEP

LONGEST_S = 1800
"""Patience with another process that makes what this one needs."""


@dataclass(frozen=True)
class Runs:
    """A folder that all test processes share, with what they have trained and prepared."""

    folder: Path

    def once(self, name: str, make: Callable[[Path], object], settings: Sequence[str] = ()) -> Path:
        """FOLDER/NAME, which the first caller makes. If that fails, it fails for every caller.

        settings: what it is made from; another caller that gives other settings has chosen a name that is taken.
        """
        path, outcome = self.folder / name, self.folder / f"{name}.outcome"
        with FileLock(self.folder / f"{name}.lock", timeout=LONGEST_S):
            if not outcome.exists():
                shutil.rmtree(path, ignore_errors=True)  # of a process that was killed
                failure = ""
                try:
                    make(path)
                except Exception as error:
                    failure = "".join(traceback.format_exception(error))
                outcome.write_text(json.dumps([list(settings), failure]), encoding="utf-8")
        made_from, failure = json.loads(outcome.read_text(encoding="utf-8"))
        assert made_from == list(settings), f"{name} is the name of something else"
        assert not failure, failure
        return path

    def train(self, name: str, ranks: int, *flags: str, recipe: Path | None = None, stops: Sequence[int] = ()) -> Path:
        """A training's folder, with a checkpoint of the last step unless the flags ask for more.

        recipe: that of a model with SFR where none is given. stops: the run ends after each of these steps, and is
        started again.
        """
        given = ["--recipe", str(recipe or self.sfr), "--save-interval", "1000", *flags]

        def make(save: Path) -> None:
            for stop in stops or [None]:
                train(ranks, *given, "--save", str(save), *(["--exit-interval", str(stop)] if stop else []))

        return self.once(name, make, [str(ranks), *given, *map(str, stops)])

    def resume(self, name: str, run: Path, step: int, ranks: int, *flags: str, recipe: Path | None = None) -> Path:
        """A training that resumes from a copy of another, as if that had been killed after its checkpoint of a step."""
        given = ["--recipe", str(recipe or self.sfr), "--save-interval", "1000", *flags]

        def make(save: Path) -> None:
            later = [path.name for path in run.glob("iter_*") if int(path.name.removeprefix("iter_")) > step]
            shutil.copytree(run, save, ignore=shutil.ignore_patterns(*later))
            (save / TRACKER).write_text(str(step), encoding="utf-8")
            train(ranks, *given, "--save", str(save))

        return self.once(name, make, [str(run), str(step), str(ranks), *given])

    @property
    def prepared(self) -> Path:
        """40 conversations with targets; nobody changes what is there."""
        return self.once("data", tiny.write_prepared) / "prepared"

    @property
    def two_horizons(self) -> Path:
        return self.once("data-2", lambda path: tiny.write_prepared(path, horizons=((1, 8), (4, 3)))) / "prepared"

    @property
    def twenty_six(self) -> Path:
        """26 conversations."""
        return self.once("data-26", lambda path: tiny.write_prepared(path, rows=26)) / "prepared"

    @property
    def documents(self) -> Path:
        return self.once("documents", tiny.write_documents) / "prepared"

    def with_data(self, flags: Sequence[str]) -> list[str]:
        """The flags with the folders of what they name in braces: {two_horizons}, {twenty_six}, {documents}."""
        return [str(getattr(self, flag[1:-1])) if flag.startswith("{") else flag for flag in flags]

    @property
    def sfr(self) -> Path:
        """The recipe of a tiny model with SFR."""
        return self.once("sfr.yaml", lambda path: tiny.write_recipe(path, self.prepared))

    @property
    def plain(self) -> Path:
        """The recipe without SFR."""
        return self.once("plain.yaml", lambda path: tiny.write_recipe(path, self.prepared, sfr=False))

    def start(self) -> tuple[str, str]:
        """Flags that begin with the weights of one step with SFR."""
        return begin_with(self.train("start", 1, "--train-iters", "1"))

    def plain_start(self) -> tuple[str, str, str]:
        """Flags that begin with the weights of three steps without SFR, and a fresh head."""
        return *begin_with(self.backbone()), "--sfr-fresh-head"

    def backbone(self) -> Path:
        """Three steps without SFR, with a checkpoint of each."""
        return self.train("plain", 1, *CLIP, *EACH_STEP, recipe=self.plain)


def begin_with(run: Path) -> tuple[str, str]:
    """Flags that begin with the weights of a run."""
    return "--pretrained-checkpoint", str(run)
