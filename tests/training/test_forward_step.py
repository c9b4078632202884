"""The forward step's handling of upstream's batches."""

import torch

from megatron_sfr.objectives.sfr.schedule import ScheduleOptions
from megatron_sfr.objectives.token.sed import SED
from megatron_sfr.training.forward_step import ForwardStep, Microbatch, next_batch, pair
from megatron_sfr.training.step_context import StepContext


def test_changing_a_batch_does_not_change_upstreams_copy() -> None:
    """Upstream's RerunDataIterator returns the same dictionary when it reruns a step."""
    kept = {"tokens": torch.arange(3), "document": torch.zeros(3)}
    batch = next_batch(iter([kept]))
    batch.pop("document")
    batch["target"] = torch.ones(1)
    assert kept.keys() == {"tokens", "document"}


def test_the_log_has_what_the_token_loss_names_averaged_over_supervised_tokens() -> None:
    context = StepContext(
        iteration=0, train_iters=1, num_microbatches=1, writer=None, implementation="local", checks_nan=False
    )
    mask = torch.tensor([[1.0, 1, 1, 0]])
    objective, cross_entropy = torch.tensor([[1.0, 2.25, 3, 0]]), torch.tensor([[1.0, 2, 3, 0]])
    step = ForwardStep(9, "sed", SED(0.5), None, ScheduleOptions(), resets_attention=False)
    losses = (objective.sum(), objective, cross_entropy, torch.tensor([4.5, 2.0]), None, None)
    _, tokens, report = step.loss(Microbatch({"loss_mask": mask}, context), losses)
    assert tokens == 3
    assert report["token entropy"].tolist() == [4.5, 3]
    assert report["token accuracy"].tolist() == [2, 3]
    assert report["sed squared term"].tolist() == [0.25, 3]
    assert report["sed exempt"].tolist() == [2, 3]


def test_pair_is_a_detached_sum_and_its_count() -> None:
    total = torch.tensor(2.0, requires_grad=True) * 3
    assert pair(total, torch.tensor(4)).tolist() == [6.0, 4.0]
    assert not pair(total, torch.tensor(4)).requires_grad
