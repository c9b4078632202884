"""One run from its training to its curve: trained, exported, asked, scored. Whatever is finished is kept."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from examples.dictionary_styles.selection import draw
from examples.dictionary_styles.study.plan import Plan, Run
from megatron_sfr.data.targets.encoder import Encoder, EncoderOptions
from megatron_sfr.evaluation.compare.curves import Curve, Loss, Scorer
from megatron_sfr.evaluation.compare.questions import EvaluationOptions
from megatron_sfr.evaluation.compare.replies import Answers, answers
from megatron_sfr.evaluation.generate.engines import HuggingFace
from megatron_sfr.evaluation.generate.prompts import Asked, limit, read_asked
from megatron_sfr.evaluation.generate.sampling import SamplingOptions, record
from megatron_sfr.evaluation.scores.style import Styled, StyleJudge
from megatron_sfr.storage.atomic import whole

HERE = Path(__file__).parent
EXAMPLE = HERE.parent
CHOOSING, JUDGING = "choosing", "judging"
FIDELITY_ROWS = 6000  # real replies that the classifier of styles learns from
HEADWORDS = 64  # at most, that settings are chosen by, and that arms are judged by


@dataclass(frozen=True)
class Place:
    """Where the study is made, from what and on what."""

    root: Path = Path("runs/dictionary_styles")
    """Holds the text, which all studies share."""
    start: Path | None = None
    """A Hugging Face model that all arms begin from; None: a small one that the study trains first."""
    recipe: Path | None = None
    """A recipe over those of the arms, for another size or machine."""
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def study(self) -> Path:
        return self.root / ("study" if self.start is None else f"study-{self.start.resolve().name}")

    @property
    def base(self) -> Path:
        return self.start or self.study / "base-hf"

    @property
    def model(self) -> Path:
        """The start's tokenizer and config."""
        return self.start or self.root / "model"

    @property
    def shape(self) -> Path:
        """The recipe's part that describes the model."""
        return EXAMPLE / "model.yaml" if self.start is None else self.study / "model.yaml"

    def data(self, side: str) -> Path:
        """The balanced text as the model's tokens: its train or validation side."""
        return (self.root if self.start is None else self.study) / "text" / side

    def training(self, run: Run, folder: Path) -> list[object]:
        """What follows `megatron-sfr train`."""
        arm = () if run.arm.recipe is None else (EXAMPLE / "arms" / f"{run.arm.recipe}.yaml",)
        recipes = (EXAMPLE / "ce.yaml", *arm, HERE / "arm.yaml", *(() if self.recipe is None else (self.recipe,)))
        given = dict(run.settings) | {
            "seed": run.seed,
            "train_iters": run.steps,
            "train_data_path": self.data("train"),
            "valid_data_path": self.data("validation"),
            "sfr_hf_load": self.base,
            "sfr_backend": self.device,
            "save": folder,
        }
        settings = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", value)]
        return [self.shape, *(word for recipe in recipes for word in ("--recipe", recipe)), *settings]

    def folder(self, run: Run) -> Path:
        return self.study / "runs" / run.name

    def curve(self, run: Run, side: str, plan: Plan) -> Path:
        """One file for each way of asking: another number of samples is another curve."""
        asked = (
            *plan.sweep(run.arm, judging=side == JUDGING),
            plan.samples,
            plan.max_new_tokens,
            f"seed{plan.sampling_seed}",
        )
        return self.folder(run) / f"{side}-{'-'.join(map(str, asked))}.npz"


