"""One run of the study: training, export, sampling, scoring. Results of earlier calls are kept."""

import json
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
from examples.dictionary_styles.study.plan import WIDE, Plan, Regime, Run
from megatron_sfr.data.targets.encoder import Encoder, EncoderOptions
from megatron_sfr.evaluation.compare.curves import Curve, Loss, Scorer
from megatron_sfr.evaluation.compare.questions import Answered, EvaluationOptions, Questions
from megatron_sfr.evaluation.compare.replies import answers
from megatron_sfr.evaluation.generate.engines import HuggingFace
from megatron_sfr.evaluation.generate.prompts import Asked, limit, read_asked
from megatron_sfr.evaluation.generate.sampling import SamplingOptions, reply_line
from megatron_sfr.evaluation.scores.style import Styled, StyleJudge
from megatron_sfr.runtime.lifetime import tied
from megatron_sfr.storage.atomic import replacing

HERE = Path(__file__).parent
EXAMPLE = HERE.parent
CHOOSING, JUDGING = "choosing", "judging"
FIDELITY_ROWS = 6000  # real replies that the classifier of styles learns from
HELD_OUT = "held-out replies"
STAGES = ("materials", "train", "sample", "score")


@dataclass(frozen=True)
class Place:
    """Folders, start model, recipe and device of the study."""

    root: Path = Path("runs/dictionary_styles")
    """Folder of the text, which all studies share."""
    start: Path | None = None
    """A Hugging Face model from which all arms start; None: a small one that the study trains first."""
    recipe: Path | None = None
    """A recipe that is applied after the arms' recipes, for another model size or machine."""
    device: Literal["cpu", "cuda"] = "cpu"
    regime: Regime = WIDE

    @property
    def study(self) -> Path:
        parts = ["study", *([self.start.resolve().name] if self.start else [])]
        return self.root / "-".join([*parts, *([self.regime.name] if self.regime != WIDE else [])])

    @property
    def common(self) -> Path:
        """The checkpoint of the small start, which all regimes share."""
        return self.root / "study" / "base"

    @property
    def base(self) -> Path:
        return self.start or self.root / "study" / "base-hf"

    @property
    def model(self) -> Path:
        """The start's tokenizer and config."""
        return self.start or self.root / "model"

    @property
    def shape(self) -> Path:
        """The recipe's part that describes the model."""
        return EXAMPLE / "model.yaml" if self.start is None else self.study / "model.yaml"

    def text(self, side: str) -> Path:
        """The records of the train or validation side. All regimes have the validation side of the balanced text."""
        few = f"-{self.regime.per_persona}" if self.regime != WIDE and side == "train" else ""
        return self.root / f"text{few}" / f"{side}.jsonl"

    def data(self, side: str) -> Path:
        """The prepared folder of the same records."""
        return (self.root if self.start is None and self.regime == WIDE else self.study) / "text" / side

    def training(self, run: Run, folder: Path) -> list[object]:
        """Arguments of `megatron-sfr train` for a run."""
        arm = () if run.arm.recipe is None else (EXAMPLE / "arms" / f"{run.arm.recipe}.yaml",)
        regime = () if self.regime.recipe is None else (HERE / f"{self.regime.recipe}.yaml",)
        own = () if self.recipe is None else (self.recipe,)
        recipes = (EXAMPLE / "ce.yaml", *arm, HERE / "arm.yaml", *regime, *own)
        given = dict(run.settings) | {
            "seed": run.seed,
            "train_iters": run.steps,
            "train_data_path": self.data("train"),
            "valid_data_path": self.data("validation"),
            "sfr_hf_load": self.base,
            "sfr_backend": self.device,
            "save": folder,
        }
        flags = {f"--{key.replace('_', '-')}": value for key, value in given.items()}
        settings = [word for flag, value in flags.items() for word in ((flag,) if value is True else (flag, value))]
        return [self.shape, *(word for recipe in recipes for word in ("--recipe", recipe)), *settings]

    def folder(self, run: Run) -> Path:
        return self.study / "runs" / run.name

    def curve(self, run: Run, side: str, plan: Plan) -> Path:
        """The file of a run's curve. Its name has the sampling options, so that each choice has its own curve."""
        asked = (
            *plan.sweep(run.arm, judging=side == JUDGING),
            plan.samples,
            plan.max_new_tokens,
            f"seed{plan.sampling_seed}",
            f"words{plan.headwords}",
        )
        return self.folder(run) / f"{side}-{'-'.join(map(str, asked))}.npz"


