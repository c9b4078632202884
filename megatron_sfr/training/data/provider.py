"""From arguments to upstream's datasets: the data that a run reads, conversations or documents, and their anchors."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer
from megatron.training import get_args
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_sfr.data.prepared.documents import PreparedDocuments
from megatron_sfr.data.prepared.open import holds_documents, horizons_of
from megatron_sfr.runtime.backend import device
from megatron_sfr.runtime.parallel import is_last_stage
from megatron_sfr.training.data.anchor_arrays import AnchorPlan, AnchorSizes
from megatron_sfr.training.data.conversation_dataset import PreparedDataset, PreparedDatasetConfig
from megatron_sfr.training.data.document_dataset import DocumentDataset, DocumentDatasetConfig, contents_of
from megatron_sfr.training.data.online_targets import OnlineTargets, sampler_of
from megatron_sfr.training.data.prepared_check import prepared_folders

Config = PreparedDatasetConfig | DocumentDatasetConfig


@dataclass(frozen=True)
class DataOptions:
    """Where the targets of the flow-matching loss are, and which positions have them."""

    sfr: bool = False
    """Train with the flow head; without it the run is plain cross-entropy on the same data."""
    sfr_target_store: str = "targets"
    """Folder of the target store inside each prepared data folder; written by `megatron-sfr embed`."""
    sfr_targets: Literal["stored", "online"] = "stored"
    """'stored': `megatron-sfr embed` has encoded all of them; 'online': the encoder runs beside training and fills the
    store, which `megatron-sfr embed --later` has begun, ahead of it. The numbers are the same."""
    sfr_lookahead: int = 8
    """Steps that the encoder of online targets may be ahead of training; 0 encodes only what a step asks for."""
    sfr_encoder_device: str | None = None
    """Where online targets are encoded: cpu, cuda:1, ... (the device of the rank that asks for them)."""
    sfr_encoder_threads: int = 1
    """CPU threads of the encoder of online targets, on each replica's last stage."""
    sfr_packing: Literal["none", "first_fit_decreasing"] = "none"
    """Whether a row of seq_length tokens holds one conversation, padded, or as many as fit; attention and positions
    begin anew with each conversation. micro_batch_size and global_batch_size count rows."""
    sfr_anchors: Literal["anchors_only", "nearest"] = "anchors_only"
    """'anchors_only': each target where it begins; 'nearest': every position of a reply has the target of the nearest
    anchor, as in the authors' code, some tokens of which it may have read already."""

    def __post_init__(self) -> None:
        if self.sfr_lookahead < 0:
            raise ValueError(f"sfr_lookahead = {self.sfr_lookahead}: give at least 0")
        if self.sfr_encoder_threads < 1:
            raise ValueError(f"sfr_encoder_threads = {self.sfr_encoder_threads}: give at least 1")


def dataset_config(args: Any, *, reads_targets: bool = True) -> Config:
    """Upstream's configuration for the folders of train, valid and test; ValueError where they do not go together."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    paths = prepared_folders(args)
    anchors = None
    if args.sfr:
        horizons_of(paths)  # one head has the horizons of all
        folders = paths if args.sfr_targets == "online" else ()
        anchors = AnchorPlan(args.sfr_target_store, args.sfr_anchors, folders) if reads_targets else None
    common: dict[str, Any] = {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "split": args.split,
        "path_to_cache": args.data_cache_path,
        "full_validation": args.full_validation,
        "num_dataset_builder_threads": args.num_dataset_builder_threads,
        "mid_level_dataset_surplus": args.mid_level_dataset_surplus,
        "anchors": anchors,
        "text_length": text_length(args),
    }
    if not any(map(holds_documents, paths)):
        if args.dataloader_inter_document_masking:
            raise ValueError("dataloader_inter_document_masking is for documents; conversations have sfr_packing")
        if args.eod_mask_loss:
            raise ValueError("eod_mask_loss is for documents; conversations have masks of their own: leave it out")
        return PreparedDatasetConfig(**common, packed=args.sfr_packing != "none")
    return _documents_config(args, paths, common)


def text_length(args: Any) -> int | None:
    """Tokens of a row that KL-flow reads: the time's token takes a position. None for other training."""
    if args.training_task != "kl-flow":
        return None
    return int(args.seq_length) - (args.kl_flow_time == "token")


def _documents_config(args: Any, paths: list[Path], common: dict[str, Any]) -> DocumentDatasetConfig:
    if chats := [path for path in paths if not holds_documents(path)]:
        raise ValueError(f"{chats[0]} holds conversations and other folders documents; train on them in two runs")
    if args.sfr_packing != "none":
        raise ValueError("sfr_packing is for conversations: documents fill each row as it is; set it to none")
    prepared = [PreparedDocuments.open(path) for path in paths]
    ends = {data.manifest.eod for data in prepared}
    if len(ends) > 1:
        raise ValueError(f"prepared documents end on different tokens, {sorted(ends)}; prepare them with one tokenizer")
    return DocumentDatasetConfig(
        **common,
        tokenizer=NullTokenizer(args.vocab_size, eod_id=ends.pop()),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        mmap_bin_files=args.mmap_bin_files,
        separate=args.dataloader_inter_document_masking,
        contents={str(data.folder): contents_of(data) for data in prepared},
    )


def build(config: Config, num_samples: list[int | None]) -> list[Any]:
    """Upstream's train, valid and test datasets; afterwards the plan of the anchors has the sizes that fit all rows."""
    cls = DocumentDataset if isinstance(config, DocumentDatasetConfig) else PreparedDataset
    built = BlendedMegatronDatasetBuilder(cls, num_samples, lambda: True, config).build()
    if (plan := config.anchors) is not None:
        sizes = [dataset.sizes(plan.fill) for dataset in _parts(built)]
        plan.sizes = AnchorSizes(max(size.rows for size in sizes), max(size.entries for size in sizes))
    return built


def _parts(datasets: list[Any]) -> Iterator[Any]:
    """The datasets of single folders."""
    for dataset in datasets:
        if isinstance(dataset, list):
            yield from _parts(dataset)
        elif isinstance(dataset, BlendedDataset):
            yield from dataset.datasets
        elif dataset is not None:
            yield dataset


class DataProvider:
    """Upstream's train_valid_test_datasets_provider, for every rank; only the last stage reads targets.

    `online` is what their ranks ask for online targets, None before the datasets are built and elsewhere.
    """

    is_distributed = True  # upstream: every rank opens its own memory map

    def __init__(self) -> None:
        self.online: OnlineTargets | None = None

    def __call__(self, num_samples: tuple[int, int | None, int], vp_stage: int | None = None) -> list[Any]:
        args = get_args()
        config = dataset_config(args, reads_targets=is_last_stage(vp_stage))
        built = build(config, list(num_samples))
        if (plan := config.anchors) is not None and plan.folders:
            self.online = OnlineTargets(
                plan.folders,
                plan.store,
                lookahead=args.sfr_lookahead * get_num_microbatches(),
                encoder_device=args.sfr_encoder_device or str(device()),
                threads=args.sfr_encoder_threads,
            )
            if built[0] is not None:
                self.online.follow(built[0], sampler_of(args, built[0]))
        return built

    def close(self) -> None:
        """Ends what runs beside training."""
        if self.online is not None:
            self.online.close()
