"""Diversity of texts by their words: distinct-n, self-BLEU, cross-style BLEU. Pure functions.

None of them is meaningful without a measure of quality: noise is diverse. `tokenizer` is one of sacrebleu's; `auto`
chooses it by the script of the given texts.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import permutations

import numpy as np

from megatron_sfr.evaluation.scores.tokenizers import Choice, Tokenizer, bleu_metric, resolved, words


def distinct_n(texts: Sequence[str], n: int, tokenizer: Choice = "auto") -> float:
    """Distinct n-grams of words over all n-grams of words in the texts, in (0, 1] (Li et al., NAACL 2016).

    It falls with the number and length of texts: compare equal numbers. NaN if no text has n words.
    """
    chosen = resolved(tokenizer, texts)
    tokens = [words(text, chosen) for text in texts]
    grams = [gram for row in tokens for gram in zip(*(row[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def bleu(hypothesis: str, reference: str, n: int, tokenizer: Choice = "auto") -> float:
    """Sentence BLEU-n in [0, 1] by sacrebleu: exponential smoothing, effective order for short texts.

    Two texts without any token are equal: 1. Against any other text, one without tokens has 0.
    """
    tokenizer = resolved(tokenizer, (hypothesis, reference))
    if not _tokens(hypothesis, n, tokenizer) and not _tokens(reference, n, tokenizer):
        return 1.0
    return min(1.0, float(bleu_metric(n, tokenizer).sentence_score(hypothesis, [reference]).score) / 100)


def self_bleu(texts: Sequence[str], n: int, *, pairs: int, seed: int, tokenizer: Choice = "auto") -> float:
    """Pairwise self-BLEU: mean BLEU-n of one text against one other, over ordered pairs of texts for one prompt.

    1 if all texts are equal. Uses at most `pairs` pairs, drawn by seed, because the number of pairs is quadratic in the
    number of texts. NaN for fewer than two texts.
    """
    tokenizer = resolved(tokenizer, texts)
    chosen = _draw(list(permutations(range(len(texts)), 2)), pairs, seed)
    return _mean([bleu(texts[i], texts[j], n, tokenizer) for i, j in chosen])


def self_bleu_all(texts: Sequence[str], n: int, tokenizer: Choice = "auto") -> float:
    """Self-BLEU of Zhu et al. (SIGIR 2018): mean BLEU-n of each text with all the others as its references.

    An n-gram's count is clipped to its largest count in any reference; the length is compared with the nearest
    reference. Smoothing is that of `bleu`. Linear in the number of texts: an n-gram's largest count in the other texts
    is its largest or second largest count in all. 1 if all texts are equal. NaN for fewer than two texts.
    """
    if len(texts) < 2:
        return float("nan")
    tokenizer = resolved(tokenizer, texts)
    counts = [Counter(_grams(_tokens(text, n, tokenizer), n)) for text in texts]
    lengths = [len(_tokens(text, n, tokenizer)) for text in texts]
    top: dict[tuple[str, ...], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for count in counts:
        for gram, c in count.items():
            top[gram] = max((c, top[gram][0]), (top[gram][0], max(c, top[gram][1])))
    scores = []
    for i, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        others = lengths[:i] + lengths[i + 1 :]
        if length == 0:
            scores.append(float(0 in others))
            continue
        correct, total = [0] * n, [max(length - k, 0) for k in range(n)]
        for gram, c in count.items():
            largest, second = top[gram]
            correct[len(gram) - 1] += min(c, second if c == largest else largest)
        nearest = min(others, key=lambda other: (abs(other - length), other))
        scores.append(min(1.0, _bleu_of(correct, total, length, nearest)))
    return _mean(scores)


def _bleu_of(correct: list[int], total: list[int], length: int, nearest: int) -> float:
    from sacrebleu.metrics.bleu import BLEU

    n = len(correct)
    found = BLEU.compute_bleu(correct, total, length, nearest, "exp", effective_order=True, max_ngram_order=n)
    return float(found.score) / 100


def _tokens(text: str, n: int, tokenizer: Tokenizer) -> list[str]:
    return bleu_metric(n, tokenizer).tokenizer(text.rstrip()).split()


def _grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All n-grams of 1 to n tokens."""
    return [tuple(tokens[i : i + k]) for k in range(1, n + 1) for i in range(len(tokens) - k + 1)]


def cross_style_bleu(
    texts: Mapping[str, Sequence[str]], n: int, *, pairs: int, seed: int, tokenizer: Choice = "auto"
) -> float:
    """CS-SB-n: mean BLEU-n of a reply of persona a against one of persona b, over ordered pairs (a, b), on one prompt.

    At most `pairs` comparisons cycle through the ordered pairs of personas, with texts drawn by seed. NaN for fewer
    than two personas.
    """
    tokenizer = resolved(tokenizer, (text for row in texts.values() for text in row))
    rng = random.Random(seed)
    styles = list(permutations([persona for persona in sorted(texts) if texts[persona]], 2))
    rng.shuffle(styles)
    chosen = [styles[i % len(styles)] for i in range(pairs)] if styles else []
    return _mean([bleu(rng.choice(texts[a]), rng.choice(texts[b]), n, tokenizer) for a, b in chosen])


def _draw[T](items: list[T], count: int, seed: int) -> list[T]:
    return items if len(items) <= count else random.Random(seed).sample(items, count)


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
