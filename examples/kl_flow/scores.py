"""How texts are scored: entropy of their n-grams, and a judge's loss, with intervals over texts."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import pairwise

import numpy as np
import torch

from megatron_sfr.evaluation.generate.transformers_engine import Model
from megatron_sfr.evaluation.scores.bootstrap import Estimate, estimate, interval, resamples

Row = Sequence[int]


def ngrams(row: Row, n: int) -> list[Hashable]:
    """Tokens (n = 1) or pairs of neighbours (n = 2)."""
    return list(row) if n == 1 else list(pairwise(row))


def entropy(counts: np.ndarray) -> np.ndarray:
    """Of frequencies along the last axis, in nats: -sum p ln p."""
    p = counts / counts.sum(axis=-1, keepdims=True)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)


def entropy_within(rows: Sequence[Row], n: int) -> Estimate:
    """Mean over texts of the entropy of a text's own n-grams, nats: low where a text repeats itself."""
    return estimate(np.array([entropy(np.array(list(Counter(ngrams(row, n)).values()))) for row in rows]))


def entropy_over_all(rows: Sequence[Row], n: int) -> Estimate:
    """Entropy of the n-grams of all texts together, nats: low if texts are similar.

    Counts of few texts make it too low, and those of a resample lower still: compare equal numbers of tokens. The
    interval has the bootstrap's width around the estimate.
    """
    counted = [Counter(ngrams(row, n)) for row in rows]
    column = {gram: i for i, gram in enumerate(dict.fromkeys(gram for counts in counted for gram in counts))}
    counts = np.zeros((len(rows), len(column)), dtype=np.float32)
    for i, row in enumerate(counted):
        for gram, count in row.items():
            counts[i, column[gram]] = count
    found = float(entropy(counts.sum(axis=0).astype(np.float64)))
    times = np.stack([np.bincount(draw, minlength=len(rows)) for draw in resamples(len(rows))]).astype(np.float32)
    drawn = np.array([entropy(row @ counts) for row in times])
    return Estimate(found, *interval(drawn - drawn.mean() + found), len(rows))


@torch.inference_mode()
def losses(judge: Model, rows: Sequence[Row], batch_size: int = 16) -> np.ndarray:
    """The judge's mean -ln p of a text's tokens from the second one on, nats: [texts], which have one length."""
    found = []
    for i in range(0, len(rows), batch_size):
        tokens_BL = torch.tensor(rows[i : i + batch_size], device=judge.network.device)
        logits_BLV = judge.network(input_ids=tokens_BL, use_cache=False).logits
        nll_BL = torch.nn.functional.cross_entropy(logits_BLV[:, :-1].float().mT, tokens_BL[:, 1:], reduction="none")
        found.append(nll_BL.double().mean(dim=1).cpu().numpy())
    return np.concatenate(found)


def perplexity(nats: np.ndarray) -> Estimate:
    """exp of the mean loss a token."""
    mean = estimate(nats)
    return Estimate(math.exp(mean.mean), math.exp(mean.low), math.exp(mean.high), mean.n)
