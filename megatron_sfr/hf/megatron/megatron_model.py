"""The model in a Megatron checkpoint, checked name by name against an HF config before any weight is read."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_sfr.hf.config_values import Config
from megatron_sfr.hf.families.family_registry import family_of
from megatron_sfr.hf.mappings import Dimensions, Entry, ParameterMapping, Spans, entries
from megatron_sfr.hf.megatron.hybrid_names import PATTERN, comparable, hybrid_name, is_hybrid
from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint
from megatron_sfr.hf.megatron.stored_chunks import Piece
from megatron_sfr.storage.user_files import listed

HEAD = "flow_head."
AUXILIARY = (HEAD, "mtp.")
"""Prefixes of tensors used only in training, which an export drops: the flow head with its EMA and state, and
multi-token prediction, which no family here has in its HF form."""
TRAINING_STATE = re.compile(
    r"optimizer\.|chained_\d+\.|(rng_state|rerun_state_machine_state|common_state)/|.*\._extra_state(/|$)"
)
"""Tensors that a checkpoint keeps to resume training; the extra states are Transformer Engine's fp8 scales."""
COMPARED = {
    PATTERN: PATTERN,
    "num_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "kv_channels",
    "swiglu": "swiglu",
    "squared_relu": "squared_relu",
    "mamba_num_groups": "mamba_num_groups",
    "normalization": "normalization",
    "norm_epsilon": "layernorm_epsilon",
    "position_embedding_type": "position_embedding_type",
    "rotary_base": "rotary_base",
    "rotary_percent": "rotary_percent",
    "rotary_interleaved": "rotary_interleaved",
    "rotary_seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "use_rope_scaling": "use_rope_scaling",
    "rope_scaling_factor": "rope_scaling_factor",
    "window_size": "window_size",
    "moe_router_topk": "moe_router_topk",
    "moe_router_pre_softmax": "moe_router_pre_softmax",
    "moe_router_score_function": "moe_router_score_function",
    "moe_router_enable_expert_bias": "moe_router_enable_expert_bias",
    "moe_router_topk_scaling_factor": "moe_router_topk_scaling_factor",
    "window_attn_skip_freq": "window_attn_skip_freq",
    "no_rope_freq": "no_rope_freq",
    "moe_shared_expert_gate": "moe_shared_expert_gate",
}
"""Flags that change what a model computes but not always a shape, with their names in Megatron's arguments."""
UNSAID: dict[str, object] = {
    "swiglu": False,
    "squared_relu": False,
    "moe_router_enable_expert_bias": False,
    "moe_router_topk_scaling_factor": None,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "window_size": None,
    "window_attn_skip_freq": None,
    "no_rope_freq": None,
}
"""Values of families that do not set the flag: no gate and no square in MLPs, unscaled router scores without a bias,
rotary embedding on complete heads, unscaled, and no attention window."""


@dataclass(frozen=True)
class Location:
    """Where a checkpoint stores an entry: a chunk of one of its tensors, and that tensor's size without padding."""

    key: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    whole: tuple[int, ...]


