"""Rates replies by a judge: any model that an engine samples, a server's or a Hugging Face folder."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_sfr.data.chat.template_options import TemplateOptions
from megatron_sfr.evaluation.generate.engines import Engine
from megatron_sfr.evaluation.generate.prompts import Asked, limit
from megatron_sfr.evaluation.generate.sampling import SamplingOptions
from megatron_sfr.evaluation.judge.agreement import krippendorff_alpha
from megatron_sfr.evaluation.judge.judge_prompts import CRITERIA, MATERIAL, Item, rating
from megatron_sfr.evaluation.judge.votes import VOTES, Votes, vote_file

MAX_NEW_TOKENS = 512
"""A rating is one token; a model that thinks needs more."""
Replies = Sequence[Sequence[str]]
"""By entry of `asked` and sample."""


@dataclass(frozen=True)
class Judged:
    """The ratings of all models' replies."""

    models: Mapping[str, Mapping[str, np.ndarray]]
    """By model and criterion, the mean rating by temperature and entry of `asked` [T, entries]; NaN without one."""
    real: Mapping[str, np.ndarray]
    """Of the real replies, by criterion [entries]."""
    notes: Sequence[str]
    """Who judged, how much, and how far the votes agree."""


@dataclass(frozen=True)
class Judge:
    """A judge and how it is asked."""

    engine: Engine
    """Of one model."""
    votes: int = 3
    """Votes per reply and criterion, drawn at temperature 1."""

    def __post_init__(self) -> None:
        if self.votes < 2:
            raise ValueError(f"--judge-votes {self.votes}: give at least 2, or nothing says how far votes agree")

    @property
    def sampling(self) -> SamplingOptions:
        template = TemplateOptions(special_text="literal")  # replies are material, whatever is in them
        return SamplingOptions(self.votes, 1.0, max_new_tokens=MAX_NEW_TOKENS, template=template)

    def identity(self) -> dict[str, object]:
        """Everything that determines a vote besides the reply."""
        return {"judge": self.engine.identity(), "votes": self.votes, "texts": [*CRITERIA.values(), MATERIAL]}

    def rate(
        self,
        asked: Sequence[Asked],
        answered: Mapping[str, Sequence[Replies]],
        output: Path,
        *,
        each: int,
        prompts: int,
    ) -> Judged:
        """Rates the first `each` replies to each pair of at most `prompts` prompts, and as many real replies.

        Equal replies to one prompt are rated once. The votes are kept in OUTPUT/votes.jsonl: those that are there are
        not asked for again.

        Args:
            answered: the replies of each model, by temperature.
        Raises:
            ValueError: the judge cannot be asked; what it has said is kept.
        """
        chosen = {id(entry) for entry in limit(asked, prompts)}
        count = [each if id(entry) in chosen else 0 for entry in asked]
        real = [entry.texts for entry in asked]
        every = [rows for sweep in answered.values() for rows in sweep]
        items = {item.key: item for rows in (*every, real) for _, item in _items(asked, rows, count)}
        with vote_file(output / VOTES, self.identity()) as file, in_terms_of_judge():
            todo = [item for key, item in items.items() if key not in file.known]
            self._announce(items, todo, output)
            for item, votes in self._ask(todo):
                file.add(item, votes)
            known = {key: file.known[key] for key in items}
        models = {
            name: _stacked([_means(asked, rows, count, known) for rows in sweep]) for name, sweep in answered.items()
        }
        return Judged(models, _means(asked, real, count, known), self._notes(items, known, each, prompts))

    def _announce(self, items: Mapping[str, Item], todo: Sequence[Item], output: Path) -> None:
        """Says what the ratings cost before the first request."""
        there = f"; {len(items) - len(todo):,} are in {output / VOTES} already" if len(todo) < len(items) else ""
        print(
            f"judge {self.engine.models[0]}: {len(todo):,} ratings of {self.votes} votes, "
            f"{len(todo) * self.votes:,} answers{there}",
            flush=True,
        )

    def _ask(self, items: Sequence[Item]) -> Iterator[tuple[Item, Votes]]:
        """The votes about each item, as they are complete."""
        if not items:
            return
        self.engine.check()
        name = self.engine.models[0]
        judge = self.engine.load(name, self.sampling.template)
        questions = [item.question() for item in items]
        with tqdm(total=len(items) * self.votes, desc=f"judge {name}", unit="vote", dynamic_ncols=True) as bar:
            for p, replies in groupby(self.engine.sample(judge, questions, self.sampling), key=lambda found: found[0]):
                votes = [rating(reply.text) for _, reply in replies]
                bar.update(len(votes))
                yield items[p], votes

    def _notes(self, items: Mapping[str, Item], known: Mapping[str, Votes], each: int, prompts: int) -> list[str]:
        lines = []
        for criterion in CRITERIA:
            votes = [known[key] for key, item in items.items() if item.criterion == criterion]
            if not votes:
                continue
            given = [[vote for vote in unit if vote is not None] for unit in votes]
            missing = sum(map(len, votes)) - sum(map(len, given))
            alpha = krippendorff_alpha(given)
            agreement = "no value, all votes are equal" if np.isnan(alpha) else f"{alpha:.2f}"
            lines.append(
                f"{criterion}: {len(votes):,} different replies, Krippendorff's alpha of {self.votes} votes each "
                f"{agreement}; {missing:,} of {sum(map(len, votes)):,} answers had no rating."
            )
        about = (
            f"Judge: {self.engine.models[0]}, on at most {each} replies per pair of at most {prompts} prompts, 1 to 5. "
        )
        return [
            about + " ".join(lines) + " Alpha tells how far this judge agrees with itself, not whether it is right."
        ]


@contextmanager
def in_terms_of_judge() -> Iterator[None]:
    """Names the judge's flags in messages about a server, which name those of --server."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("--server", "--judge")) from error


def _items(asked: Sequence[Asked], rows: Replies, count: Sequence[int]) -> Iterator[tuple[int, Item]]:
    """Every rating of these replies, with the index of its entry; style only of replies by a persona."""
    for i, entry in enumerate(asked):
        for text in rows[i][: count[i]] if count[i] else ():
            for criterion in CRITERIA:
                if criterion != "judged style" or entry.prompt.persona:
                    yield i, Item(criterion, entry.prompt, text)


def _means(
    asked: Sequence[Asked], rows: Replies, count: Sequence[int], known: Mapping[str, Votes]
) -> dict[str, np.ndarray]:
    """By criterion, the mean over an entry's replies of the mean vote [entries]."""
    ratings: dict[str, list[list[float]]] = {criterion: [[] for _ in asked] for criterion in CRITERIA}
    for i, item in _items(asked, rows, count):
        if votes := [vote for vote in known[item.key] if vote is not None]:
            ratings[item.criterion][i].append(float(np.mean(votes)))
    return {
        criterion: np.array([np.mean(values) if values else np.nan for values in entries])
        for criterion, entries in ratings.items()
    }


def _stacked(temperatures: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {criterion: np.stack([found[criterion] for found in temperatures]) for criterion in CRITERIA}
