"""Diagnoses models on prepared data: first the base model with its flow head, then the others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.evaluation.lock_fork.futures import FutureOptions, Scale, futures
from megatron_sfr.evaluation.lock_fork.labels import LabelOptions, label
from megatron_sfr.evaluation.lock_fork.summary import Diagnosis
from megatron_sfr.evaluation.lock_fork.token_statistics import Reading, positions, read
from megatron_sfr.model.flow_head import FlowHead


@dataclass(frozen=True)
class ExamineOptions:
    """How many samples to read, and how to label their positions."""

    labels: LabelOptions
    futures: FutureOptions
    samples: int = 48
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if self.samples < 1 or not 0 < self.top_p < 1:
            raise ValueError(
                f"samples is {self.samples} and top_p is {self.top_p}; give samples of at least 1, top_p in (0, 1)"
            )


@dataclass(frozen=True)
class Head:
    """The base model's flow head, the scale of its targets, and its layer as an index into HF's hidden_states."""

    network: FlowHead
    scale: Scale
    layer: int = -1


def examine(
    models: Mapping[str, Callable[[], Any]], data: PreparedData, options: ExamineOptions, head: Head | None = None
) -> Diagnosis:
    """Reads all models at the same positions and labels the positions by the base model.

    Args:
        models: functions that load a Hugging Face model, by name, each called once in turn. The first is the base.
        head: flow head of the base model.
    """
    count = min(options.samples, len(data))
    where = positions(data, [i * len(data) // count for i in range(count)])
    readings: dict[str, Reading] = {}
    expected, labelled = None, None
    for name, load in models.items():
        layer = head.layer if head is not None and not readings else -1
        readings[name], hidden = read(load(), data, where, options.top_p, layer)
        if labelled is None:
            if head is not None:
                expected = futures(head.network, hidden, where, head.scale, options.futures)
            base = readings[name]
            labelled = label(base.entropy, base.top, expected.dispersion if expected else None, options.labels)
    assert labelled is not None, "models has at least the base"
    return Diagnosis(where, readings, labelled, expected)
