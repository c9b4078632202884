"""Quality of texts: similarity to real replies and, if all correct replies are known, exact scores."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_sfr.evaluation.generate.prompts import Prompt


@dataclass(frozen=True)
class Judgement:
    """The mode of a reply (None: not correct for this prompt), and whether all of it is in its persona's voice."""

    mode: Hashable | None
    is_faithful: bool


class Truth(Protocol):
    """A world in which every correct reply is known."""

    def judge(self, prompt: Prompt, text: str) -> Judgement: ...

    def modes(self, prompt: Prompt) -> Mapping[str, frozenset[Hashable]]:
        """Named sets of the correct modes of a prompt, with the same names for every prompt."""
        ...


def true_scores(truth: Truth, prompt: Prompt, texts: Sequence[str]) -> dict[str, float]:
    """Precision (share correct in content and persona), fidelity (share in the persona), coverage of each set of modes.

    Coverage is the share of a set that correct replies produce; it rises with the number of texts. NaN without texts,
    and for a set without modes.
    """
    n = len(texts) or float("nan")
    judgements = [truth.judge(prompt, text) for text in texts]
    right = [judged.mode for judged in judgements if judged.mode is not None and judged.is_faithful]
    coverage = {
        f"coverage, {name}": len(modes.intersection(right)) / len(modes) if modes and texts else float("nan")
        for name, modes in truth.modes(prompt).items()
    }
    fidelity = sum(judged.is_faithful for judged in judgements) / n
    return {"precision": len(right) / n, "fidelity": fidelity, **coverage}


def relevance(vectors: np.ndarray, references: np.ndarray) -> float:
    """Mean cosine of a text [n, dim] to the nearest real reply [m, dim]; all are unit vectors. NaN without any."""
    return float((vectors @ references.T).max(axis=1).mean()) if len(vectors) and len(references) else float("nan")


def context_relevance(vectors: np.ndarray, question: np.ndarray) -> float:
    """Mean cosine of a text [n, dim] to the question [1, dim]; all are unit vectors. NaN without either."""
    return float((vectors @ question.T).mean()) if len(vectors) and len(question) else float("nan")


def style_match(vectors: np.ndarray, persona: str, references: Mapping[str, np.ndarray]) -> float:
    """Share of texts whose nearest real reply to the same prompt, of all personas' replies, is their own persona's.

    NaN if fewer than two personas have a reply to this prompt.
    """
    known = {name: rows for name, rows in references.items() if len(rows)}
    if len(known) < 2 or persona not in known or not len(vectors):
        return float("nan")
    nearest = {name: (vectors @ rows.T).max(axis=1) for name, rows in known.items()}
    others = np.max([cosines for name, cosines in nearest.items() if name != persona], axis=0)
    return float(np.mean(nearest[persona] > others))
