"""Checks of the prepared folders that a run reads, before its first step: damage, token ids, replies, targets."""

from pathlib import Path
from typing import Any

from megatron.training.utils import get_blend_and_blend_per_split

from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.prepared.corpus_files import open_corpus
from megatron_sfr.data.prepared.documents import PreparedDocuments
from megatron_sfr.data.prepared.open import holds_documents, horizons_of, open_prepared
from megatron_sfr.data.prepared.reference_store import check_references
from megatron_sfr.data.segments.segmenters import format_horizons
from megatron_sfr.data.targets.store import TargetStore
from megatron_sfr.storage.arrays import map_flat
from megatron_sfr.storage.integrity import SAMPLE_BYTES, largest
from megatron_sfr.training.data.epochs import split_blend


def prepared_folders(args: Any) -> list[Path]:
    """The folders of all splits, each once."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    parts = [part for part in (blend, *(blend_per_split or ())) if part is not None]
    return list(dict.fromkeys(Path(path) for part in parts for path in part[0]))


def check_prepared(args: Any, reference_store: str | None = None) -> None:
    """Raises ValueError if a folder is damaged or has token ids beyond the model's vocabulary.

    Args:
        reference_store: the folder of the reference store in each prepared folder, which is checked too.
    """
    folders = prepared_folders(args)
    for folder in folders:
        data = open_prepared(folder)
        data.check(SAMPLE_BYTES // len(folders))
        check_vocabulary(data, args.vocab_size)
    if reference_store is not None and not any(map(holds_documents, folders)):  # documents are refused elsewhere
        check_references(folders, reference_store, args.vocab_size)


def check_vocabulary(data: PreparedData | PreparedDocuments, vocab_size: int) -> None:
    """Raises ValueError if the data have a token id of at least `vocab_size`, which has no embedding."""
    most = max_token_id(data)
    if most >= vocab_size:
        manifest = data.manifest
        raise ValueError(
            f"{data.folder} has token ids up to {most}, and vocab_size is {vocab_size}: set vocab_size to the model's "
            f"(at least {most + 1}; the tokenizer {manifest.tokenizer} has {manifest.vocab_size} tokens), or prepare "
            "the data with the model's tokenizer"
        )


def max_token_id(data: PreparedData | PreparedDocuments) -> int:
    """The largest token id of the folder. For folders of earlier releases it reads all tokens."""
    if isinstance(data, PreparedData):
        return data.max_token_id
    if data.manifest.max_token_id is not None:
        return data.manifest.max_token_id
    return largest(map_flat(Path(f"{data.corpus}.bin"), open_corpus(data.corpus).dtype))


def reply_end_tokens(args: Any) -> list[int]:
    """The token ids that end the replies of all folders. Empty for documents and for folders of earlier releases."""
    found: set[int] = set()
    for folder in prepared_folders(args):
        data = open_prepared(folder)
        if isinstance(data, PreparedData):
            found.update(data.manifest.reply_end_tokens or ())
    return sorted(found)


def flow_targets(args: Any) -> dict[str, str] | None:
    """What the targets of a run are embeddings of, and by which encoder; None without SFR.

    Raises:
        ValueError: a target store is missing or damaged, or the folders differ in horizons or encoder.
    """
    if not args.sfr:
        return None
    folders = prepared_folders(args)
    online = args.sfr_targets == "online"
    data = [open_prepared(folder) for folder in folders]
    stores = [TargetStore.open(x.folder / args.sfr_target_store, x, partial=online) for x in data]
    encoder = _encoder(stores[0])
    for store in stores:
        if changed := [key for key, value in _encoder(store).items() if value != encoder[key]]:
            raise ValueError(
                f"{store.folder} was made with other values of {', '.join(changed)} than {stores[0].folder}: one head "
                "predicts the embeddings of one encoder; embed all folders of a run with the same options"
            )
    return encoder | {
        "horizons": format_horizons(horizons_of(folders)),
        "segments": data[0].manifest.segmenter,
    }


def _encoder(store: TargetStore) -> dict[str, str]:
    """What determines the embeddings of a store, but for rounding."""
    manifest = store.manifest
    return {
        "encoder": manifest.encoder_sha256,
        "pooling": manifest.pooling,
        "normalize": manifest.normalize,
        "prompt": manifest.prompt,
        "max_length": str(manifest.max_length),
    }


def data_warnings(args: Any) -> list[str]:
    """Warnings about data that a run can be trained on, though hardly as it was meant.

    That is, folders of different tokenizers, and validation data that are training data too.
    """
    warnings = []
    tokenizers = {open_prepared(folder).manifest.tokenizer_sha256: folder for folder in prepared_folders(args)}
    if len(tokenizers) > 1:
        named = " and ".join(str(folder) for folder in list(tokenizers.values())[:2])
        warnings.append(f"{named} were prepared with different tokenizers or chat templates")
    train, valid = (split_blend(blend or [])[0] for blend in (args.train_data_path, args.valid_data_path))
    contents = {_contents(folder) for folder in train}
    if equal := [folder for folder in valid if _contents(folder) in contents]:
        warnings.append(f"{equal[0]} is training and validation data: its loss says nothing about other text")
    return warnings


def _contents(folder: Path) -> frozenset[tuple[str, str]]:
    """The checksums of a prepared folder's files, by which equal ones are recognized."""
    return frozenset((name, record["sha256"]) for name, record in open_prepared(folder).manifest.files.items())
