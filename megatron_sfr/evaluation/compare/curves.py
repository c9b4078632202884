"""One curve per model: replies sampled at every temperature, with every score for each prompt."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_sfr.evaluation.compare.questions import Answered, EvaluationOptions, Questions
from megatron_sfr.evaluation.generate.prompts import Asked, evenly_spaced
from megatron_sfr.evaluation.scores.collisions import (
    collision_rate,
    distinct_k,
    novelty_classes,
    semantic_entropy,
    squared_mmd,
    utility_k,
)
from megatron_sfr.evaluation.scores.diversity import (
    cross_style_bleu,
    distinct_n,
    self_bleu,
    self_bleu_all,
)
from megatron_sfr.evaluation.scores.embeddings import mode_coverage, spread, vendi_score
from megatron_sfr.evaluation.scores.metrics import CROSS_STYLE_ORDERS
from megatron_sfr.evaluation.scores.quality import Truth, context_relevance, relevance, style_match, true_scores
from megatron_sfr.evaluation.scores.repetition import LOOP, loop_share
from megatron_sfr.evaluation.scores.style import StyleJudge
from megatron_sfr.evaluation.scores.tokenizers import bleu_metric, resolved

if TYPE_CHECKING:
    from megatron_sfr.data.targets.encoder import Encoder

Scores = dict[str, np.ndarray]  # name: one value for each shared prompt [P]
AGAINST_REFERENCES = ("relevance", "style", "modes", "MMD")  # real replies can only be compared with other real replies


@dataclass(frozen=True)
class Loss:
    """Token-level loss at temperature 1, by shared prompt: sum of -ln p [P] and tokens [P]."""

    nll: np.ndarray
    tokens: np.ndarray

    @property
    def per_token(self) -> np.ndarray:
        """Nats per token [P]; NaN for a prompt without replies in this set."""
        return self.nll / np.where(self.tokens > 0, self.tokens, np.nan)

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.nll + other.nll, self.tokens + other.tokens)


@dataclass(frozen=True)
class Curve:
    """A model's scores over temperatures, [T, P] each, and its losses on real replies, by named set and by persona."""

    model: str
    temperatures: tuple[float | None, ...]
    scores: Scores
    losses: dict[str, Loss]
    personas: dict[str, Loss]
    vectors: Sequence[Sequence[np.ndarray]] = ()
    """Of the embedded replies, by temperature and entry of `asked`."""
    entries: Scores = field(default_factory=dict)
    """[T, entries of `asked`]: the scores that one persona's replies to a prompt have by themselves."""