def megatron_sfr(log: Path, *words: object) -> None:
    """One of the library's commands, its output in a log; ValueError with its last line if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink:
        command = [sys.executable, "-m", "megatron_sfr.cli", *map(str, words)]
        code = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        raise ValueError(f"{words[0]} failed: {said} (the rest: {log})")


def train(run: Run, place: Place) -> None:
    """Trains and exports a run, unless its folder holds the exported model already."""
    folder = place.folder(run)
    if (folder / "hf").exists():
        return
    megatron_sfr(folder / "train.log", "train", *place.training(run, folder))
    export = ("convert", "export", "--checkpoint", folder, "--like", place.model, "--output", folder / "hf")
    megatron_sfr(folder / "export.log", *export)


def finish(task: tuple[Run, str, Plan, Place]) -> str:
    """Makes the run's curve on one side of the headwords, unless it is there; returns the run's name."""
    run, side, plan, place = task
    path = place.curve(run, side, plan)
    if not path.exists():
        train(run, place)
        judge = scorer(side, plan.sweep(run.arm, judging=side == JUDGING), plan, place)
        engine = HuggingFace({run.name: place.folder(run) / "hf"}, device=place.device)
        (answered,) = answers(engine, judge.questions())
        write_samples(path.with_suffix(".jsonl"), answered, judge, plan)
        save(judge.curve(answered.answered()), path)
    return run.name


@lru_cache(maxsize=3)
def scorer(side: str, temperatures: tuple[float, ...], plan: Plan, place: Place) -> Scorer:
    """What replies are held against, once for each process."""
    held_out = headwords(side, plan.choosing_share, place)
    sampling = SamplingOptions(plan.samples, max_new_tokens=plan.max_new_tokens, seed=plan.sampling_seed)
    options = EvaluationOptions(sampling, temperatures, embedded=plan.samples, embedded_prompts=HEADWORDS)
    encoder = Encoder("minilm", EncoderOptions(device=place.device))
    return Scorer(held_out, {"held-out replies": held_out}, options, encoder, judge=style_judge(place))


def headwords(side: str, share: float, place: Place) -> list[Asked]:
    """The held-out headwords that settings are chosen by, or the others; replies that were trained on are left out."""
    trained = {entry["messages"][-1]["content"] for entry in rows(place.root / "text" / "train.jsonl")}
    found = []
    for entry in read_asked(place.root / "wide-text" / "prompts.jsonl"):
        unseen = [c for c in entry.references if c.messages[-1]["content"] not in trained]
        chosen = draw(0, "study", entry.prompt.question) < share
        if unseen and chosen == (side == CHOOSING):
            found.append(replace(entry, references=unseen))
    return limit(found, HEADWORDS)


def style_judge(place: Place) -> StyleJudge:
    """Hears a persona as its training replies sound, which share no headword with what it judges."""
    every = rows(place.root / "text" / "train.jsonl")[:FIDELITY_ROWS]
    return StyleJudge([Styled(r["messages"][-2]["content"], r["persona"], r["messages"][-1]["content"]) for r in every])


def rows(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_samples(path: Path, answered: Answers, judge: Scorer, plan: Plan) -> None:
    questions = judge.questions()
    with whole(path) as file:
        for options, replies in zip(questions.sweep, answered.replies, strict=True):
            for prompt, row in zip(questions.prompts, replies, strict=True):
                lines = (record(answered.model, prompt, options, reply) for reply in row)
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def save(curve: Curve, path: Path) -> None:
    """A curve as plain arrays; the file is whole or not there."""
    arrays = {f"score/{name}": values for name, values in curve.scores.items()}
    for kind, losses in (("loss", curve.losses), ("persona", curve.personas)):
        arrays |= {f"{kind}/{name}": np.stack([loss.nll, loss.tokens]) for name, loss in losses.items()}
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_curve(path: Path, name: str, temperatures: Sequence[float]) -> Curve:
    """A curve that `save` wrote; Raises ValueError for another file."""
    kinds: dict[str, dict[str, np.ndarray]] = {"score": {}, "loss": {}, "persona": {}}
    try:
        with np.load(path, allow_pickle=False) as file:
            for key in file.files:
                kind, _, what = key.partition("/")
                kinds[kind][what] = file[key]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a curve of the study ({error}): remove it and run again") from error
    losses, personas = ({what: Loss(*pair) for what, pair in kinds[kind].items()} for kind in ("loss", "persona"))
    return Curve(name, tuple(temperatures), kinds["score"], losses, personas)
