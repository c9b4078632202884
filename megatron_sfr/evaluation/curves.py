"""One curve for each model: replies sampled at every temperature, every score kept prompt by prompt."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_sfr.data.encoder import Encoder
from megatron_sfr.evaluation.answers import Answers, Questions
from megatron_sfr.evaluation.diversity import cross_style_bleu, distinct_n, embedding_spread, self_bleu
from megatron_sfr.evaluation.prompts import Asked
from megatron_sfr.evaluation.quality import Truth, relevance, style_match, true_scores
from megatron_sfr.evaluation.sampling import SamplingOptions

Scores = dict[str, np.ndarray]  # name: one value for each shared prompt [P]


@dataclass(frozen=True)
class EvaluationOptions:
    """What is sampled and how much of it the quadratic and the slow metrics look at."""

    sampling: SamplingOptions
    temperatures: tuple[float, ...] = (0.5, 0.7, 1.0, 1.3)
    pairs: int = 16  # BLEU comparisons: for each prompt and persona (self-BLEU), for each prompt (cross-style BLEU)
    embedded: int = 4  # replies embedded for each prompt and persona
    embedded_prompts: int = 32  # shared prompts whose replies are embedded

    def __post_init__(self) -> None:
        if not self.temperatures or len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError("temperatures: give at least one, each once")
        for name in ("pairs", "embedded", "embedded_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")


@dataclass(frozen=True)
class Loss:
    """Token-level loss at temperature 1, by shared prompt: sum of -ln p [P] and tokens [P]."""

    nll: np.ndarray
    tokens: np.ndarray

    @property
    def per_token(self) -> np.ndarray:
        """Nats a token [P]; NaN for a prompt without replies in this set."""
        return self.nll / np.where(self.tokens > 0, self.tokens, np.nan)


@dataclass(frozen=True)
class Curve:
    """A model over the temperatures: each score [T, P], and its losses on named sets of real replies."""

    model: str
    temperatures: tuple[float, ...]
    scores: Scores
    losses: dict[str, Loss]


class Scorer:
    """Everything about the data that does not depend on a model: the grouping by shared prompt, references embedded."""

    def __init__(
        self,
        asked: Sequence[Asked],
        sets: Mapping[str, Sequence[Asked]],
        options: EvaluationOptions,
        encoder: Encoder,
        truth: Truth | None = None,
    ) -> None:
        """asked: the prompts, with the replies that relevance and style refer to; sets: replies for the loss."""
        self.asked, self.options = asked, options
        self._sets, self._encoder, self._truth = sets, encoder, truth
        self._cells: dict[str, list[int]] = defaultdict(list)
        for i, entry in enumerate(asked):
            self._cells[entry.prompt.shared].append(i)
        self.prompts = list(self._cells)
        count = min(options.embedded_prompts, len(self.prompts))
        self._embedded = {self.prompts[i * len(self.prompts) // count] for i in range(count)}
        texts = [entry.texts if entry.prompt.shared in self._embedded else [] for entry in asked]
        self._references = self._embed(texts)

    def questions(self) -> Questions:
        """What every model is asked."""
        options = self.options
        return Questions(
            prompts=[entry.prompt for entry in self.asked],
            sweep=[replace(options.sampling, temperature=temperature) for temperature in options.temperatures],
            sets={name: [c for entry in asked for c in entry.references] for name, asked in self._sets.items()},
        )

    def notes(self) -> list[str]:
        """What the numbers are made of, and how much of it the capped scores look at."""
        options = self.options
        return [
            f"{len(self.prompts)} prompts, {len(self.asked)} pairs of prompt and persona, {options.sampling.samples} "
            "replies to each pair at each temperature; models share random numbers.",
            f"BLEU: at most {options.pairs} comparisons a pair (self-BLEU) or a prompt (CS-SB). relevance, style and "
            f"spread: {options.embedded} replies a pair on {len(self._embedded)} prompts, embedded by "
            f"{self._encoder.identity.encoder}; incoherent text has a high spread too.",
        ]

    def scores(self, replies: Sequence[Sequence[str]]) -> Scores:
        """Every score of one model at one temperature; replies [entries of asked][samples]."""
        chosen = [
            list(texts[: self.options.embedded]) if entry.prompt.shared in self._embedded else []
            for entry, texts in zip(self.asked, replies, strict=True)
        ]
        vectors = self._embed(chosen)
        rows = [self._score_prompt(cells, replies, vectors) for cells in self._cells.values()]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def curve(self, answers: Answers) -> Curve:
        """Every score of a model at every temperature, and its losses."""
        scores = [self.scores([[reply.text for reply in row] for row in rows]) for rows in answers.replies]
        stacked = {name: np.stack([row[name] for row in scores]) for name in scores[0]}
        losses = {name: self._loss(self._sets[name], *found) for name, found in answers.losses.items()}
        return Curve(answers.model, self.options.temperatures, stacked, losses)

    def _loss(self, asked: Sequence[Asked], nll: np.ndarray, tokens: np.ndarray) -> Loss:
        """Losses of a set's replies, gathered by shared prompt."""
        place = {shared: i for i, shared in enumerate(self.prompts)}
        index = np.array([place[entry.prompt.shared] for entry in asked for _ in entry.references], dtype=int)
        return Loss(*(np.bincount(index, values, len(place)) for values in (nll, tokens)))

    def _score_prompt(
        self, cells: Sequence[int], replies: Sequence[Sequence[str]], vectors: Sequence[np.ndarray]
    ) -> dict[str, float]:
        """Scores of one shared prompt: means over its personas, and the comparison between them."""
        references = {self.asked[i].prompt.persona or "": self._references[i] for i in cells}
        by_cell = [self._score_cell(i, replies[i], vectors[i], references) for i in cells]
        means = {name: _mean([row[name] for row in by_cell]) for name in by_cell[0]}
        by_persona = {self.asked[i].prompt.persona or "": replies[i] for i in cells}
        seed = self.asked[cells[0]].prompt.key
        means["CS-SB-1"] = cross_style_bleu(by_persona, 1, pairs=self.options.pairs, seed=seed)
        return means

    def _score_cell(
        self, i: int, texts: Sequence[str], vectors: np.ndarray, references: Mapping[str, np.ndarray]
    ) -> dict[str, float]:
        prompt = self.asked[i].prompt
        true = true_scores(self._truth, prompt, texts) if self._truth else {}
        return true | {
            "relevance": relevance(vectors, self._references[i]),
            "style": style_match(vectors, prompt.persona or "", references),
            "distinct-2": distinct_n(texts, 2),
            "self-BLEU-4": self_bleu(texts, 4, pairs=self.options.pairs, seed=prompt.key),
            "spread": embedding_spread(vectors),
        }

    def _embed(self, texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Unit vectors [texts, dim] for each list of texts; each distinct text is encoded once, long with long."""
        distinct = sorted({text for row in texts for text in row}, key=len)
        vector: dict[str, np.ndarray] = {}
        for start in range(0, len(distinct), 64):
            batch = distinct[start : start + 64]
            vector |= dict(zip(batch, self._encoder.encode(batch), strict=True))
        empty = np.zeros((0, self._encoder.identity.dim), np.float32)
        return [np.stack([vector[text] for text in row]) if row else empty for row in texts]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