class Scorer:
    """Everything about the data that does not depend on a model: grouping by shared prompt, embedded references."""

    def __init__(
        self,
        asked: Sequence[Asked],
        sets: Mapping[str, Sequence[Asked]],
        options: EvaluationOptions,
        encoder: "Encoder | None",
        truth: Truth | None = None,
        judge: StyleJudge | None = None,
    ) -> None:
        """asked: the prompts, with the replies that relevance and style refer to; sets: replies for the loss.

        encoder: None leaves the scores by embeddings without a value.
        """
        self.asked, self.options = asked, options
        self._sets, self._encoder, self._truth, self._judge = sets, encoder, truth, judge
        self._cells: dict[str, list[int]] = defaultdict(list)
        for i, entry in enumerate(asked):
            self._cells[entry.prompt.shared].append(i)
        self.prompts = list(self._cells)
        self.embedded_prompts = evenly_spaced(self.prompts, options.embedded_prompts)
        texts = (text for entry in asked for text in (entry.prompt.question, *entry.texts))
        self.tokenizer = resolved(options.bleu_tokenize, texts)
        bleu_metric(1, self.tokenizer)  # if it is not installed, fails before sampling
        self._references = self._embed([entry.texts for entry in asked])
        self._questions = self._embed([[entry.prompt.question] for entry in asked])

    @property
    def encoder(self) -> str | None:
        """The encoder's name. None: scores by embeddings have no value."""
        return None if self._encoder is None else self._encoder.identity.encoder

    def questions(self) -> Questions:
        """The questions for every model."""
        options = self.options
        return Questions(
            prompts=[entry.prompt for entry in self.asked],
            sweep=[replace(options.sampling, temperature=temperature) for temperature in options.temperatures],
            sets={name: [c for entry in asked for c in entry.references] for name, asked in self._sets.items()},
        )

    def notes(self, drawn: str = "") -> list[str]:
        """Lines about the data behind the numbers, and how much of it the capped scores use.

        drawn: how many replies there are and where they come from.
        """
        options = self.options
        return [
            f"{len(self.prompts)} prompts, {len(self.asked)} pairs of prompt and persona"
            + (f", {drawn}." if drawn else "."),
            f"BLEU is quadratic in the replies and capped: at most {options.pairs} comparisons, drawn by seed, a pair "
            "(self-BLEU-4, pairwise) or a prompt (CS-SB). self-BLEU-4 all (Zhu et al. 2018) reads every reply.",
            f"BLEU's tokens: sacrebleu's {self.tokenizer} "
            f"({'by the text' if options.bleu_tokenize == 'auto' else 'as asked'}); distinct-2 counts "
            + ("words between spaces." if self.tokenizer in ("13a", "intl") else "the same tokens."),
            self._embedding_note() + f" A loop has {LOOP} words or more.",
            "real: the data's own replies, judged as a model's; against other real replies where a score needs them. "
            "Their number differs from the models', and with it what grows with numbers.",
        ]

    def _embedding_note(self) -> str:
        if self._encoder is None:
            return "Nothing is embedded: scores by embeddings have no value."
        return (
            f"Embedded (for relevance, style, context, modes, MMD, collisions, distinct_k, semantic entropy, spread, "
            f"Vendi): {self.options.embedded} replies per pair on {len(self.embedded_prompts)} prompts, by "
            f"{self.encoder}; incoherent text is spread too. Replies have the same meaning, and real "
            f"replies the same mode, at cosine {self.options.mode_threshold:g}."
        )

    def scores(
        self,
        replies: Sequence[Sequence[str]],
        vectors: Sequence[np.ndarray],
        utilities: Sequence[Sequence[float]] | None = None,
    ) -> tuple[Scores, Scores]:
        """Every score of one model at one temperature: by shared prompt, and by entry of asked.

        replies: `[entry of asked][sample]`, read prompt by prompt. vectors: of `embedded`.
        """
        by_prompt, by_entry = self._score(replies, vectors, self._references)
        if utilities is not None:
            by_entry["utility_k"] = self._utility(vectors, utilities)
            by_prompt["utility_k"] = self.by_prompt(by_entry["utility_k"])
        return by_prompt, by_entry

    def _utility(self, vectors: Sequence[np.ndarray], utilities: Sequence[Sequence[float]]) -> np.ndarray:
        """NoveltyBench's utility_k of the embedded replies, by entry of asked."""
        classes = [novelty_classes(rows, self.options.mode_threshold) for rows in vectors]
        found = zip(classes, utilities, strict=True)
        return np.array([utility_k(row, list(given[: len(row)])) for row, given in found])

    def by_prompt(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Means over the entries of each shared prompt: [entries] -> [P]."""
        return np.array([_mean([values[i] for i in cells]) for cells in self._cells.values()])

    def embedded(self, replies: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Vectors of the first replies of each entry of `asked`, as many as the scores read."""
        return self._embed(replies, self.options.embedded)

    @property
    def references(self) -> Sequence[np.ndarray]:
        """Vectors of the real replies, by entry of `asked`."""
        return self._references

    def real(self) -> Scores:
        """Every score of the real replies, computed as for a model.

        If a score compares with real replies, every second one is compared with the rest; NaN for prompts with one.
        """
        texts, vectors = [entry.texts for entry in self.asked], self._references
        held, rest = ([rows[start::2] for rows in vectors] for start in (1, 0))
        halves, _ = self._score([row[1::2] for row in texts], held, rest)
        return self._score(texts, vectors, vectors)[0] | {name: halves[name] for name in AGAINST_REFERENCES}

    def curve(self, answers: Answered, judged: Mapping[str, np.ndarray] | None = None) -> Curve:
        """Every score of a model at every temperature, and its losses.

        judged: by name, ratings by temperature and entry of asked [T, entries].
        """
        utilities = answers.utilities
        vectors = [self.embedded(rows) for rows in answers.replies]
        scores = [
            self.scores(rows, vectors[t], utilities[t] if utilities else None) for t, rows in enumerate(answers.replies)
        ]
        prompts, entries = (_stacked([pair[i] for pair in scores]) for i in (0, 1))
        entries |= judged or {}
        prompts |= {name: np.stack(list(map(self.by_prompt, rows))) for name, rows in (judged or {}).items()}
        losses = {name: self._losses(name, *found) for name, found in answers.losses.items()}
        nothing = Loss(*np.zeros((2, len(self.prompts))))
        whole = {name: sum(by_persona.values(), nothing) for name, by_persona in losses.items()}
        personas = sorted({persona for by_persona in losses.values() for persona in by_persona})
        spoken = {p: sum((found[p] for found in losses.values() if p in found), nothing) for p in personas}
        return Curve(answers.model, answers.temperatures, prompts, whole, spoken, vectors, entries)

    def _losses(self, name: str, nll: np.ndarray, tokens: np.ndarray) -> dict[str, Loss]:
        """Losses of a set's replies for each persona, grouped by shared prompt."""
        place = {shared: i for i, shared in enumerate(self.prompts)}
        entries = [entry for entry in self._sets[name] for _ in entry.references]
        index = np.array([place[entry.prompt.shared] for entry in entries], dtype=int)
        speaker = np.array([entry.prompt.persona or "" for entry in entries], dtype=object)
        return {
            persona: Loss(*(np.bincount(index, values * (speaker == persona), len(place)) for values in (nll, tokens)))
            for persona in sorted(set(speaker))
        }

    def _score(
        self, replies: Sequence[Sequence[str]], vectors: Sequence[np.ndarray], references: Sequence[np.ndarray]
    ) -> tuple[Scores, Scores]:
        """Scores by shared prompt and by entry of asked; replies, vectors and references by entry of asked."""
        found = [self._score_prompt(cells, replies, vectors, references) for cells in self._cells.values()]
        by_entry = {i: scores for _, entries in found for i, scores in entries.items()}
        return _stacked([scores for scores, _ in found]), _stacked([by_entry[i] for i in range(len(self.asked))])

    def _score_prompt(
        self,
        cells: Sequence[int],
        replies: Sequence[Sequence[str]],
        vectors: Sequence[np.ndarray],
        references: Sequence[np.ndarray],
    ) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
        """One shared prompt: means over its personas with the comparison between them; and each entry's scores."""
        real = {self.asked[i].prompt.persona or "": references[i] for i in cells}
        texts = {i: replies[i] for i in cells}
        by_entry = {i: self._score_cell(i, texts[i], vectors[i], real) for i in cells}
        means = {name: _mean([by_entry[i][name] for i in cells]) for name in by_entry[cells[0]]}
        by_persona = {self.asked[i].prompt.persona or "": texts[i] for i in cells}
        seed = self.asked[cells[0]].prompt.key
        for n in CROSS_STYLE_ORDERS:
            means[f"CS-SB-{n}"] = cross_style_bleu(
                by_persona, n, pairs=self.options.pairs, seed=seed, tokenizer=self.tokenizer
            )
        return means, by_entry

    def _score_cell(
        self, i: int, texts: Sequence[str], vectors: np.ndarray, references: Mapping[str, np.ndarray]
    ) -> dict[str, float]:
        prompt = self.asked[i].prompt
        persona = prompt.persona or ""
        judge = self._judge
        true = true_scores(self._truth, prompt, texts) if self._truth else {}
        return true | {
            "style fidelity": judge.share(prompt.shared, persona, texts) if judge else float("nan"),
            "relevance": relevance(vectors, references[persona]),
            "style": style_match(vectors, persona, references),
            "context": context_relevance(vectors, self._questions[i]),
            "loops": loop_share(texts),
            "modes": mode_coverage(vectors, references[persona], self.options.mode_threshold),
            "MMD": squared_mmd(vectors, references[persona]),
            "collisions": collision_rate(vectors, self.options.mode_threshold),
            "distinct_k": distinct_k(vectors, self.options.mode_threshold),
            "semantic entropy": semantic_entropy(vectors, self.options.mode_threshold),
            "distinct-2": distinct_n(texts, 2, self.tokenizer),
            "self-BLEU-4": self_bleu(texts, 4, pairs=self.options.pairs, seed=prompt.key, tokenizer=self.tokenizer),
            "self-BLEU-4 all": self_bleu_all(texts, 4, self.tokenizer),
            "empty": _mean([float(not text.strip()) for text in texts]),
            "spread": float(spread(vectors)),
            "Vendi": vendi_score(vectors),
        }

    def _embed(self, rows: Sequence[Sequence[str]], most: int | None = None) -> list[np.ndarray]:
        """Unit vectors [texts, dim] for (the first `most`) texts of each entry; empty if its prompt is not embedded.

        Each distinct text is encoded once, in batches of similar length.
        """
        if self._encoder is None:
            return [np.zeros((0, 1), np.float32) for _ in self.asked]
        chosen = set(self.embedded_prompts)
        texts = [rows[i][:most] if entry.prompt.shared in chosen else [] for i, entry in enumerate(self.asked)]
        distinct = sorted({text for row in texts for text in row}, key=len)
        vector: dict[str, np.ndarray] = {}
        for start in range(0, len(distinct), 64):
            batch = distinct[start : start + 64]
            vector |= dict(zip(batch, self._encoder.encode(batch), strict=True))
        empty = np.zeros((0, self._encoder.identity.dim), np.float32)
        return [np.stack([vector[text] for text in row]) if row else empty for row in texts]


def _stacked(rows: Sequence[Mapping[str, Any]]) -> Scores:
    """One array per score, over the rows."""
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
