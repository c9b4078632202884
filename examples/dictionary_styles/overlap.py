"""Finds text that one dictionary took over from another without saying so, by runs of words that both have."""

import re
from collections.abc import Iterable, Iterator

RUN = 6  # words; shared runs of six are copying, not chance
SHARE = 0.3  # of a reply's runs that must be known for it to be another's text

# Who copied whom: WordNet went into GCIDE, the Jargon File into FOLDOC, Bierce and jargon into the fortunes.
ORIGINALS = {"webster": ("wordnet",), "foldoc": ("jargon",), "fortunes": ("bierce", "jargon")}


def runs(text: str) -> Iterator[int]:
    """Hashes of all runs of six words; a shorter text is one run."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    for start in range(max(1, len(words) - RUN + 1)):
        yield hash(tuple(words[start : start + RUN]))


def known_runs(replies: Iterable[str]) -> set[int]:
    return {run for reply in replies for run in runs(reply)}


def is_copied(reply: str, known: set[int]) -> bool:
    found = [run in known for run in runs(reply)]
    return sum(found) >= SHARE * len(found)
