"""Conversations as a source of `prepare`: options, how their files are read, and what their folder records.

One file of the pipeline (pipeline.py) reads, one encodes (encode_conversations.py), one writes (folder_writer.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sfr.data.chat.chat_template import ChatTemplate
from megatron_sfr.data.chat.formats import FORMATS, TITLES, detect
from megatron_sfr.data.chat.template_options import SampleOptions
from megatron_sfr.data.chat.tokenizer import tokenizer_sha256
from megatron_sfr.data.prepare.encode_conversations import SAMPLE_DIGESTS, TOO_LONG, ChatTotals, SampleEncoder
from megatron_sfr.data.prepared.conversations import DTYPES, PreparedData, PreparedManifest
from megatron_sfr.data.segments.anchors import Cut
from megatron_sfr.data.segments.reference_anchors import AnchorRule
from megatron_sfr.data.segments.segmenters import SEGMENTERS, Horizon, Segmenter, check_horizons
from megatron_sfr.storage.input_files import DatasetOptions, record_files
from megatron_sfr.storage.integrity import FileRecord, sha256_of
from megatron_sfr.storage.jsonl import Chunk, Position, read_chunks
from megatron_sfr.storage.manifest import InputRecord
from megatron_sfr.storage.user_files import check_choice

MOST_NAMED = 8
"""Files whose formats are printed one by one."""


@dataclass(frozen=True)
class PrepareOptions:
    """How conversations are read and cut into segments. Lengths count tokens, horizons units of the segmenter.

    Example:
        >>> import megatron_sfr as sfr
        >>> sfr.PrepareOptions(seq_length=4096, horizons=((1, 32), (33, 96))).stride
        32
    """

    seq_length: int = 2048
    """Length of a training sequence. A conversation has at most one token more, which is only predicted."""
    stride: int = 32
    """Distance of the anchors in a reply."""
    horizons: tuple[Horizon, ...] = ((1, 256),)
    """(offset, length) of each target of an anchor. Offset 1 starts at the token to predict."""
    min_segment_length: int = 16
    """Targets that the end of the reply cuts to fewer tokens are dropped."""
    segmenter: Segmenter = "window"
    """What horizons count: tokens (window), sentences or statements."""
    skip_bad_rows: bool = False
    """Whether to write bad records to rejected.jsonl and continue, instead of stopping at the first one."""
    format: str | None = None
    """Format of all records. None: the first record of each file decides."""
    persona_key: str = "persona"
    """The field that holds the persona."""
    too_long: str = "error"
    """What to do with a longer conversation. 'error': it is a bad record. 'truncate': keep its first tokens."""
    chat: SampleOptions = field(default_factory=SampleOptions)
    """Which samples a conversation makes, and how the chat template is used."""
    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    """Which part to read of inputs that are datasets."""
    anchor_rule: AnchorRule = "replies"
    """'replies': anchors in each reply. 'reference': as in SFR's public code (data/segments/reference_anchors.py)."""

    def __post_init__(self) -> None:
        for name in ("seq_length", "stride", "min_segment_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        check_horizons(self.horizons)
        check_choice("segmenter", self.segmenter, tuple(SEGMENTERS))
        if self.format is not None:
            check_choice("format", self.format, FORMATS)
        check_choice("too_long", self.too_long, TOO_LONG)
        if self.anchor_rule == "reference" and self.segmenter != "window":
            raise ValueError(f"segmenter {self.segmenter}: the reference preset counts tokens; set it to window")

    def source(self, inputs: Sequence[Path]) -> ChatRecords:
        """Files of records. Raises ValueError where an input is not one."""
        if not inputs:
            raise ValueError("no input; give at least one file of records")
        return ChatRecords(record_files(inputs, self.dataset), self)


@dataclass(frozen=True)
class ChatOrigin:
    """What decides every byte of a prepared folder. Its names are the manifest's."""

    chat: dict[str, Any]
    persona_key: str
    seq_length: int
    too_long: str
    stride: int
    horizons: list[list[int]]
    min_segment_length: int
    segmenter: Segmenter
    anchor_rule: AnchorRule
    vocab_size: int
    tokenizer_sha256: str
    inputs: list[InputRecord]


@dataclass(frozen=True)
class ChatRecords:
    """Conversations in files of records."""

    inputs: tuple[Path, ...]
    options: PrepareOptions

    version = PreparedManifest.version
    is_chat = True

    @property
    def total(self) -> int:
        return sum(path.stat().st_size for path in self.inputs)

    def origin(self, tokenizer: Any, say: Callable[[str], None]) -> ChatOrigin:
        ChatTemplate(tokenizer, self.options.chat)  # refuses variables that the template does not read
        records: list[InputRecord] = []
        for path in self.inputs:
            form = self.options.format or detect(path)
            records.append({"path": str(path.resolve()), "sha256": sha256_of(path), "format": form})
        _say_formats(records, say)
        return ChatOrigin(
            chat=asdict(self.options.chat),
            persona_key=self.options.persona_key,
            seq_length=self.options.seq_length,
            too_long=self.options.too_long,
            stride=self.options.stride,
            horizons=[list(horizon) for horizon in self.options.horizons],
            min_segment_length=self.options.min_segment_length,
            segmenter=self.options.segmenter,
            anchor_rule=self.options.anchor_rule,
            vocab_size=len(tokenizer),
            tokenizer_sha256=tokenizer_sha256(tokenizer),
            inputs=records,
        )

    def chunks(self, start: Position, size: int) -> Iterator[Chunk]:
        return read_chunks(self.inputs, start, size)

    def encoder(self, tokenizer: Any, origin: ChatOrigin) -> SampleEncoder:
        options = self.options
        formats = {str(path): record["format"] for path, record in zip(self.inputs, origin.inputs, strict=True)}
        cut = Cut(options.stride, origin.horizons, options.min_segment_length, options.segmenter)
        how = options.persona_key, options.seq_length, options.too_long
        return SampleEncoder(tokenizer, formats, *how, cut, options.chat, options.anchor_rule)

    def dtypes(self, origin: ChatOrigin) -> Mapping[str, type[np.generic]]:
        return DTYPES | {SAMPLE_DIGESTS: np.uint64}

    def totals(self) -> ChatTotals:
        return ChatTotals()

    def manifest(self, folder: Path, values: Mapping[str, Any], files: dict[str, FileRecord]) -> PreparedManifest:
        path = folder / SAMPLE_DIGESTS
        duplicates = values["samples"] - len(np.unique(np.fromfile(path, np.uint64)))
        path.unlink()
        known = {name: value for name, value in values.items() if name in PreparedManifest.__dataclass_fields__}
        return PreparedManifest(**known, duplicates=duplicates, files={name: files[name] for name in DTYPES})

    def read_manifest(self, folder: Path) -> PreparedManifest:
        return PreparedData.open(folder).manifest

    def report(self, manifest: PreparedManifest, tokenizer: Any, say: Callable[[str], None]) -> None:
        """Warns of tokens that end replies but do not stop engines, and of a field of personas that no record has."""
        key = self.options.persona_key
        if key != PrepareOptions.persona_key and manifest.personas.keys() == {""}:
            say(f"warning: no record has the field {key}, which --persona-key names: there are no personas")
        others = [id for id in manifest.reply_end_tokens or () if id != tokenizer.eos_token_id]
        if others:
            names = ", ".join(tokenizer.convert_ids_to_tokens(others))
            say(
                f"replies end on {names}, which is not the tokenizer's eos_token ({tokenizer.eos_token}): "
                "`megatron-sfr convert export` adds it to the end tokens of generation_config.json"
            )


def _say_formats(records: Sequence[InputRecord], say: Callable[[str], None]) -> None:
    if len(records) <= MOST_NAMED:
        for record in records:
            say(f"{Path(record['path']).name}: {TITLES[record['format']]}")
        return
    counts = Counter(TITLES[record["format"]] for record in records)
    say(f"{len(records):,} files: " + ", ".join(f"{count:,} of {title}" for title, count in counts.items()))
