"""Quality of texts: loss on real replies, similarity to them and, if all correct replies are known, exact scores."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_sfr.data.chat.conversation import Conversation, Encoded, encode_samples
from megatron_sfr.data.chat.template_options import AS_AT_INFERENCE, SampleOptions, TemplateOptions
from megatron_sfr.evaluation.generate.prompts import Prompt
from megatron_sfr.evaluation.generate.transformers_engine import Model


@dataclass(frozen=True)
class Judgement:
    """The mode of a reply (None: not correct for this prompt), and whether all of it is in its persona's voice."""

    mode: Hashable | None
    is_faithful: bool


class Truth(Protocol):
    """A world in which every correct reply is known."""

    def judge(self, prompt: Prompt, text: str) -> Judgement: ...

    def modes(self, prompt: Prompt) -> Mapping[str, frozenset[Hashable]]:
        """Named sets of the correct modes of a prompt, with the same names for every prompt."""
        ...


def true_scores(truth: Truth, prompt: Prompt, texts: Sequence[str]) -> dict[str, float]:
    """Precision (share correct in content and persona), fidelity (share in the persona), coverage of each set of modes.

    Coverage is the share of a set that correct replies produce; it rises with the number of texts. NaN without texts,
    and for a set without modes.
    """
    n = len(texts) or float("nan")
    judgements = [truth.judge(prompt, text) for text in texts]
    right = [judged.mode for judged in judgements if judged.mode is not None and judged.is_faithful]
    coverage = {
        f"coverage, {name}": len(modes.intersection(right)) / len(modes) if modes and texts else float("nan")
        for name, modes in truth.modes(prompt).items()
    }
    fidelity = sum(judged.is_faithful for judged in judgements) / n
    return {"precision": len(right) / n, "fidelity": fidelity, **coverage}


def relevance(vectors: np.ndarray, references: np.ndarray) -> float:
    """Mean cosine of a text [n, dim] to the nearest real reply [m, dim]; all are unit vectors. NaN without any."""
    return float((vectors @ references.T).max(axis=1).mean()) if len(vectors) and len(references) else float("nan")


def context_relevance(vectors: np.ndarray, question: np.ndarray) -> float:
    """Mean cosine of a text [n, dim] to the question [1, dim]; all are unit vectors. NaN without either."""
    return float((vectors @ question.T).mean()) if len(vectors) and len(question) else float("nan")


def style_match(vectors: np.ndarray, persona: str, references: Mapping[str, np.ndarray]) -> float:
    """Share of texts whose nearest real reply to the same prompt, of all personas' replies, is their own persona's.

    NaN if fewer than two personas have a reply to this prompt.
    """
    known = {name: rows for name, rows in references.items() if len(rows)}
    if len(known) < 2 or persona not in known or not len(vectors):
        return float("nan")
    nearest = {name: (vectors @ rows.T).max(axis=1) for name, rows in known.items()}
    others = np.max([cosines for name, cosines in nearest.items() if name != persona], axis=0)
    return float(np.mean(nearest[persona] > others))


@torch.inference_mode()
def negative_log_likelihood(
    model: Model,
    conversations: Sequence[Conversation],
    template: TemplateOptions = AS_AT_INFERENCE,
    *,
    batch_size: int = 32,
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
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
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
