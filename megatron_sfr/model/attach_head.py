"""Attaches the flow head to a model, and collects the output of the layer that the head reads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_sfr.model.flow_head import FlowHead, FlowHeadPlan
from megatron_sfr.model.state import StepStart


def attach_head(plan: FlowHeadPlan) -> Callable[[list[MegatronModule]], list[MegatronModule]]:
    """Returns a hook that adds a flow head to the model chunk that computes the loss.

    Run it after the chunks of a rank are built and before they are wrapped in DDP: the optimizer and the checkpoints
    then see the head as a submodule, `flow_head`. Megatron-Bridge's providers accept it as a pre-wrap hook:
    `provider.register_pre_wrap_hook(sfr.attach_head(plan))`. Chunks without an output layer stay as they are.

    Args:
        plan: what `flow_head_plan` returns for the options of the forward step.
    Returns:
        A function from the model chunks of a rank to the same chunks.
    Raises:
        ValueError: by the hook, where the layer that the head reads is not on the last pipeline stage, or a chunk is
            wrapped already.
    Example:
        >>> import megatron_sfr as sfr
        >>> hook = sfr.attach_head(sfr.flow_head_plan(384))
        >>> hook([])  # a rank without model chunks; usually a list of models
        []
    """

    def attach(chunks: list[MegatronModule]) -> list[MegatronModule]:
        for chunk in chunks:
            if not hasattr(chunk, "post_process"):
                raise ValueError(
                    f"{type(chunk).__name__} has no post_process: attach the head to models of Megatron Core, before "
                    "they are wrapped in DDP"
                )
            if chunk.post_process:
                _check_layer(chunk, plan.options.layer)
                chunk.flow_head = FlowHead(chunk.config, plan)
        return chunks

    return attach


def _check_layer(model: MegatronModule, number: int | None) -> None:
    here = [layer.layer_number for layer in model.decoder.layers]
    if number is not None and number not in here:
        layers = f"layers {min(here)} to {max(here)}" if here else "no layers"
        raise ValueError(f"sfr_layer = {number} is not on the last pipeline stage, which has {layers}")


@dataclass(frozen=True)
class FlowInputs:
    """What the auxiliary loss of a microbatch needs from a model with a head, apart from the last hidden states."""

    head: FlowHead
    start: StepStart
    """The head's state at the start of the step."""
    layer: list[Tensor]
    """The output of layer sfr_layer [S, B, H], once the forward pass has reached it. Empty without sfr_layer."""

    def states(self, last_SBH: Tensor) -> Tensor:
        """The hidden states that the head reads."""
        return self.layer[0] if self.layer else last_SBH


@contextmanager
def layer_output(model: MegatronModule, number: int | None, outputs: list[Tensor]) -> Iterator[None]:
    """Context in which each forward pass of the model appends the output of a decoder layer [S, B, H] to `outputs`.

    Args:
        number: the layer, counted from 1 over the whole model. None appends nothing.
    """
    if number is None:
        yield
        return

    def collect(_layer: Any, _inputs: Any, output: Tensor | tuple[Tensor, Any]) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])  # a Mamba layer returns no context

    layers = get_attr_wrapped_model(model, "decoder").layers
    handle = next(layer for layer in layers if layer.layer_number == number).register_forward_hook(collect)
    try:
        yield
    finally:
        handle.remove()
