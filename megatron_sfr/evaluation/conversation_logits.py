"""Logits of a Hugging Face model at chosen positions of prepared conversations, a few positions at a time.

Shapes: B conversations of a batch, L positions, V vocabulary, T chosen positions.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_sfr.data.chat.tokenizer import tokenizer_sha256
from megatron_sfr.data.prepared.conversations import PreparedData, Sample
from megatron_sfr.evaluation.generate.transformers_engine import Model

LOGITS = 1 << 27
"""Logits computed at a time: 256 MiB in bf16."""


def vocabulary_of(model: Model) -> int:
    """Columns of the model's logits."""
    return int(model.network.config.get_text_config().vocab_size)


def check_same_tokens(model: Model, data: PreparedData, top_k: int) -> None:
    """Raises ValueError if the data's token ids are not the model's, or the vocabulary is smaller than top_k."""
    manifest, vocabulary = data.manifest, vocabulary_of(model)
    if top_k > vocabulary:
        raise ValueError(f"top_k is {top_k}, and {model.name} has {vocabulary} tokens: give at most that")
    if (found := data.max_token_id) >= vocabulary:
        raise ValueError(
            f"{data.folder} has token ids up to {found}, and {model.name} has {vocabulary} tokens: prepare the data "
            f"with --tokenizer {model.name}"
        )
    if tokenizer_sha256(model.tokenizer) != manifest.tokenizer_sha256:
        raise ValueError(
            f"{data.folder} was prepared with the tokenizer or chat template of {manifest.tokenizer}, which is not "
            f"that of {model.name}: prepare the data with --tokenizer {model.name}"
        )


@torch.inference_mode()
def chosen_logits(
    model: Model, batch: Sequence[Sample], chosen: Sequence[np.ndarray]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (sample, logits): int64 [T] and [T, V]. Chosen positions of a sample come in order.

    Earlier positions are in the key-value cache. Sequences are padded on the right; no chosen position attends there.

    Args:
        chosen: which inputs (all tokens but the last) of each sample are chosen: bool [L].
    """
    from transformers import DynamicCache

    length = max((int(row.nonzero()[0][-1]) + 1 for row in chosen if row.any()), default=0)
    device = model.network.device
    tokens_BL = torch.zeros(len(batch), length, dtype=torch.int64)
    chosen_BL = torch.zeros(len(batch), length, dtype=torch.bool)
    for b, (sample, row) in enumerate(zip(batch, chosen, strict=True)):
        n = min(len(row), length)
        tokens_BL[b, :n] = torch.from_numpy(sample.tokens[:n])
        chosen_BL[b, :n] = torch.from_numpy(row[:n])
    step = max(1, LOGITS // (len(batch) * vocabulary_of(model)))
    cache: Any = DynamicCache(config=model.network.config)
    for start in range(0, length, step):
        part = slice(start, start + step)
        output = model.network(input_ids=tokens_BL[:, part].to(device), past_key_values=cache, use_cache=True)
        if chosen_BL[:, part].any():
            yield chosen_BL[:, part].nonzero()[:, 0], output.logits[chosen_BL[:, part].to(device)]
