"""The real reply nearest to a generated one, among those to the same prompt: by embeddings, or by words without them.

Shapes: M real replies, D embedding dimension.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sfr.evaluation.generate.prompts import evenly_spaced
from megatron_sfr.evaluation.scores.tokenizers import Tokenizer, bleu_metric

MOST = 512
"""Real replies to a prompt that are compared with a generated one."""


@dataclass(frozen=True)
class Nearest:
    """A real reply: its position, and how similar it is, at most 1."""

    index: int
    similarity: float


class RealReplies:
    """The real replies to one prompt, of all personas; MOST of them, evenly spaced."""

    def __init__(
        self, spoken: Sequence[tuple[str, str]], tokenizer: Tokenizer, vectors_MD: np.ndarray | None = None
    ) -> None:
        """spoken: (persona, text) of each. vectors_MD: their unit vectors; without them words are compared."""
        kept = evenly_spaced(range(len(spoken)), MOST)
        self.known, self._tokenizer = len(spoken), tokenizer
        self.spoken = [spoken[i] for i in kept]
        self._vectors_MD = None if vectors_MD is None else vectors_MD[kept]
        self._words = [words_of(text, tokenizer) for _, text in self.spoken] if vectors_MD is None else []

    def nearest(self, text: str, vector_D: np.ndarray | None) -> Nearest | None:
        """vector_D: of the text, if the real replies have vectors."""
        if self._vectors_MD is not None and vector_D is not None:
            return nearest_by_vector(vector_D, self._vectors_MD)
        return nearest_by_words(words_of(text, self._tokenizer), self._words)


def nearest_by_vector(vector_D: np.ndarray, references_MD: np.ndarray) -> Nearest | None:
    """The reference with the largest cosine; all are unit vectors. None without references."""
    if not len(references_MD):
        return None
    cosines = references_MD @ vector_D
    index = int(np.argmax(cosines))
    return Nearest(index, float(cosines[index]))


def nearest_by_words(words: Counter[str], references: Sequence[Counter[str]]) -> Nearest | None:
    """The reference with the largest share of words in common: 2 |a ∩ b| / (|a| + |b|), of multisets.

    None if no reference has a word in common.
    """
    shares = [_overlap(words, reference) for reference in references]
    index = max(range(len(shares)), key=shares.__getitem__, default=0)
    return Nearest(index, shares[index]) if shares and shares[index] > 0 else None


def words_of(text: str, tokenizer: Tokenizer) -> Counter[str]:
    """BLEU's tokens in lower case, with their counts and without punctuation."""
    tokens = bleu_metric(1, tokenizer).tokenizer(text.lower().rstrip()).split()
    return Counter(token for token in tokens if any(map(str.isalnum, token)))


def _overlap(a: Counter[str], b: Counter[str]) -> float:
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 0.0
