"""Builds upstream's datasets: the data that a run reads, conversations or documents, and their anchors."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer
from megatron.core.utils import log_single_rank
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_sfr.data.prepared.documents import PreparedDocuments
from megatron_sfr.data.prepared.open import anchor_rule_of, holds_documents, horizons_of
from megatron_sfr.option_names import named
from megatron_sfr.runtime.backend import device
from megatron_sfr.runtime.parallel import data_size, is_last_stage
from megatron_sfr.training.data.anchor_arrays import AnchorPlan, AnchorSizes, EntryOptions
from megatron_sfr.training.data.conversation_dataset import PreparedDataset, PreparedDatasetConfig
from megatron_sfr.training.data.document_dataset import DocumentDataset, DocumentDatasetConfig, documents_sha256
from megatron_sfr.training.data.epochs import sequences_of
from megatron_sfr.training.data.full_validation import EvenlyDivided
from megatron_sfr.training.data.online_targets import OnlineTargets, sampler_of
from megatron_sfr.training.data.packing import padding_multiple
from megatron_sfr.training.data.persona_groups import Group, number_groups, parts_of
from megatron_sfr.training.data.prepared_check import prepared_folders

logger = logging.getLogger(__name__)

Config = PreparedDatasetConfig | DocumentDatasetConfig


@named("sfr_", sfr="sfr", train_epochs="train_epochs")
@dataclass(frozen=True)
class DataOptions:
    """Where the targets of the flow-matching loss are, and which positions have them."""

    sfr: bool = False
    """Train with the flow head. Default: off, which trains on the token objective alone, on the same data."""
    train_epochs: float | None = None
    """Length of the run in epochs of the training data, instead of train_iters; needs global_batch_size. An epoch of
    several folders has as many sequences as all of them together. Default: train_iters decides."""
    target_store: str = "targets"
    """Folder of the target store inside each prepared folder, written by `megatron-sfr embed`. Default: targets."""
    targets: Literal["stored", "online"] = "stored"
    """Where targets come from. 'stored' (default): `megatron-sfr embed` has encoded all of them. 'online': the encoder
    runs beside training and fills the store, which `megatron-sfr embed --later` has created. The numbers are equal."""
    lookahead: int = 8
    """Steps that the encoder of online targets may be ahead of training. Default 8; 0 encodes only what a step
    needs."""
    encoder_device: str | None = None
    """Device of the encoder of online targets: cpu, cuda:1, ... Default: that of the rank that needs the targets."""
    encoder_threads: int = 1
    """CPU threads of the encoder of online targets, on the last pipeline stage of each replica. Default 1."""
    packing: Literal["none", "first_fit_decreasing"] = "none"
    """Packing of conversations into sequences of seq_length tokens. 'none' (default): one conversation each, padded.
    'first_fit_decreasing': as many as fit; attention and positions restart with each conversation. micro_batch_size and
    global_batch_size count sequences. Under context parallelism each conversation is padded to a multiple of twice the
    number of ranks."""
    anchors: Literal["anchors_only", "nearest"] = "anchors_only"
    """Which positions have a target. 'anchors_only' (default): the position before the target starts. 'nearest': every
    position of a reply has the target of the nearest anchor, as in the authors' code; the position may already have
    read some of its tokens."""
    fault_zero_targets: bool = False
    """Reproduces a fault of the authors' code: supervised tokens without a target, such as those of a reply too short
    for any window, are trained towards an embedding of 0 with their full weight. Needs data of `prepare --preset
    reference`. Default: off, they have no SFR loss."""

    def __post_init__(self) -> None:
        if self.lookahead < 0:
            raise ValueError(f"`lookahead` = {self.lookahead}: give at least 0")
        if self.encoder_threads < 1:
            raise ValueError(f"`encoder_threads` = {self.encoder_threads}: give at least 1")


@dataclass(frozen=True)
class DataPlan:
    """What the datasets of a run are built from."""

    megatron: Any
    """Megatron's arguments: paths, splits, seed, sequence length. Upstream's loop counts consumed samples in them."""
    options: DataOptions
    """Targets and packing."""
    text_length: int | None = None
    """Tokens of a sequence that KL-flow reads; None for other training tasks."""
    raw_weights: bool = False
    """Whether anchors have the weights (N - j) / N themselves, for sfr_mean = microbatch."""
    reference: bool = False
    """Whether the run has the preset `reference`, which needs data prepared with it."""
    reference_store: str | None = None
    """Folder of the reference store inside each prepared folder; None: the objective reads none."""


def dataset_config(plan: DataPlan, *, reads_targets: bool = True) -> Config:
    """Upstream's configuration of the datasets for training, validation and test.

    Args:
        reads_targets: whether items have anchors, targets and references; only the last pipeline stage needs them.
    Raises:
        ValueError: the prepared folders do not go together, or not with the options.
    """
    args, options = plan.megatron, plan.options
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    paths = prepared_folders(args)
    anchors = None
    if options.sfr:
        horizons_of(paths)  # all folders need the same horizons, for one head
        folders = paths if options.targets == "online" else ()
        check_preset(plan, paths)
        entries = EntryOptions(options.anchors, plan.raw_weights, options.fault_zero_targets)
        anchors = AnchorPlan(options.target_store, entries, folders) if reads_targets else None
    common: dict[str, Any] = {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "split": args.split,
        "path_to_cache": args.data_cache_path,
        "full_validation": args.full_validation,
        "multiple_validation_sets": args.multiple_validation_sets,
        "num_dataset_builder_threads": args.num_dataset_builder_threads,
        "mid_level_dataset_surplus": args.mid_level_dataset_surplus,
        "anchors": anchors,
        "text_length": plan.text_length,
    }
    if not any(map(holds_documents, paths)):
        store = plan.reference_store if reads_targets else None
        if args.dataloader_inter_document_masking:
            raise ValueError("dataloader_inter_document_masking is for documents; conversations have sfr_packing")
        if args.eod_mask_loss:
            raise ValueError("eod_mask_loss is for documents; conversations have a loss mask: leave it out")
        packed = options.packing != "none"
        multiple = padding_multiple(args.context_parallel_size) if packed else 1
        return PreparedDatasetConfig(**common, packed=packed, multiple=multiple, reference_store=store)
    return _documents_config(plan, paths, common)


def check_preset(plan: DataPlan, paths: list[Path]) -> None:
    """ValueError or a warning where the data were not prepared as the options of SFR's public code need it."""
    reference = anchor_rule_of(paths[0]) == "reference"
    if plan.options.fault_zero_targets and not reference:
        raise ValueError(f"sfr_fault_zero_targets needs data of prepare --preset reference, which {paths[0]} is not")
    if plan.options.fault_zero_targets and len(horizons_of(paths)) > 1:
        raise ValueError("sfr_fault_zero_targets is for a single horizon: prepare the data with one")
    if plan.reference and not reference:
        message = (
            f"sfr_preset = reference, but {paths[0]} was not prepared with --preset reference: its anchors are ours"
        )
        log_single_rank(logger, logging.WARNING, message)


