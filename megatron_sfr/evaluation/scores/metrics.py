"""The table of metrics: what each measures, whether less of it is better, and one line on how to read it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    kind: Literal["quality", "diversity"]
    meaning: str
    lower: bool = False
    """Whether a lower value is better or more diverse."""
    right: float | None = None
    """The value of real replies, for a score that is neither better high nor low."""
    detail: bool = False
    """Reported in the files only."""


METRICS = {
    "precision": Metric("quality", "share of replies that are correct in content and persona"),
    "fidelity": Metric("quality", "share of replies in the persona, judged exactly"),
    "coverage": Metric("diversity", "share of the known correct replies that are produced"),
    "style fidelity": Metric("quality", "share of replies that a classifier of real text assigns to the persona"),
    "relevance": Metric("quality", "cosine of a reply to the nearest real reply"),
    "style": Metric("quality", "share of replies whose nearest real reply is their own persona's", detail=True),
    "context": Metric("quality", "cosine of a reply to the question"),
    "judged context": Metric("quality", "a judge's rating of how relevant a reply is to what was said, 1 to 5"),
    "judged style": Metric("quality", "a judge's rating of how well a reply fits its persona, 1 to 5"),
    "loops": Metric("quality", "share of replies that repeat themselves, a sign of a broken model", lower=True),
    "MMD": Metric("quality", "squared distance to the distribution of the real replies", lower=True, detail=True),
    "collision ratio": Metric("diversity", "collisions over those of the real replies", right=1.0),
    "collisions": Metric("diversity", "share of pairs of replies with the same meaning", lower=True, detail=True),
    "distinct_k": Metric("diversity", "different meanings among the replies embedded", detail=True),
    "utility_k": Metric("diversity", "utility of replies that say something new, for a user who reads them in order"),
    "semantic entropy": Metric("diversity", "entropy of the meanings, in nats", detail=True),
    "modes": Metric("diversity", "share of the clusters of real replies that are hit"),
    "distinct-2": Metric("diversity", "distinct bigrams over all bigrams", detail=True),
    "self-BLEU-4": Metric("diversity", "BLEU-4 of a reply against one other of the persona (pairwise)", lower=True),
    "self-BLEU-4 all": Metric(
        "diversity", "BLEU-4 of a reply against all others of the persona (Zhu et al. 2018)", lower=True, detail=True
    ),
    "empty": Metric("quality", "share of replies that are blank", lower=True, detail=True),
    "spread": Metric("diversity", "mean 1 - cosine between replies"),
    "Vendi": Metric("diversity", "effective number of different replies among those embedded"),
    "CS-SB-1": Metric("diversity", "BLEU-1 between personas' replies to one prompt", lower=True),
    "CS-SB-2": Metric("diversity", "BLEU-2 between personas' replies to one prompt", lower=True, detail=True),
    "CS-SB-4": Metric("diversity", "BLEU-4 between personas' replies to one prompt", lower=True, detail=True),
}
CROSS_STYLE_ORDERS = tuple(int(name.removeprefix("CS-SB-")) for name in METRICS if name.startswith("CS-SB-"))


def metric(name: str) -> Metric:
    """The metric of a score; `coverage, far` is a coverage."""
    return METRICS[name.partition(",")[0]]
