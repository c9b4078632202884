"""What the losses need of a model's class, and how each of Megatron's two classes gives it.

The losses, and with them head, measurements and chunks of the LM head, need one thing: on the last pipeline stage
`forward(..., output_processor=f, output_processor_context=c)` returns what f returns, and f is called with the last
hidden states, the output layer and the labels. `GPTModel` of megatron-core 0.19.2 has this hook. `HybridModel`, which
replaces it, does not have it yet (upstream's pull request 7008 adds it); `_WithProcessor` does until then.

This module and `builder.py`, which builds models by Megatron's training package, are the only ones that name a model
class (tools/check_layers.py). Every other module works by what a model offers, or refuses it by that.
"""

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from torch import nn

HOOK = frozenset({"output_processor", "output_processor_context"})
"""The parameters of `forward` by which a model computes other losses than its own."""


@dataclass(frozen=True)
class ModelOptions:
    """Which of Megatron's model classes is trained."""

    model_class: Literal["gpt", "hybrid"] = "gpt"
    """'gpt' (default): GPTModel, which Megatron has deprecated. 'hybrid': its successor HybridModel, whose layers are
    those of --hybrid-layer-pattern; without a pattern the attention and MLP of --num-layers layers of GPTModel, with
    the same losses and gradients."""


class _WithProcessor(nn.Module):
    """Mixin in front of HybridModel's class: adds the hook that GPTModel has.

    Upstream's forward runs unchanged, as if for another stage: `post_process` of the instance is off meanwhile, so it
    returns the hidden states after the final norm, which `decoder` applies by its own flag, and reaches neither output
    layer nor loss. The alternative, an output layer that passes its input on and a loss method that calls the
    processor, would replace two names in place of one flag, have MuP's factor of the logits applied in between, and
    run once more for each depth of multi-token prediction.
    """

    output_layer: nn.Module
    config: Any

    def forward(
        self, *args: Any, output_processor: Any = None, output_processor_context: Any = None, **kwargs: Any
    ) -> Any:
        if output_processor is None:
            return super().forward(*args, **kwargs)
        with _inner_stage(self):
            hidden_states = super().forward(*args, **kwargs)
        model: Any = self
        tied = model.share_embeddings_and_output_weights
        return output_processor(
            hidden_states=hidden_states,
            output_layer=model.output_layer,
            output_weight=model.shared_embedding_or_output_weight() if tied else None,
            labels=kwargs.get("labels"),
            loss_mask=kwargs.get("loss_mask"),
            runtime_gather_output=kwargs.get("runtime_gather_output"),
            context=output_processor_context,
            compute_language_model_loss=model.compute_language_model_loss,
            scale_logits=model._scale_logits,
            config=model.config,
        )


@contextmanager
def _inner_stage(model: Any) -> Iterator[None]:
    """Context in which a model returns hidden states, as a stage does that has no output layer."""
    model.post_process = False
    try:
        yield
    finally:
        model.post_process = True


@functools.cache
def _with_processor(model_class: type) -> type:
    return type(f"{model_class.__name__}WithProcessor", (_WithProcessor, model_class), {})


@functools.cache
def takes_output_processor(model_class: type) -> bool:
    """Whether the models of a class compute the losses that an output processor gives them."""
    return inspect.signature(model_class.forward).parameters.keys() >= HOOK  # type: ignore[attr-defined]


def ensure_output_processor(model: MegatronModule) -> MegatronModule:
    """Returns a model, wrapped or not, that takes an output processor. Raises ValueError for one that cannot.

    Adds the hook to a HybridModel that lacks it.

    Like torch's FSDP 2 it changes the class of the object to a subclass, so that no name of a parameter changes.
    """
    inner = unwrap_model(model)
    if takes_output_processor(inner.__class__):
        return model
    if not isinstance(inner, HybridModel):
        raise ValueError(
            f"{inner.__class__.__name__}.forward takes no output_processor, by which the losses read the last hidden "
            "states: build the model from a class of Megatron that has it"
        )
    inner.__class__ = _with_processor(inner.__class__)
    return model
