"""A run's plan holds the options of every part, read from the arguments once."""

import argparse
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from megatron_sfr.config.build import forward_step
from megatron_sfr.config.cluster_args import merged_flags
from megatron_sfr.config.objective import ObjectiveOptions
from megatron_sfr.config.option_flags import options
from megatron_sfr.config.run_plan import RunPlan, plan_run
from megatron_sfr.config.settings import PARTS, Parser, PresetOptions
from megatron_sfr.runtime.backend import BackendOptions
from megatron_sfr.training.data.provider import DataProvider
from megatron_sfr.training.forward_step import ForwardStep
from megatron_sfr.training.timing.profile import ProfileOptions

# They choose the loss, other options, Megatron's flags, the backend.
APPLIED_EARLIER = (ObjectiveOptions, PresetOptions, ProfileOptions, BackendOptions)
PARSER = Parser()


def arguments(*flags: str) -> argparse.Namespace:
    return PARSER.read(["--seq-length", "80", *flags])


def plan(*flags: str) -> RunPlan:
    return plan_run(arguments(*flags), "cpu")


def test_it_has_the_options_of_every_part() -> None:
    flags = ("--objective", "gem", "--gem-beta", "0.5", "--sfr", "--sfr-weight", "3", "--sfr-head-lr-mult", "2")
    actual, args = plan(*flags), arguments(*flags)
    held = [*vars(actual).values(), *vars(actual.term).values()]
    assert [part.__name__ for part in PARTS if part not in APPLIED_EARLIER and options(part, args) not in held] == []
    assert actual.objective == "gem"
    assert actual.token_loss.beta == 0.5


def test_without_a_batch_size_the_steps_of_samples_are_unknown(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train_samples: 64\nvocab_size: 100\ntrain_data_path: [data]\n")
    assert merged_flags([recipe], [])[2] is None
    assert merged_flags([recipe], ["--micro-batch-size", "4"])[2] == 16


def test_the_options_of_an_own_loss_are_known(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "objective: tests.objectives.token.focal.Focal\nfocal_gamma: 1.5\nvocab_size: 100\ntrain_data_path: [data]\n"
    )
    args, flags, _ = merged_flags([recipe], ["--micro-batch-size", "4"])
    assert args.focal_gamma == 1.5
    assert "--focal-gamma" in flags


def test_it_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        plan().separator = "sfr_packing"  # type: ignore[misc]


def test_a_part_refuses_its_options() -> None:
    with pytest.raises(ValueError, match="give a factor above 0"):
        plan("--sfr-head-lr-mult", "0")


@pytest.mark.parametrize(
    ("flags", "option"),
    [
        ([], None),
        (["--sfr-packing", "first_fit_decreasing"], "sfr_packing"),
        (["--dataloader-inter-document-masking"], "dataloader_inter_document_masking"),
    ],
)
def test_it_names_the_option_that_separates_texts(flags: list[str], option: str | None) -> None:
    assert plan(*flags).separator == option


@pytest.mark.parametrize("option", ["--sfr-packing=first_fit_decreasing", "--dataloader-inter-document-masking"])
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_ranks_divide_each_conversation_that_is_padded_for_it(option: str, ranks: str) -> None:
    actual = plan(option, "--context-parallel-size", ranks)
    step = forward_step(actual, DataProvider(actual.datasets))
    assert isinstance(step, ForwardStep)
    assert step.resets_attention
    assert step.divides_documents == (ranks == "2" and "packing" in option)


@pytest.mark.parametrize(
    ("flags", "length"),
    [
        ([], None),
        (["--training-task", "kl-flow"], 79),
        (["--training-task", "kl-flow", "--kl-flow-time", "adaln"], 80),
    ],
)
def test_the_time_takes_a_position_of_kl_flows_texts(flags: list[str], length: int | None) -> None:
    assert plan(*flags).datasets.text_length == length
