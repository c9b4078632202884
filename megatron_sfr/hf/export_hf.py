"""Megatron checkpoint -> Hugging Face folder, copied from file to file. Workers write separate files."""

import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any

import torch
from tqdm import tqdm

from megatron_sfr.hf.adapter.merge import MergedModel
from megatron_sfr.hf.adapter.stored_adapter import has_adapters
from megatron_sfr.hf.config_values import Config
from megatron_sfr.hf.end_tokens import add_end_tokens
from megatron_sfr.hf.gguf.gguf_file import model_contents
from megatron_sfr.hf.hf_folder import CONFIG, INDEX, is_up_to_date, new_folder, read_config
from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint, find_checkpoint
from megatron_sfr.hf.megatron.megatron_model import HEAD, StoredModel
from megatron_sfr.hf.safetensors_writer import Header, Shard, ShardWriter, plan_shards
from megatron_sfr.storage.provenance import contents_of

COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "*.tiktoken",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
    "*.py",
)
"""Files copied with the config: tokenizer, chat template, generation config, licence, code that auto_map names."""
SHARD_BYTES = 5 * 10**9
Model = StoredModel | MergedModel


@dataclass(frozen=True)
class ExportReport:
    """What was exported, from which checkpoint, and the names of tensors that were dropped."""

    output: Path
    checkpoint: Path
    tensors: int
    bytes: int
    files: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    dropped: tuple[str, ...]
    padding: int
    """Number of padding tokens removed from the vocabulary."""
    up_to_date: bool
    """Whether the same export had already written the output."""
    end_tokens: tuple[int, ...] = ()
    """Ids that end the replies of the training data, added to the model's end tokens."""


def export_hf(
    checkpoint: str | Path,
    output: str | Path,
    *,
    like: str | Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    head: bool = False,
    merge: bool = False,
    base: str | Path | None = None,
    force: bool = False,
    progress: bool = True,
) -> ExportReport:
    """Converts a Megatron checkpoint to a Hugging Face folder, which AutoModelForCausalLM and vLLM load.

    An output that the same export has written stays as it is.

    Args:
        checkpoint: a checkpoint, or a --save folder, of which the newest complete checkpoint is taken.
        output: folder to write.
        like: a Hugging Face folder with the model's config, tokenizer, chat template and generation config.
        dtype: of the weights. Default: the checkpoint's, so that nothing is rounded.
        shard_bytes: largest size of a file of weights.
        workers: threads that write files; the files are the same for any number.
        head: write the flow head too; `load_head` reads it.
        merge: merge the adapters of a run with LoRA into its frozen weights.
        base: for merge: the frozen weights, an HF folder, a GGUF file or a Megatron checkpoint. Default: the run's.
        force: replace an output of another export.
        progress: show a progress bar.
    Returns:
        What was exported, and the names of tensors that were left out.
    Raises:
        ValueError: the checkpoint is incomplete or belongs to another architecture than `like`.
    Example:
        >>> import megatron_sfr as sfr
        >>> report = sfr.export_hf("start", "exported", like="model", progress=False)
        >>> report.dropped  # a checkpoint of a run with SFR has a flow head to leave out
        ()
    """
    checkpoint, output, like = Path(checkpoint), Path(output), Path(like)
    if workers < 1 or shard_bytes < 1:
        raise ValueError(f"{workers} workers writing files of {shard_bytes} bytes: both have to be positive")
    config = read_config(like)
    model = _open(Checkpoint(find_checkpoint(checkpoint)), config, merge=merge, base=base)
    headers = _headers(model, dtype)
    shards = plan_shards(headers, shard_bytes)
    size, dtypes = sum(x.bytes for x in headers.values()), tuple(dict.fromkeys(x.dtype for x in headers.values()))
    if output.resolve() == like.resolve():
        raise ValueError(f"{output} is the folder of --like: choose another --output")
    identity = _identity(model, like, {"dtype": str(dtype), "shard_bytes": shard_bytes, "head": head})
    end_tokens: tuple[int, ...] = ()
    if not (done := is_up_to_date(output, identity, force=force)):
        with new_folder(output, force=force, size=size, identity=identity) as folder:
            copy_companions(like, folder)
            end_tokens = _write_config(config, dtypes, model.checkpoint, folder)
            with tqdm(total=size, unit="B", unit_scale=True, desc="export", disable=not progress) as bar:
                _write_weights(model, shards, folder, bar, workers)
            _write_head_and_index(model, shards, size, folder, head)
    return ExportReport(
        output=output,
        checkpoint=model.checkpoint.folder,
        tensors=len(headers),
        bytes=size,
        files=tuple(shard.file for shard in shards),
        dtypes=dtypes,
        dropped=tuple(key for key in model.dropped if not (head and key.startswith(HEAD))),
        padding=model.padding,
        up_to_date=done,
        end_tokens=end_tokens,
    )


