"""The token losses by name. A loss registers itself; a user's own is found by its dotted path."""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

from megatron_sfr.objectives.token.loss_base import TokenLoss
from megatron_sfr.option_names import named

NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Registered:
    """A registered loss."""

    loss: type[TokenLoss]
    examples: Mapping[str, Mapping[str, Any]]
    """Settings for tests: {label: options}."""

    def instances(self) -> dict[str, TokenLoss]:
        """The loss in each of its settings for tests: {label: loss}."""
        return {label: self.loss(**options) for label, options in self.examples.items()}


LOSSES: dict[str, Registered] = {}
"""Every registered loss by name. `--objective` takes these names."""


def register[Loss: type[TokenLoss]](
    name: str, *, examples: Mapping[str, Mapping[str, Any]] | None = None
) -> Callable[[Loss], Loss]:
    """A class decorator that registers a token loss, above `@dataclass(frozen=True)`.

    The fields of the class become flags and recipe keys with the name as prefix: the field `beta` of the loss `gem` is
    `--gem-beta` and `gem_beta`. The string under a field becomes its help text. Error messages that write a field as
    `` `beta` `` name the flag when the value came from one.

    Args:
        name: the name for `--objective` and prefix of the options: lower-case letters, digits and underscores.
        examples: settings of the options in which the common tests run the loss, {label: {field: value}}. Default: the
            default options, with the name as label. Needed if an option has no default.

    Returns:
        The decorator, which returns the class unchanged.

    Raises:
        ValueError: the name is malformed or taken, or the class is not a frozen dataclass derived from `TokenLoss`.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch, megatron_sfr as sfr
        >>> @sfr.register("brier")
        ... @dataclass(frozen=True)
        ... class Brier(sfr.TokenLoss):
        ...     scale: float = 1.0
        ...     def loss(self, logits, labels):
        ...         p, one_hot = logits.softmax(-1), torch.nn.functional.one_hot(labels, logits.shape[-1])
        ...         return self.scale * (p - one_hot).square().sum(-1)
        >>> loss, _ = sfr.token_loss(torch.zeros(1, 2), torch.tensor([0]), Brier(scale=2.0))
        >>> loss.item()
        1.0
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"loss {name!r}: a name has lower-case letters, digits and underscores, and starts with a letter"
        )

    def decorate(loss: Loss) -> Loss:
        if not (isinstance(loss, type) and issubclass(loss, TokenLoss)) or inspect.isabstract(loss):
            raise ValueError(f"loss {name!r}: derive {loss.__name__} from TokenLoss and define its method `loss`")
        if not is_dataclass(loss) or not loss.__dataclass_params__.frozen or "__dataclass_fields__" not in vars(loss):
            raise ValueError(f"loss {name!r}: write @dataclass(frozen=True) between @register and {loss.__name__}")
        if (other := LOSSES.get(name)) is not None and path_of(other.loss) != path_of(loss):
            raise ValueError(f"loss {name!r} is registered already, by {path_of(other.loss)}: choose another name")
        LOSSES[name] = Registered(loss, {name: {}} if examples is None else examples)
        named(f"{name}_")(loss)
        return loss

    return decorate


def path_of(loss: type[TokenLoss]) -> str:
    """A class's dotted path."""
    return f"{loss.__module__}.{loss.__qualname__}"


def find_loss(objective: str) -> str:
    """The registered name for a name or the dotted path of a loss, which is imported.

    Raises:
        ValueError: no such loss, in one line.
    """
    if objective in LOSSES:
        return objective
    module_name, _, class_name = objective.rpartition(".")
    if not module_name:
        known = ", ".join(sorted(LOSSES))
        raise ValueError(
            f"invalid choice: {objective!r} (choose from {known}, or give the dotted path of your own loss, such as "
            "my_package.my_module.MyLoss)"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's code may raise anything
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        hint = "; is its folder on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
        raise ValueError(f"objective {objective}: importing {module_name} failed: {what}{hint}") from error
    loss = getattr(module, class_name, None)
    names = [name for name, registered in LOSSES.items() if registered.loss is loss]
    if loss is None:
        raise ValueError(f"objective {objective}: {module_name} has no {class_name}")
    if not names:
        raise ValueError(
            f"objective {objective}: {class_name} is not a registered loss; decorate it with @register(NAME)"
        )
    return names[0]
