"""A model with its adapters merged into its weights, read like a stored model: W + scale * B A for each HF weight."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megatron_sfr.hf.adapter.stored_adapter import Pair, StoredAdapter
from megatron_sfr.hf.config_values import Config
from megatron_sfr.hf.gguf.gguf_file import is_model
from megatron_sfr.hf.hf_model import Source, open_source
from megatron_sfr.hf.mappings import Entry
from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint, find_checkpoint
from megatron_sfr.hf.megatron.megatron_model import HEAD, StoredModel
from megatron_sfr.hf.megatron.stored_chunks import Piece


def merged(weight: Tensor, pair: Pair, scale: float) -> Tensor:
    """weight + scale * b @ a, computed in float64 and rounded once to the dtype of the weight."""
    return (weight.double() + scale * (pair.b.double() @ pair.a.double())).to(weight.dtype)


class MergedModel:
    """The tensors of a base model with the adapters of a checkpoint merged in, under their HF names.

    Args:
        checkpoint: of a run with LoRA.
        config: config.json of the model.
        base: the frozen weights: an HF folder, a GGUF file or a Megatron checkpoint. None: where the run read them.
    Raises:
        ValueError: checkpoint, base and config disagree, or the base is not found.
    """

    def __init__(self, checkpoint: Checkpoint, config: Config, base: Path | None) -> None:
        self.checkpoint, self.adapter = checkpoint, StoredAdapter(checkpoint, config)
        self.base = base or _base_of(checkpoint)
        model: Source | StoredModel
        if is_model(self.base):
            model = open_source(self.base)
            self.entries, self.padding = list(model.dtypes), 0
        else:
            model = StoredModel(Checkpoint(find_checkpoint(self.base)), config)
            self.entries, self.padding = model.entries, model.padding
        self._model, self.dimensions = model, self.adapter.dimensions
        if model.dimensions != self.dimensions:
            raise ValueError(f"{self.base} is not the base of these adapters: its architecture is not that of --like")
        self._adapted = set(self.adapter.entries)
        self.dropped = tuple(key for key in sorted(checkpoint.tensors) if key.startswith(HEAD))

    def dtype(self, entry: Entry) -> torch.dtype:
        return self._model.dtypes[entry] if isinstance(self._model, Source) else self._model.dtype(entry)

    def read(self, entry: Entry) -> tuple[Tensor, ...]:
        """The HF tensors of an entry."""
        model = self._model
        weights = tuple(model.weights[x] for x in entry.names) if isinstance(model, Source) else model.read(entry)
        if entry not in self._adapted:
            return weights
        pairs = self.adapter.read(entry)
        return tuple(merged(w, pair, self.adapter.scale) for w, pair in zip(weights, pairs, strict=True))

    def pieces(self, entry: Entry, dtype: torch.dtype) -> tuple[Iterable[Piece], ...]:
        """The HF tensors of an entry as consecutive pieces of a dtype."""
        if entry not in self._adapted and isinstance(self._model, StoredModel):
            return self._model.pieces(entry, dtype)
        return tuple([tensor.to(dtype)] for tensor in self.read(entry))


def _base_of(checkpoint: Checkpoint) -> Path:
    """Where the run of a checkpoint read its frozen weights."""
    arguments = checkpoint.arguments()
    path = arguments.get("sfr_hf_load") or arguments.get("lora_base")
    if path is None or not Path(path).exists():
        said = f"{path} is not here" if path else "the checkpoint does not say where its base is"
        raise ValueError(f"{said}: name the base model, --base DIR")
    return Path(path)