def _documents_config(plan: DataPlan, paths: list[Path], common: dict[str, Any]) -> DocumentDatasetConfig:
    args = plan.megatron
    if chats := [path for path in paths if not holds_documents(path)]:
        raise ValueError(f"{chats[0]} holds conversations and other folders documents; train on them in two runs")
    if plan.reference_store is not None:
        raise ValueError(
            "objective asft is for conversations: what a reference predicts in a document depends on where sequences "
            "start, which training shuffles; choose another objective"
        )
    if plan.options.packing != "none":
        raise ValueError("sfr_packing is for conversations: documents fill each sequence as it is; set it to none")
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
        contents={str(data.folder): documents_sha256(data) for data in prepared},
    )


def build(config: Config, num_samples: list[int | None], *, shuffles_epochs: bool = False) -> list[Any]:
    """Upstream's datasets for training, validation and test, with anchor arrays of one size; None of what has no data.

    num_samples: of each; 0 (eval_iters) leaves it out, and None reads all once.
    """
    cls = DocumentDataset if isinstance(config, DocumentDatasetConfig) else PreparedDataset
    _repeat(config, num_samples, shuffles_epochs=shuffles_epochs)
    built = BlendedMegatronDatasetBuilder(cls, num_samples, lambda: True, config).build()
    built = [None if n == 0 else part for n, part in zip(num_samples, built, strict=True)]  # no blend of 0 is sampled
    if (plan := config.anchors) is not None:
        parts = list(parts_of(built))
        sizes = [dataset.sizes(plan.entries) for dataset in parts]
        largest = AnchorSizes(max(size.targets for size in sizes), max(size.entries for size in sizes))
        for dataset in parts:
            dataset.anchor_sizes = largest
    return built