def _open(checkpoint: Checkpoint, config: Config, *, merge: bool, base: str | Path | None) -> Model:
    """The model in a checkpoint, or that of its adapters merged into their base."""
    if base is not None and not merge:
        raise ValueError("--base names the weights that --merge merges adapters into: add --merge")
    if merge:
        return MergedModel(checkpoint, config, Path(base) if base is not None else None)
    if has_adapters(checkpoint):
        raise ValueError(
            f"{checkpoint.folder} holds adapters only: add --merge for a complete model, or --adapter for PEFT's folder"
        )
    return StoredModel(checkpoint, config)


def _identity(model: Model, like: Path, options: dict[str, object]) -> dict[str, object]:
    """Everything that determines an export, by which a later call recognizes its output."""
    inputs = {"checkpoint": contents_of(model.checkpoint.folder), "like": contents_of(like, (CONFIG, *COMPANIONS))}
    if isinstance(model, MergedModel):
        inputs["base"] = model_contents(model.base, ("*", "*/*"))
    return {"command": "convert export", **inputs, "options": options}


def _write_head_and_index(model: Model, shards: Sequence[Shard], size: int, folder: Path, head: bool) -> None:
    if head:
        from megatron_sfr.hf.head_files import keep_head  # imports Megatron, unlike the rest of this module

        keep_head(model.checkpoint, folder)
    if len(shards) > 1 or head:  # programs that read every .safetensors file of a folder respect an index
        write_index(shards, size, folder / INDEX)


def _headers(model: Model, dtype: torch.dtype | None) -> dict[str, Header]:
    """Shape and dtype of each HF tensor, in the order of the model."""
    return {
        name: Header(shape, dtype or model.dtype(entry))
        for entry in model.entries
        for name, shape in zip(entry.names, entry.mapping.shapes(model.dimensions), strict=True)
    }


def _write_weights(model: Model, shards: Sequence[Shard], folder: Path, bar: "tqdm[Any]", workers: int) -> None:
    """Writes the shards in threads, which run in parallel because copying releases Python's lock."""
    failed, progress = Event(), Lock()

    def written(count: int) -> None:
        with progress:
            bar.update(count)
        if failed.is_set():
            raise CancelledError

    with ThreadPoolExecutor(min(workers, len(shards))) as pool:
        todo = [pool.submit(_write_shard, model, shard, folder, written) for shard in shards]
        try:
            for done in as_completed(todo):
                done.result()
        except BaseException:  # Ctrl-C too: the other threads end after the tensor that they are writing
            failed.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write_shard(model: Model, shard: Shard, folder: Path, written: Callable[[int], object]) -> None:
    """Writes one file. `written` is called with the number of bytes of each tensor."""
    with ShardWriter(folder, shard) as writer:
        for entry in model.entries:
            kept = [name for name in entry.names if name in shard.tensors]  # the next file may start inside an entry
            if not kept:
                continue
            pieces = model.pieces(entry, shard.tensors[kept[0]].dtype)
            for name, of_name in zip(entry.names, pieces, strict=True):
                if name in kept:
                    writer.write_pieces(name, of_name)
                    written(shard.tensors[name].bytes)


def write_index(shards: Sequence[Shard], size: int, path: Path) -> None:
    files = {name: shard.file for shard in shards for name in shard.tensors}
    path.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": files}, indent=2) + "\n")


def _write_config(
    config: Config, dtypes: tuple[torch.dtype, ...], checkpoint: Checkpoint, folder: Path
) -> tuple[int, ...]:
    """Writes config.json. Returns the end tokens of the training data that the model did not have."""
    keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]  # of transformers before 5, and of 5
    said = dict.fromkeys(keys, str(dtypes[0]).removeprefix("torch.")) if len(dtypes) == 1 else {}
    text = json.dumps({**config, **said}, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    return add_end_tokens(folder, checkpoint.arguments().get("reply_end_tokens") or ())


def copy_companions(like: Path, folder: Path) -> None:
    """Copies the files that belong to a model besides its weights and config."""
    for file in sorted({file for pattern in COMPANIONS for file in like.glob(pattern) if file.is_file()}):
        target = folder / file.relative_to(like)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
