"""The training runs that the distributed tests look at: three starts of torchrun serve them all."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_sfr.data.targets.embed import embed

from .launch import train_many
from .settings import (
    APART,
    KL_FLOW,
    KL_FLOW_LAYOUTS,
    KL_FLOW_RESUME,
    KL_FLOWS,
    LAYOUTS,
    OBJECTIVE_LAYOUTS,
    OBJECTIVES,
    ONLINE,
    ONLINE_STOPPED,
    PHASES,
    PP2,
    RATIO,
    RESUMES,
    TP2,
    TWO_CLIPS,
    UNTOUCHED,
    UNTOUCHED_LAYOUTS,
    has_kl_flow,
    has_layout,
)
from .tiny import BLOCKS, write_documents, write_prepared, write_recipe

MEASURED = ("--sfr-measure-interval", "1", "--save-interval", "3")


@dataclass(frozen=True)
class Corpus:
    """The data and recipes in a folder, and the argument lists of runs on them."""

    folder: Path
    prepared: Path
    two_horizons: Path
    twenty_six: Path
    documents: Path

    @property
    def tied(self) -> Path:
        """A recipe of one line, to stand beside another."""
        return self.recipe("tying")

    def recipe(self, name: str) -> Path:
        return self.folder / f"{name}.yaml"

    def run(self, recipe: str, name: str, *flags: str) -> list[str]:
        flags = tuple(flag.format(**vars(self), tied=self.tied) for flag in flags)
        return ["--recipe", str(self.recipe(recipe)), "--save", str(self.folder / name), "--save-interval", "1", *flags]

    def layouts(self, processes: int) -> list[list[str]]:
        return [
            self.run("recipe", name, *self.start(), *TWO_CLIPS, *flags) for name, flags in LAYOUTS[processes].items()
        ]

    def resumes(self, processes: int) -> list[list[str]]:
        listing = []
        for name, flags in RESUMES[processes].items():
            listing.append(self.run("recipe", f"{name}-straight", *RATIO, *flags))
            listing += [self.run("recipe", name, *RATIO, *flags, "--exit-interval", stop) for stop in ("2", "4")]
        return listing

    def objectives(self, processes: int) -> list[list[str]]:
        listing = []
        for name, flags in OBJECTIVES.items():
            fresh = (*self.start("plain-mtp" if name == "mtp" else "plain"), "--sfr-fresh-head", *MEASURED)
            for layout, more in OBJECTIVE_LAYOUTS[processes].items():
                if has_layout(name, layout):
                    listing.append(self.run("recipe", f"{name}-{layout}", *fresh, *flags, *more))
        return listing

    def untouched(self) -> list[list[str]]:
        """Two processes; one of the runs stops after its first step and resumes."""
        listing = [
            self.run("plain", f"{name}-{layout}", *flags, *more)
            for layout, more in UNTOUCHED_LAYOUTS.items()
            for name, flags in UNTOUCHED.items()
        ]
        flags = (*UNTOUCHED["closed"], *UNTOUCHED_LAYOUTS["dp2-sharded"])
        stops = [("--exit-interval", "1"), ()]
        return listing + [self.run("plain", "resumed-dp2-sharded", *flags, *stop) for stop in stops]

    def online(self, processes: int) -> list[list[str]]:
        validation = ("--valid-data-path", str(self.prepared), "--eval-iters", "1", "--eval-interval", "1")
        runs = ONLINE[processes].items()
        return [
            self.run("recipe", name, *self.start(), *TWO_CLIPS, *flags, *online(name), *validation)
            for name, (_, flags) in runs
        ]

    def online_stopped(self) -> list[list[str]]:
        """Encodes only what is requested; the second run continues with the store of the first."""
        flags = (*RATIO, *online(ONLINE_STOPPED), "--sfr-lookahead", "0")
        return [self.run("recipe", ONLINE_STOPPED, *flags, "--exit-interval", stop) for stop in ("2", "4")]

    def kl_flow_starts(self) -> list[list[str]]:
        return [
            self.run("plain", f"kl-{name}", *KL_FLOW, *flags, "--train-iters", "1") for name, flags in KL_FLOWS.items()
        ]

    def kl_flow(self, processes: int) -> list[list[str]]:
        listing = []
        for name, flags in KL_FLOWS.items():
            for layout, more in KL_FLOW_LAYOUTS[processes].items():
                if has_kl_flow(name, layout):
                    start = self.start(f"kl-{name}")
                    saves = ("--save-interval", "3") if processes > 1 else ()
                    listing.append(self.run("plain", f"kl-{name}-{layout}", *KL_FLOW, *start, *flags, *more, *saves))
        return listing

    def kl_flow_resumed(self) -> list[list[str]]:
        flags = (*KL_FLOW, *KL_FLOW_RESUME)
        return [
            self.run("plain", "kl-resume-straight", *flags),
            *(self.run("plain", "kl-resume", *flags, "--exit-interval", stop) for stop in ("2", "4")),
        ]

    def apart(self) -> list[list[str]]:
        fresh = (*self.start("plain"), "--sfr-fresh-head", *MEASURED)
        return [self.run("recipe", f"{name}-apart", *fresh, *flags) for name, flags in APART.items()]

    def start(self, name: str = "start") -> tuple[str, str]:
        return "--pretrained-checkpoint", str(self.folder / name)


def online(store: str) -> tuple[str, ...]:
    return "--sfr-targets", "online", "--sfr-target-store", store


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all runs, a folder each; checkpoints of every step, but for the objectives, which have the last."""
    folder = tmp_path_factory.mktemp("runs")
    two_horizons = write_prepared(folder / "data-2", horizons=((1, 8), (4, 3)))
    twenty_six = write_prepared(folder / "data-26", rows=26)
    documents = write_documents(folder / "documents")
    corpus = Corpus(folder, write_prepared(folder / "data"), two_horizons, twenty_six, documents)
    for store in (ONLINE_STOPPED, *(name for names in ONLINE.values() for name in names)):
        embed(corpus.prepared, "minilm", BLOCKS, output=corpus.prepared / store, later=True, progress=False)
    write_recipe(corpus.recipe("recipe"), corpus.prepared)
    write_recipe(corpus.recipe("plain"), corpus.prepared, sfr=False)
    corpus.tied.write_text("untie_embeddings_and_output_weights: false\n", encoding="utf-8")
    write_recipe(corpus.recipe("tied"), corpus.prepared, untie_embeddings_and_output_weights=False)
    run = corpus.run
    validation = ("--valid-data-path", str(corpus.prepared), "--eval-iters", "2", "--eval-interval", "1")
    one = [
        run("recipe", "start", "--train-iters", "1"),
        *(run("plain", name, *flags) for name, flags in PHASES.items()),
        run("plain", "plain-mtp", *OBJECTIVES["mtp"], "--train-iters", "1"),
        run("recipe", "validated", *corpus.start(), *TWO_CLIPS, *validation),
        run("tied", "tied"),
        run("recipe", "fresh-head", *corpus.start("plain"), "--sfr-fresh-head"),
        run("recipe", "asynchronous", "--async-save", *corpus.start(), *TWO_CLIPS),
    ]
    two = [
        run("tied", "tied-pp2", *corpus.start("tied"), *PP2),
        run("tied", "tied-tp2", *corpus.start("tied"), *TP2),
        run("recipe", "crossing", *RATIO, *TP2, "--exit-interval", "2"),
        run("recipe", "crossing", *RATIO, *PP2, "--exit-interval", "4"),
        run("recipe", "crossing-straight", *RATIO, *TP2),
    ]
    train_many(
        1,
        [
            *one,
            *corpus.layouts(1),
            *corpus.resumes(1),
            *corpus.objectives(1),
            *corpus.apart(),
            *corpus.kl_flow_starts(),
            *corpus.kl_flow(1),
            *corpus.online_stopped(),
        ],
        folder,
    )
    two += [*corpus.layouts(2), *corpus.resumes(2), *corpus.objectives(2), *corpus.online(2), *corpus.untouched()]
    train_many(2, [*two, *corpus.kl_flow(2), *corpus.kl_flow_resumed()], folder)
    train_many(4, [*corpus.layouts(4), *corpus.objectives(4), *corpus.online(4), *corpus.kl_flow(4)], folder)
    return folder
