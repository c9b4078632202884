"""What the forward step does with the batches that upstream hands it."""

import torch

from megatron_sfr.training.step import next_batch


def test_a_batch_may_be_changed_without_changing_the_one_that_upstream_keeps() -> None:
    """Upstream's RerunDataIterator hands the same dictionary out again when it runs a step again."""
    kept = {"tokens": torch.arange(3), "document": torch.zeros(3)}
    batch = next_batch(iter([kept]))
    batch.pop("document")
    batch["target"] = torch.ones(1)
    assert kept.keys() == {"tokens", "document"}
