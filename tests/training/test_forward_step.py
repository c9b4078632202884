"""The forward step's handling of upstream's batches."""

import torch

from megatron_sfr.training.forward_step import next_batch


def test_changing_a_batch_does_not_change_upstreams_copy() -> None:
    """Upstream's RerunDataIterator returns the same dictionary when it reruns a step."""
    kept = {"tokens": torch.arange(3), "document": torch.zeros(3)}
    batch = next_batch(iter([kept]))
    batch.pop("document")
    batch["target"] = torch.ones(1)
    assert kept.keys() == {"tokens", "document"}
