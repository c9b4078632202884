"""Flags for dataclasses of options: one per field, with its docstring as help text."""

import argparse
import copy
import dataclasses
import typing
from typing import Any

from megatron.training.argument_utils import ArgumentGroupFactory, TypeInferenceError

from megatron_sfr.option_names import from_arguments, option_names, required


class _Flags(ArgumentGroupFactory):
    """Upstream's generator, with the options' own names. A field without a default becomes a flag without one."""

    def __init__(self, part: type) -> None:
        super().__init__(part)
        self.options, self.types = option_names(part), typing.get_type_hints(part)

    def _format_arg_name(self, config_attr_name: str, prefix: str | None = None) -> str:
        return super()._format_arg_name(self.options[config_attr_name], prefix)

    def _build_argparse_kwargs_from_field(self, attribute: dataclasses.Field) -> dict[str, Any]:
        attribute = copy.copy(attribute)
        attribute.type = self.types[attribute.name]  # a string under `from __future__ import annotations`
        if self.options[attribute.name] in required(self.src_cfg_class):
            attribute.default = None
        return super()._build_argparse_kwargs_from_field(attribute) | {"dest": self.options[attribute.name]}


def add_flags(part: type, parser: argparse.ArgumentParser) -> None:
    """Adds a dataclass's options to a parser. ValueError if a flag exists already or a field's type has no flag."""
    try:
        group = _Flags(part).build_group(parser, title=part.__name__)
        group.description = (part.__doc__ or "").partition("\n\n")[0]  # without the examples
    except (argparse.ArgumentError, TypeInferenceError, TypeError, OSError) as error:
        what = " ".join(str(error).split())
        raise ValueError(f"{part.__module__}.{part.__qualname__}: its options cannot become flags: {what}") from error


def options[Options](part: type[Options], args: argparse.Namespace) -> Options:
    """One part's options from parsed arguments. ValueError if the part refuses them."""
    return from_arguments(part, vars(args))
