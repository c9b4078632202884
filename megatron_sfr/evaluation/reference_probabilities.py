"""Writes a reference store: a frozen Hugging Face model's most likely tokens at each supervised token of prepared data.

Conversations are read in blocks of a fixed number of batches. The files are journaled after each block, so that a run
that was stopped resumes there and writes the same bytes.
Shapes: T tokens of a batch, V vocabulary, K most likely tokens.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_sfr.data.prepared.conversations import PreparedData, Sample
from megatron_sfr.data.prepared.reference_store import (
    DTYPES,
    ReferenceIdentity,
    ReferenceManifest,
    ReferenceStore,
    supervised_sha256,
)
from megatron_sfr.evaluation.conversation_logits import check_same_tokens, chosen_logits, vocabulary_of
from megatron_sfr.evaluation.generate.transformers_engine import Model
from megatron_sfr.storage.arrays import JournaledFiles, discard_without_journal
from megatron_sfr.storage.integrity import sha256_of
from megatron_sfr.storage.manifest import NAME, publish, staging, write_manifest

BLOCK = 16
"""Batches of a block, whose conversations are sorted by length: similar lengths need little padding."""


@dataclass(frozen=True)
class ReferenceOptions:
    """How much of the reference's distribution is stored, and how it is computed."""

    top_k: int = 32
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("top_k", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")


def write_reference(
    model: Model,
    folder: Path,
    data: PreparedData,
    output: Path,
    options: ReferenceOptions,
    *,
    force: bool = False,
    progress: bool = True,
) -> ReferenceManifest:
    """Writes the store `output`, or leaves it if it is the same already.

    Args:
        model: the reference model, loaded from `folder`.
        force: replace a store that was made with other values.
    Raises:
        ValueError: the data are of another tokenizer, or `output` is something else.
    """
    check_same_tokens(model, data, options.top_k)
    identity = ReferenceIdentity(
        model=str(folder.resolve()),
        model_sha256=_sha256(folder),
        dtype=str(model.network.dtype).removeprefix("torch."),
        vocab_size=vocabulary_of(model),
        data_sha256=supervised_sha256(data.manifest),
        **asdict(options),
    )
    if not force and (output / NAME).exists():
        return _check_same(ReferenceStore.open(output, data), identity)
    if not (output / NAME).exists() and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not a reference store; choose another --output")
    with staging(output, keep=True) as new, discard_without_journal(new):
        with JournaledFiles(new, DTYPES, asdict(identity)) as files:
            count = _fill(files, model, data, options, progress)
            made = ReferenceManifest(
                **asdict(identity), samples=len(data), supervised_tokens=count, files=files.finish()
            )
        write_manifest(new, made)
        publish(new, output)
    return made


def _check_same(store: ReferenceStore, identity: ReferenceIdentity) -> ReferenceManifest:
    """The manifest of a store of this identity. Raises ValueError if it was made with other values."""
    made = store.manifest
    if changed := sorted(name for name, x in asdict(identity).items() if name != "model" and getattr(made, name) != x):
        raise ValueError(
            f"{store.folder} was made with other values of {', '.join(changed)}; choose another --output, or --force "
            "to replace it"
        )
    return made


def _fill(files: JournaledFiles, model: Model, data: PreparedData, options: ReferenceOptions, progress: bool) -> int:
    """Appends what is missing. Returns the number of supervised tokens of all samples."""
    from tqdm import tqdm

    state = files.state or {"samples": 0, "tokens": 0}
    if not state["samples"]:
        files["offsets.bin"].append(0)
    step = BLOCK * options.batch_size
    shown: dict[str, Any] = {"desc": "reference", "unit": "conversation", "disable": not progress}
    with tqdm(total=len(data), initial=state["samples"], **shown) as bar:
        for start in range(state["samples"], len(data), step):
            samples = [data[i] for i in range(start, min(start + step, len(data)))]
            counts, token_TK, log_p_TN = _of_block(model, samples, options)
            files["token.bin"].append(token_TK)
            files["log_p.bin"].append(log_p_TN)
            files["offsets.bin"].append(state["tokens"] + np.cumsum(counts))
            state = {"samples": start + len(samples), "tokens": state["tokens"] + len(token_TK)}
            files.commit(state)
            bar.update(len(samples))
    return int(state["tokens"])


def _of_block(model: Model, samples: list[Sample], options: ReferenceOptions) -> tuple[np.ndarray, ...]:
    """Supervised tokens of each sample, int64, and `most_likely` of all of them, sample by sample."""
    K, order = options.top_k, sorted(range(len(samples)), key=lambda i: len(samples[i].tokens))
    parts = [(torch.empty(0, dtype=torch.int64), torch.empty(0, K, dtype=torch.int32), torch.empty(0, K + 1))]
    for start in range(0, len(order), options.batch_size):
        batch = order[start : start + options.batch_size]
        chosen = [samples[i].loss_mask[1:] > 0 for i in batch]
        for of_batch_T, z_TV in chosen_logits(model, [samples[i] for i in batch], chosen):
            token_TK, log_p_TN = most_likely(z_TV, K)
            parts.append((torch.tensor(batch)[of_batch_T], token_TK.cpu(), log_p_TN.cpu()))
    sample_T, token_TK, log_p_TN = map(torch.cat, zip(*parts, strict=True))
    by_sample = sample_T.argsort(stable=True)
    counts = sample_T.bincount(minlength=len(samples))
    return counts.numpy(), token_TK[by_sample].numpy(), log_p_TN[by_sample].numpy()


def most_likely(z_TV: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K most likely tokens, int32 [T, K], and ln of their probabilities and of that of all others, fp32 [T, K + 1].

    Raises:
        ValueError: a logit is NaN or infinite.
    """
    log_p_TV = z_TV.float().log_softmax(-1)
    top = log_p_TV.topk(top_k)
    if not bool(top.values.isfinite().all()):
        raise ValueError("the model's logits are not finite: its weights are damaged, or overflow in this --dtype")
    rest_T = log_p_TV.scatter_(1, top.indices, -torch.inf).logsumexp(-1)
    return top.indices.int(), torch.cat([top.values, rest_T[:, None]], dim=-1)


def _sha256(folder: Path) -> str:
    """SHA-256 of a Hugging Face folder's configuration and weights."""
    digest = hashlib.sha256()
    weights = {path for pattern in ("*.safetensors", "*.bin", "*.gguf") for path in folder.glob(pattern)}
    for path in sorted({folder / "config.json", *weights}):
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()
