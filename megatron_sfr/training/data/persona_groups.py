"""Groups of the data that have separate metrics: each persona of the training data and of each validation set.

The datasets number the groups, so that a batch says for each position which group it belongs to.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset

from megatron_sfr.data.prepared.conversations import PreparedData, Sample


@dataclass(frozen=True)
class Group:
    """The conversations of one persona in one part of the data."""

    part: str
    """The suffix of Megatron's metrics for this part: "" for training, validation, validation-NAME or test."""
    persona: str
    """"" for conversations without one, and for documents."""


def parts_of(datasets: Iterable[Any]) -> Iterator[Any]:
    """The datasets of single folders."""
    for dataset in datasets:
        if isinstance(dataset, list):
            yield from parts_of(dataset)
        elif isinstance(dataset, BlendedDataset):
            yield from dataset.datasets
        elif dataset is not None:
            yield dataset


def number_groups(built: Sequence[Any], *, multiple: bool = False, names: Sequence[str] | None = None) -> list[Group]:
    """Numbers the groups of all datasets and tells each dataset the numbers of its personas.

    Personas of the same name in the folders of a blend are one group. The groups of a part are ordered by decreasing
    number of conversations.

    Args:
        built: the datasets for training, validation and test, as upstream builds them.
        multiple: whether each validation folder is a separate set.
        names: names of these sets. Default: their numbers.
    """
    train, valid, test = built
    sets = valid if isinstance(valid, list) else [valid]
    labels = [f"validation-{name}" for name in names or range(len(sets))] if multiple else ["validation"]
    groups: list[Group] = []
    for part, dataset in zip(["", *labels, "test"], [train, *sets, test], strict=True):
        folders = list(parts_of([dataset]))
        counts = sum((Counter(personas_of(folder)) for folder in folders), Counter[str]())
        ordered = sorted(counts, key=lambda persona: (-counts[persona], persona))
        numbers = {persona: len(groups) + i for i, persona in enumerate(ordered)}
        groups += [Group(part, persona) for persona in ordered]
        for folder in folders:
            folder.groups = numbers
    return groups


def personas_of(dataset: Any) -> dict[str, int]:
    """Conversations by persona of the prepared folder behind a dataset."""
    data = dataset.dataset
    return data.manifest.personas if isinstance(data, PreparedData) else {"": 1}


def group_array(samples: Sequence[Sample], starts: np.ndarray, groups: dict[str, int], length: int) -> np.ndarray:
    """The group of each position of a sequence, int32 [S]; any number in padding.

    Args:
        starts: start of each sample in the sequence, and the end of the last one.
    """
    numbers = [groups[sample.persona] for sample in samples]
    array = np.full(length, numbers[-1], np.int32)
    array[: starts[-1]] = np.repeat(np.array(numbers, np.int32), np.diff(starts))
    return array