def _repeat(config: Config, num_samples: list[int | None], *, shuffles_epochs: bool) -> None:
    """Gives weights to the blends without them that are read more than once: their folders' numbers of sequences.

    Upstream builds a single epoch of a blend without weights. With these it repeats each folder equally often.
    shuffles_epochs: whether the sampler repeats it by itself (dataloader_type = cyclic).
    """
    whole = [(0.0, 1.0)] * len(num_samples)
    if config.blend_per_split is not None:
        rows = zip(config.blend_per_split, num_samples, whole, strict=True)
        config.blend_per_split = [_weighted(config, blend, [(n, part)]) for blend, n, part in rows]
    elif config.blend is not None and not shuffles_epochs:
        config.blend = _weighted(
            config, config.blend, list(zip(num_samples, config.split_matrix or whole, strict=True))
        )


def _weighted(config: Config, blend: Any, parts: list[tuple[int | None, tuple[float, float] | None]]) -> Any:
    """A blend, with weights if it has none and one of the parts (sequences, share) needs more than an epoch."""
    if blend is None or blend[1] is not None or len(blend[0]) == 1:
        return blend
    paths, length = [Path(path) for path in blend[0]], config.sequence_length
    packed, multiple = False, 1
    if isinstance(config, PreparedDatasetConfig):
        packed, multiple = config.packed, config.multiple

    def sizes(share: tuple[float, float]) -> list[int]:
        return [sequences_of(path, length, packed=packed, multiple=multiple, share=share) for path in paths]

    repeats = any(n and share and n > sum(sizes(share)) for n, share in parts)
    return (blend[0], sizes((0.0, 1.0))) if repeats else blend


def sequences_to_read(args: Any, asked: tuple[int, int | None, int]) -> list[int | None]:
    """The sequences of each part, those before a resumed run's step included, where its samplers go on.

    Upstream asks for what a run reads that has had its batch sizes, eval_interval and eval_iters from the start.
    """
    train, valid, test = asked
    if not args.train_samples:
        train = max(train, args.consumed_train_samples + (args.train_iters - args.iteration) * args.global_batch_size)
    if valid and not args.skip_train:
        first = max(args.iteration, args.start_eval_at_iter or 0)
        times = max(0, args.train_iters // args.eval_interval - first // args.eval_interval + 1)
        valid = max(valid, args.consumed_valid_samples + times * args.eval_iters * args.eval_global_batch_size)
    return [train, valid, test]


class DataProvider:
    """Upstream's train_valid_test_datasets_provider, for every rank. Only the last pipeline stage reads targets."""

    is_distributed = True  # upstream: every rank opens its own memory map

    def __init__(self, plan: DataPlan) -> None:
        self.plan = plan
        self.online: OnlineTargets | None = None
        """Where the last stage's ranks get online targets; set once the datasets are built."""
        self.groups: list[Group] = []
        """The groups that the batches' `group` numbers; set once the datasets are built."""

    def __call__(self, num_samples: tuple[int, int | None, int], vp_stage: int | None = None) -> list[Any]:
        options, args = self.plan.options, self.plan.megatron
        config = dataset_config(self.plan, reads_targets=is_last_stage(vp_stage))
        cyclic = args.dataloader_type == "cyclic"
        built = build(config, sequences_to_read(args, num_samples), shuffles_epochs=cyclic)
        if self.plan.text_length is None:
            multiple, names = args.multiple_validation_sets, args.validation_set_names
            self.groups = number_groups(built, multiple=multiple, names=names)
        if args.full_validation:
            sets = built[1] if isinstance(built[1], list) else [built[1]]
            built[1] = [EvenlyDivided(dataset, data_size()) for dataset in sets]
        if (anchors := config.anchors) is not None and anchors.folders:
            self.online = OnlineTargets(
                anchors.folders,
                anchors.store,
                lookahead=options.lookahead * get_num_microbatches(),
                encoder_device=options.encoder_device or str(device()),
                threads=options.encoder_threads,
            )
            if built[0] is not None:
                self.online.follow(built[0], sampler_of(args, built[0]))
        return built

    def close(self) -> None:
        """Stops the encoder that runs beside training."""
        if self.online is not None:
            self.online.close()