class StoredModel:
    """The tensors of a checkpoint under their HF names. Raises ValueError if checkpoint and config disagree."""

    def __init__(self, checkpoint: Checkpoint, config: Config) -> None:
        if checkpoint.arguments().get("training_task") == "kl-flow":
            raise ValueError(
                f"{checkpoint.folder} holds a KL-flow denoiser, which no Hugging Face architecture computes: it stays "
                "a Megatron checkpoint"
            )
        family, arguments = family_of(config), checkpoint.arguments()
        self.checkpoint = checkpoint
        flags = family.flags(config)
        self._renamed = arguments.get(PATTERN) is not None and not is_hybrid(flags)
        self.dimensions = family.dimensions(config)
        self.entries = entries(family.mappings(config), self.dimensions)
        if found := disagreement(comparable(arguments, flags), flags):
            flag, trained, meant = found
            raise ValueError(
                f"{checkpoint.folder}: trained with {flag} {trained}, but the config means {meant}: "
                "the exported model would not compute what was trained"
            )
        vocab = arguments.get("vocab_size")
        if isinstance(vocab, int) and vocab > self.dimensions.vocab:
            raise ValueError(
                f"{checkpoint.folder}: trained with vocab_size {vocab}, but the config means {self.dimensions.vocab}: "
                f"the tokens beyond it would be dropped; set vocab_size to {vocab} in config.json"
            )
        self._runs = {x.megatron: runs_of_rows(x, self.dimensions) for x in family.mappings(config)}
        self._places = {entry: self._find(entry) for entry in self.entries}
        known = {location.key for locations in self._places.values() for location in locations}
        rest = sorted((checkpoint.tensors.keys() | checkpoint.objects) - known)
        self.dropped = tuple(key for key in rest if key.startswith(AUXILIARY))
        unknown = [key for key in rest if not key.startswith(AUXILIARY) and not TRAINING_STATE.match(key)]
        missing = sorted(known - checkpoint.tensors.keys())
        if unknown or missing:
            raise ValueError(f"{checkpoint.folder}: {_unlike_names(unknown, missing)}")
        self.padding = max(
            self._check_shape(location, entry.mapping.padded) for entry, x in self._places.items() for location in x
        )

    def dtype(self, entry: Entry) -> torch.dtype:
        return self.checkpoint.tensors[self._places[entry][0].key].properties.dtype

    def read(self, entry: Entry) -> tuple[Tensor, ...]:
        """The HF tensors of an entry, without padding."""
        places = zip(self._places[entry], entry.sections(self.dimensions), strict=True)
        parts = [self.checkpoint.read(x.key, x.offset, x.size).reshape(section.shape) for x, section in places]
        return entry.mapping.split(parts[0] if len(parts) == 1 else torch.cat(parts), self.dimensions)

    def pieces(self, entry: Entry, dtype: torch.dtype) -> tuple[Iterator[Piece], ...]:
        """The HF tensors of an entry as consecutive pieces of a dtype, without padding and without reading them."""
        return tuple(self._pieces(entry, runs, dtype) for runs in self._runs[entry.mapping.megatron])

    def _pieces(self, entry: Entry, runs: Spans, dtype: torch.dtype) -> Iterator[Piece]:
        """Runs of rows of the stored tensors, one after another."""
        places = list(zip(self._places[entry], entry.sections(self.dimensions), strict=True))
        for start, stop in runs:
            for location, section in places:
                first, last = max(start - section.start, 0), min(stop - section.start, section.shape[0])
                if first >= last:
                    continue
                axis = len(location.size) - len(section.shape)
                offset = (*location.offset[:axis], first, *location.offset[axis + 1 :])
                size = (*location.size[:axis], last - first, *location.size[axis + 1 :])
                yield from self.checkpoint.pieces(location.key, offset, size, dtype)

    def _find(self, entry: Entry) -> tuple[Location, ...]:
        index, counts = entry.index, entry.counts(self.dimensions)
        key, single = entry.stacked, hybrid_name(entry.single) if self._renamed else entry.single
        if entry.layer is None:
            key = single
        elif self._renamed or single in self.checkpoint.tensors:
            key, index, counts = single, index[1:], counts[1:]
        ones = tuple(1 for _ in index)
        return tuple(
            Location(key + x.end, (*index, *(0 for _ in x.shape)), (*ones, *x.shape), (*counts, *x.shape))
            for x in entry.sections(self.dimensions)
        )

    def _check_shape(self, location: Location, padded: bool) -> int:
        """Number of padding tokens. Raises ValueError if the stored tensor differs from the config's."""
        stored, expected = tuple(self.checkpoint.tensors[location.key].size), location.whole
        if padded and stored[0] > expected[0] and stored[1:] == expected[1:]:
            return stored[0] - expected[0]
        if stored != expected:
            raise ValueError(
                f"{self.checkpoint.folder}: {location.key} is {list(stored)}, the config means {list(expected)}: "
                "the config belongs to a different architecture"
            )
        return 0


def runs_of_rows(mapping: ParameterMapping, d: Dimensions) -> tuple[Spans, ...]:
    """For each HF tensor, the runs of rows of Megatron's tensor that it consists of, in order.

    Mappings only reorder rows, so they split the rows' numbers as they split a tensor.
    """
    return tuple(_runs(rows) for rows in mapping.split(torch.arange(mapping.megatron_shape(d)[0]), d))


def _runs(rows: Tensor) -> Spans:
    """Consecutive numbers as (first, last + 1)."""
    breaks = (torch.nonzero(rows.diff() != 1).flatten() + 1).tolist()
    return tuple((int(rows[a]), int(rows[b - 1]) + 1) for a, b in pairwise([0, *breaks, len(rows)]))


def disagreement(arguments: Mapping[str, Any], flags: Mapping[str, object]) -> tuple[str, object, object] | None:
    """The first flag in which a run's arguments differ from a config: its name, the run's value, the config's value."""
    expected = {**UNSAID, **flags}
    for flag, name in COMPARED.items():
        if flag not in expected or name not in arguments:
            continue
        actual = arguments[name]
        if isinstance(actual, tuple | list):  # written as in a recipe
            said = ",".join(str(x) for x in actual)
            actual = f"[{said}]" if isinstance(actual, list) else said
        if actual != expected[flag]:
            return flag, actual, expected[flag]
    return None


def check_imported(args: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raises ValueError if a run's arguments describe another model than the one that was imported."""
    flags = checkpoint.model_flags()
    if flags and (found := disagreement(comparable(args, flags), flags)):
        flag, said, meant = found
        raise ValueError(
            f"the run has {flag} {said}, but {checkpoint.folder} was imported from a model with {meant}: put what "
            "`megatron-sfr convert recipe --hf MODEL` prints into the recipe"
        )


def _unlike_names(unknown: list[str], missing: list[str]) -> str:
    said = []
    if missing:
        said.append(f"missing {listed(missing)}")
    if unknown:
        said.append(f"cannot be named in Hugging Face's terms: {listed(unknown)}")
    tied = "output_layer.weight" in [*unknown, *missing]
    return "; ".join(said) + (" (tie_word_embeddings of the config is not that of the training)" if tied else "")
