"""Style fidelity: whether a classifier trained on real replies assigns a text to the intended persona.

tf-idf of words and word pairs, then logistic regression (scikit-learn). It is cross-fitted: a text is judged by a
classifier that has seen no reply to its prompt, so it recognizes a persona by style, not by content. Real replies,
judged the same way, give the ceiling.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FOLDS = 5


@dataclass(frozen=True)
class Styled:
    """A real reply: shared prompt, persona, text."""

    shared: str
    persona: str
    text: str


class StyleJudge:
    """One classifier per fold of the prompts. `known` holds the personas that it distinguishes."""

    def __init__(self, rows: Sequence[Styled], *, folds: int = FOLDS) -> None:
        """Raises ValueError for fewer than two personas or fewer than two prompts."""
        prompts = list(dict.fromkeys(row.shared for row in rows))
        self.known = frozenset(row.persona for row in rows)
        if len(self.known) < 2 or len(prompts) < 2:
            raise ValueError(
                f"style fidelity needs real replies of two personas to two prompts or more; there are "
                f"{len(self.known)} personas and {len(prompts)} prompts"
            )
        folds = min(folds, len(prompts))
        self._fold = {prompt: i % folds for i, prompt in enumerate(prompts)}
        self._classifiers = [_fit([row for row in rows if self._fold[row.shared] != fold]) for fold in range(folds)]

    def share(self, shared: str, persona: str, texts: Sequence[str]) -> float:
        """Share of the texts assigned to the persona; NaN without texts, or for an unknown persona."""
        classifier = self._classifiers[
            self._fold.get(shared, 0)
        ]  # for a prompt without real replies any classifier is valid
        if not texts or persona not in self.known or classifier is None:
            return float("nan")
        return float(np.mean(classifier.predict(list(texts)) == persona))


def _fit(rows: Sequence[Styled]) -> Any:
    """The classifier of these replies; None if all have one persona, or they have no words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    if len({row.persona for row in rows}) < 2 or not any(row.text.split() for row in rows):
        return None
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+|[^\w\s]")
    classifier = make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced"))
    return classifier.fit([row.text for row in rows], [row.persona for row in rows])