def megatron_sfr(log: Path, *words: object) -> None:
    """Runs a command of megatron-sfr, with its output in a log. Raises ValueError with the last line if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink:
        command = [sys.executable, "-m", "megatron_sfr.cli", *map(str, words)]
        code = subprocess.run(tied(command), stdout=sink, stderr=subprocess.STDOUT, check=False).returncode
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
    merge = ("--merge",) if place.regime.lora else ()
    export = ("convert", "export", "--checkpoint", folder, "--like", place.model, "--output", folder / "hf")
    megatron_sfr(folder / "export.log", *export, *merge)


@dataclass(frozen=True)
class Task:
    """Stages to do for a run, and the side of the headwords (CHOOSING or JUDGING) that it is sampled on."""

    run: Run
    side: str
    plan: Plan
    place: Place
    stages: tuple[str, ...] = STAGES

    @property
    def curve(self) -> Path:
        return self.place.curve(self.run, self.side, self.plan)

    @property
    def samples(self) -> Path:
        return self.curve.with_suffix(".jsonl")

    @property
    def is_done(self) -> bool:
        done = {"train": self.place.folder(self.run) / "hf", "sample": self.samples, "score": self.curve}
        return self.curve.exists() or all(file.exists() for stage, file in done.items() if stage in self.stages)

    @property
    def sweep(self) -> tuple[float, ...]:
        return self.plan.sweep(self.run.arm, judging=self.side == JUDGING)


def finish(task: Task) -> str:
    """Does the stages of a task that are not done. Returns the run's name."""
    if "train" in task.stages:
        train(task.run, task.place)
    if "sample" in task.stages and not task.samples.exists():
        sample(task)
    if "score" in task.stages and not task.curve.exists():
        judge = scorer(task.side, task.sweep, task.plan, task.place)
        save(judge.curve(read_answers(task, len(judge.asked))), task.curve)
    return task.run.name


def sample(task: Task) -> None:
    """Writes the losses on real replies, then the sampled replies. Needs no encoder, unlike scoring."""
    plan, asked = task.plan, headwords(task.side, task.plan, task.place)
    options = sampling(plan, task.place)
    questions = Questions(
        prompts=[entry.prompt for entry in asked],
        sweep=[replace(options, temperature=temperature) for temperature in task.sweep],
        sets={HELD_OUT: [conversation for entry in asked for conversation in entry.references]},
    )
    engine = HuggingFace({task.run.name: task.place.folder(task.run) / "hf"}, device=task.place.device)
    (answered,) = answers(engine, questions)
    with replacing(losses_file(task), "wb") as file:
        np.save(file, np.stack(answered.losses[HELD_OUT]))
    with replacing(task.samples) as file:
        for some, replies in zip(questions.sweep, answered.replies, strict=True):
            for prompt, row in zip(questions.prompts, replies, strict=True):
                file.writelines(reply_line(answered.model, prompt, some, reply) for reply in row)


def losses_file(task: Task) -> Path:
    return task.curve.with_suffix(".losses.npy")


def read_answers(task: Task, prompts: int) -> Answered:
    """Reads what `sample` wrote. Raises ValueError if replies are missing."""
    texts = [row["text"] for row in rows(task.samples)]
    temperatures, samples = len(task.sweep), task.plan.samples
    if len(texts) != temperatures * prompts * samples:
        raise ValueError(f"{task.samples} does not have all replies: remove it and run again with --stages sample")
    left = iter(texts)
    replies = [[[next(left) for _ in range(samples)] for _ in range(prompts)] for _ in range(temperatures)]
    nll, tokens = np.load(losses_file(task))
    return Answered(task.run.name, task.sweep, replies, {HELD_OUT: (nll, tokens)})


def sampling(plan: Plan, place: Place) -> SamplingOptions:
    at_once = 512 if place.device == "cuda" else 64  # changes no random number
    return SamplingOptions(
        plan.samples, max_new_tokens=plan.max_new_tokens, seed=plan.sampling_seed, batch_size=at_once
    )


@lru_cache(maxsize=3)
def scorer(side: str, temperatures: tuple[float, ...], plan: Plan, place: Place) -> Scorer:
    """Scores replies against the held-out ones. Built once for each process."""
    held_out = headwords(side, plan, place)
    options = EvaluationOptions(
        sampling(plan, place), temperatures, embedded=plan.samples, embedded_prompts=plan.headwords
    )
    encoder = Encoder("minilm", EncoderOptions(device=place.device))
    return Scorer(held_out, {HELD_OUT: held_out}, options, encoder, judge=style_judge(place))


def headwords(side: str, plan: Plan, place: Place) -> list[Asked]:
    """The held-out headwords of one side, CHOOSING or JUDGING, without real replies that are in the training text."""
    trained = {entry["messages"][-1]["content"] for entry in rows(place.text("train"))}
    found = []
    for entry in read_asked(place.root / "wide-text" / "prompts.jsonl"):
        unseen = [c for c in entry.references if c.messages[-1]["content"] not in trained]
        chosen = draw(0, "study", entry.prompt.question) < plan.choosing_share
        if unseen and chosen == (side == CHOOSING):
            found.append(replace(entry, references=unseen))
    return limit(found, plan.headwords)


def style_judge(place: Place) -> StyleJudge:
    """A classifier of personas, trained on training replies, whose headwords are never those that it judges."""
    every = rows(place.root / "text" / "train.jsonl")[:FIDELITY_ROWS]
    return StyleJudge([Styled(r["messages"][-2]["content"], r["persona"], r["messages"][-1]["content"]) for r in every])


def rows(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def save(curve: Curve, path: Path) -> None:
    """Writes a curve as plain arrays, atomically."""
    arrays = {f"score/{name}": values for name, values in curve.scores.items()}
    for kind, losses in (("loss", curve.losses), ("persona", curve.personas)):
        arrays |= {f"{kind}/{name}": np.stack([loss.nll, loss.tokens]) for name, loss in losses.items()}
    with replacing(path, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def read_curve(path: Path, name: str, temperatures: Sequence[float]) -> Curve:
    """Reads a curve that `save` wrote. Raises ValueError for another file."""
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
