"""The loss of each token that a run selects by --objective: a registered one, or the user's own by its dotted path."""

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

import megatron_sfr.objectives.token  # registers the losses of this package  # noqa: F401
from megatron_sfr.config.option_flags import options
from megatron_sfr.objectives.anchored.asft import ASFT
from megatron_sfr.objectives.token.loss_base import TokenLoss
from megatron_sfr.objectives.token.registry import LOSSES, Registered, find_loss
from megatron_sfr.option_names import from_arguments, option_names, required
from megatron_sfr.training.lm_head import CHUNK_TOKENS


def _objective(value: str) -> str:
    try:
        find_loss(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return value


@dataclass(frozen=True)
class ObjectiveOptions:
    """The loss of each token."""

    objective: str = field(default="ce", metadata={"argparse_meta": {"type": _objective, "metavar": "NAME"}})
    """Loss of each token: ce (cross-entropy, default), gem (arXiv 2408.16673), sed (SED-SFT, arXiv 2602.07464), dft
    (arXiv 2508.05629), asft (arXiv 2509.23753), tofu (arXiv 2605.00195), eaft (arXiv 2601.02151), or the dotted path
    of your own, such as my_package.my_module.MyLoss. --sfr adds the flow-matching loss to it. The log's `lm loss` is
    always cross-entropy."""
    loss_chunk_tokens: int = CHUNK_TOKENS
    """Largest number of tokens whose logits exist at a time. LM head and loss are computed in chunks of supervised
    tokens; gradients are those of the logits as a whole, up to rounding. Default 4096. 0 computes the logits of all
    tokens at once, supervised or not."""

    def __post_init__(self) -> None:
        if self.loss_chunk_tokens < 0:
            raise ValueError(f"`loss_chunk_tokens` = {self.loss_chunk_tokens}: give at least 0 (0: no chunks)")


def selected_loss(args: argparse.Namespace) -> tuple[str, TokenLoss]:
    """The registered name of the selected loss, and the loss with its options.

    Raises:
        ValueError: an option is missing or out of its range.
    """
    name = find_loss(args.objective)
    loss = LOSSES[name].loss
    for option, hint in required(loss).items():
        if getattr(args, option) is None:
            flag = "--" + option.replace("_", "-")
            raise ValueError(f"--objective {args.objective} needs {flag}{hint and ': '}{hint}")
    return name, options(loss, args)


def reference_store(loss: TokenLoss) -> str | None:
    """The folder of the reference store inside each prepared folder; None if the loss reads none."""
    return loss.store if isinstance(loss, ASFT) else None


def check_objective(args: argparse.Namespace) -> None:
    """ValueError for options of the selected loss that it refuses, and for options of other losses."""
    selected, _ = selected_loss(args)
    for name, registered in LOSSES.items():
        given = _given(registered.loss, args) if name != selected else []
        if given:
            _check_values(registered, args)
            raise ValueError(
                f"{given[0]} is an option of objective {name} and has no effect with objective {args.objective}: "
                f"leave it out, or set objective to {name}"
            )


def _given(loss: type[Any], args: argparse.Namespace) -> list[str]:
    """The options of a loss that differ from their defaults."""
    names, without_default = option_names(loss), required(loss)
    defaults = {names[f.name]: None if names[f.name] in without_default else f.default for f in fields(loss)}
    return [option for option, default in defaults.items() if getattr(args, option) != default]


def _check_values(registered: Registered, args: argparse.Namespace) -> None:
    """ValueError for a value that the loss refuses. Options that are missing have the value of a test's setting."""
    names, missing = option_names(registered.loss), required(registered.loss)
    example = {names[field]: value for field, value in next(iter(registered.examples.values())).items()}
    stand_in = {option: example[option] for option in missing if getattr(args, option) is None}
    from_arguments(registered.loss, vars(args) | stand_in)
