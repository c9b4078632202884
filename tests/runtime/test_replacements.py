"""Each name of upstream that is replaced is still there, with the parameters that its replacement relies on."""

import contextlib
import inspect
from pathlib import Path

import pytest

from megatron_sfr.hf.megatron import disk_room, finite_weights, retention
from megatron_sfr.model import local_spec, multi_token
from megatron_sfr.runtime import cpu, durable, resharding, synchronous_save
from megatron_sfr.runtime.replacements import Replacement, replaced
from megatron_sfr.training import head_optimizer, metrics_log
from megatron_sfr.training.timing import profile, step_speed
from megatron_sfr.training.tracking import wandb_guard

IN_A_RUN = (
    *durable.REPLACEMENTS,
    *resharding.REPLACEMENTS,
    *synchronous_save.REPLACEMENTS,
    *multi_token.REPLACEMENTS,
    *local_spec.REPLACEMENTS,
    *head_optimizer.replacements(head_optimizer.HeadOptimizerOptions(clip_grad=0.5, lr_mult=2.0)),
    *disk_room.replacements(Path("run")),
    *finite_weights.replacements(Path("run")),
    *retention.replacements(Path("run"), retention.RetentionOptions(keep_checkpoints=2)),
    *metrics_log.replacements(metrics_log.JsonLines(Path("metrics.jsonl"))),
    *step_speed.replacements(step_speed.SpeedLog(None)),
    *profile.replacements(),
    *wandb_guard.replacements(),
)
EVERYTHING = (*cpu.REPLACEMENTS, *IN_A_RUN, synchronous_save.QUEUE)
NOT_CALLED = ("maybe_msc", "SEPARATE_GRAD_NORM_GROUPS", "_GLOBAL_WANDB_WRITER", "wandb")


def label(entry: Replacement) -> str:
    return f"{entry.module}.{entry.name}"


@pytest.mark.parametrize("entry", EVERYTHING, ids=label)
def test_upstream_still_has_the_name(entry: Replacement) -> None:
    assert callable(entry.original()) or entry.name in NOT_CALLED
    assert len(entry.why) > 10


@pytest.mark.parametrize("entry", [entry for entry in EVERYTHING if entry.takes], ids=label)
def test_upstream_takes_the_parameters_that_the_replacement_passes(entry: Replacement) -> None:
    assert tuple(inspect.signature(entry.original()).parameters)[: len(entry.takes)] == entry.takes


def test_upstream_names_the_gradient_norm_groups_in_a_tuple() -> None:
    from megatron.core.optimizer import optimizer

    before = optimizer.SEPARATE_GRAD_NORM_GROUPS
    assert all(isinstance(name, str) for name in before)
    with replaced(IN_A_RUN):
        assert (*before, head_optimizer.GRADIENT_NORM_GROUP) == optimizer.SEPARATE_GRAD_NORM_GROUPS


def test_names_are_replaced_within_the_context_only() -> None:
    before = [entry.original() for entry in IN_A_RUN]
    with contextlib.suppress(KeyError), replaced(IN_A_RUN):
        assert all(entry.original() is not old for entry, old in zip(IN_A_RUN, before, strict=True))
        raise KeyError
    assert all(entry.original() is old for entry, old in zip(IN_A_RUN, before, strict=True))


def test_a_name_that_upstream_no_longer_has_is_an_error_and_leaves_the_others() -> None:
    gone = Replacement("megatron.core.optimizer.optimizer", "no_such_name", None, "is not there")
    before = [entry.original() for entry in IN_A_RUN]
    with pytest.raises(AttributeError, match="no_such_name"), replaced((*IN_A_RUN, gone)):
        pass
    assert all(entry.original() is old for entry, old in zip(IN_A_RUN, before, strict=True))
