"""What the losses need of a model's class, and which of Megatron's classes has it.

The losses, and with them head, measurements and chunks of the LM head, need one thing: on the last pipeline stage
`forward(..., output_processor=f, output_processor_context=c)` returns what f returns, and f is called with the last
hidden states, the output layer and the labels. `GPTModel` of megatron-core 0.19.2 has this hook.

This module and `builder.py`, which builds models by Megatron's training package, are the only ones that name a model
class (tools/check_layers.py). Every other module works by what a model offers, or refuses it by that.
"""

import functools
import inspect

from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model

HOOK = frozenset({"output_processor", "output_processor_context"})
"""The parameters of `forward` by which a model computes other losses than its own."""


@functools.cache
def takes_output_processor(model_class: type) -> bool:
    """Whether the models of a class compute the losses that an output processor gives them."""
    return inspect.signature(model_class.forward).parameters.keys() >= HOOK  # type: ignore[attr-defined]


def require_output_processor(model: MegatronModule) -> None:
    """Raises ValueError unless a model, wrapped or not, takes an output processor."""
    model_class = unwrap_model(model).__class__
    if not takes_output_processor(model_class):
        raise ValueError(
            f"{model_class.__name__}.forward takes no output_processor, by which the losses read the last hidden "
            "states: build the model from a class of Megatron that has it"
        )
