"""From models and prepared data to a diagnosis: the base model and its head are read first, then the others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sfr.data.prepared import PreparedData
from megatron_sfr.diagnostics.futures import FutureOptions, Scale, futures
from megatron_sfr.diagnostics.labels import LabelOptions, label
from megatron_sfr.diagnostics.reading import Reading, positions, read
from megatron_sfr.diagnostics.summary import Diagnosis
from megatron_sfr.model.flow_head import FlowHead


@dataclass(frozen=True)
class ExamineOptions:
    """What is read, and what the labels are made from."""

    labels: LabelOptions
    futures: FutureOptions
    samples: int = 48
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if self.samples < 1 or not 0 < self.top_p < 1:
            raise ValueError(f"samples is {self.samples} and top_p {self.top_p}: give at least 1, and between 0 and 1")


@dataclass(frozen=True)
class Head:
    """The base model's flow head: the scale of its targets, and the hidden state it reads, as Hugging Face counts."""

    network: FlowHead
    scale: Scale
    layer: int = -1


def examine(
    models: Mapping[str, Callable[[], Any]], data: PreparedData, options: ExamineOptions, head: Head | None = None
) -> Diagnosis:
    """models: a Hugging Face network each, made when its turn comes; the first is the base, to which `head` belongs."""
    count = min(options.samples, len(data))
    where = positions(data, [i * len(data) // count for i in range(count)])
    readings: dict[str, Reading] = {}
    found, labelled = None, None
    for name, load in models.items():
        layer = head.layer if head is not None and not readings else -1
        readings[name], hidden = read(load(), data, where, options.top_p, layer)
        if labelled is None:
            if head is not None:
                found = futures(head.network, hidden, where, head.scale, options.futures)
            base = readings[name]
            labelled = label(base.entropy, base.top, found.dispersion if found else None, options.labels)
    assert labelled is not None, "there is a base"
    return Diagnosis(where, readings, labelled, found)
