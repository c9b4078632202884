"""A model's loss on real replies, at temperature 1 and in the context of inference."""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_sfr.data.chat.conversation import Conversation, Encoded, encode_samples
from megatron_sfr.data.chat.template_options import AS_AT_INFERENCE, SampleOptions, TemplateOptions
from megatron_sfr.evaluation.generate.transformers_engine import Model

BATCH_SIZE = 32  # samples


@torch.inference_mode()
def negative_log_likelihood(
    model: Model, conversations: Sequence[Conversation], template: TemplateOptions = AS_AT_INFERENCE
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of -ln p over the supervised tokens of each conversation, and their number: two arrays [conversations].

    Each reply follows its own prompt, so that all chat templates are measured in the context of inference.
    """
    options = SampleOptions(turns="each", **vars(template))
    rows: list[Encoded] = []
    owners: list[int] = []
    for number, conversation in enumerate(conversations):
        samples = encode_samples(conversation, model.tokenizer, options)
        rows += samples
        owners += [number] * len(samples)
    total, tokens = np.zeros(len(conversations)), np.zeros(len(conversations))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    for start in range(0, len(order), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        nll, counts = _nll_of_batch(model, [rows[i] for i in chosen])
        np.add.at(total, [owners[i] for i in chosen], nll)
        np.add.at(tokens, [owners[i] for i in chosen], counts)
    return total, tokens


def _nll_of_batch(model: Model, rows: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray]:
    length = max(len(row.tokens) for row in rows)

    def padded(arrays: Sequence[np.ndarray]) -> torch.Tensor:
        stacked = np.stack([np.pad(array, (0, length - len(array))) for array in arrays])
        return torch.from_numpy(stacked).long().to(model.network.device)

    tokens_BL, loss_mask_BL = padded([row.tokens for row in rows]), padded([row.loss_mask for row in rows])
    attention_BL = padded([np.ones(len(row.tokens)) for row in rows])
    logits_BLV = model.network(input_ids=tokens_BL, attention_mask=attention_BL, use_cache=False).logits
    # Padding is on the right, where a causal model's real tokens cannot see it.
    nll = torch.nn.functional.cross_entropy(logits_BLV[:, :-1].float().mT, tokens_BL[:, 1:], reduction="none")
    weight_BL = loss_mask_BL[:, 1:]
    return (nll.double() * weight_BL).sum(dim=1).cpu().numpy(), weight_BL.sum(dim=1).cpu().numpy()
