"""Megatron's multi-token prediction (MTP): its hidden states, for a loss of our own, and its tied output weight.

Upstream's GPTModel computes the loss of its MTP layers itself, before it calls an output processor: from the logits of
all positions, padding columns of the vocabulary included, and with each context-parallel rank's part weighted by that
part's number of tokens (megatron-core 0.19.2). Here the output processor is given the hidden states instead.
Shapes: S positions, B samples, H hidden size.
"""

from contextlib import AbstractContextManager
from typing import Any

from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_sfr.runtime.replacements import Replacement, replaced


def _all_hidden_states(hidden_states: Tensor, **_: Any) -> Tensor:
    """Leaves the loss to the output processor."""
    return hidden_states


REPLACEMENTS = (
    Replacement(
        "megatron.core.models.gpt.gpt_model",
        "process_mtp_loss",
        _all_hidden_states,
        "computes logits of all positions, and weights each context-parallel rank's part of the loss by its own tokens",
        ("hidden_states",),
    ),
)


def predicted_states() -> AbstractContextManager[None]:
    """Context in which a model with MTP layers gives its output processor the hidden states [S, B, H] of the decoder
    and of each MTP layer, one after another along the first dimension."""
    return replaced(REPLACEMENTS)


def drop_unused_output_weight(model: MegatronModule) -> None:
    """Removes the output layer's own weight from a chunk whose logits come from its copy of the tied embedding.

    Where the last pipeline stage has MTP layers, megatron-core 0.19.2 allocates both and uses the embedding. When it
    loads or saves, it asserts that there is no other.
    """
    tied, has_layers = model.share_embeddings_and_output_weights, getattr(model, "mtp_process", False)
    if tied and has_layers and model.post_process:
        model.output_layer.weight = None
