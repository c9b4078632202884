"""A blend of prepared folders: samples of equal shape from all folders, and one set of horizons."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.utils import Split
from torch.utils.data import default_collate

from megatron_sfr.config.build import head_plan
from megatron_sfr.config.run_plan import plan_run, text_length
from megatron_sfr.config.settings import Parser
from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.targets.store import TargetStore
from megatron_sfr.kl_flow.kl_flow_step import TaskOptions
from megatron_sfr.kl_flow.model import KLFlowModelOptions
from megatron_sfr.option_names import option_names
from megatron_sfr.training.data.conversation_dataset import PreparedDataset
from megatron_sfr.training.data.full_validation import EvenlyDivided
from megatron_sfr.training.data.persona_groups import Group, number_groups
from megatron_sfr.training.data.provider import (
    DataOptions,
    DataPlan,
    build,
    dataset_config,
    sequences_to_read,
)
from tests.distributed.tiny import SEQ_LENGTH, write_prepared

HORIZONS = ((1, 8), (5, 3))


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's configuration logs on rank 0 and warns if there is no rank."""
    monkeypatch.setenv("RANK", "0")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders whose samples differ in their numbers of anchors and supervised tokens."""
    folder = tmp_path_factory.mktemp("blend")
    return [write_prepared(folder / str(rows), rows, HORIZONS) for rows in (3, 40)]


def arguments(train: list[Any], valid: list[Any] | None = None, **changes: Any) -> DataPlan:
    """What the datasets read: upstream's arguments, our options, and the length of a text."""
    read: dict[str, Any] = {
        **dict.fromkeys(("data_path", "data_args_path", "per_split_data_args_path", "test_data_path")),
        **dict.fromkeys(("split", "data_cache_path")),
        "train_data_path": train,
        "valid_data_path": valid,
        "seed": 1,
        "seq_length": SEQ_LENGTH,
        "context_parallel_size": 1,
        "full_validation": False,
        "multiple_validation_sets": False,
        "num_dataset_builder_threads": 1,
        "mid_level_dataset_surplus": 0.005,
        "eod_mask_loss": False,
        "dataloader_inter_document_masking": False,
        "sfr": True,
        "training_task": "autoregressive",
        "kl_flow_time": "token",
    } | changes
    ours = {field: read.pop(name) for field, name in option_names(DataOptions).items() if name in read}
    task, time = TaskOptions(read.pop("training_task")), KLFlowModelOptions(read.pop("kl_flow_time"))
    return DataPlan(Namespace(**read), DataOptions(**ours), text_length(task, time, read["seq_length"]))


def whole(folder: Path, split: Split = Split.train, **changes: Any) -> PreparedDataset:
    """An epoch of one folder."""
    config, data = dataset_config(arguments([str(folder)], **changes)), PreparedData.open(folder)
    dataset = PreparedDataset(data, str(folder), np.arange(len(data)), None, split, config)
    dataset.anchor_sizes = dataset.sizes(config.anchors.entries)
    return dataset


def test_the_name_of_a_folder_may_be_a_number(folders: list[Path], monkeypatch: pytest.MonkeyPatch):
    """It is not taken for a weight: those stand before every folder of a blend."""
    monkeypatch.chdir(folders[0].parent)
    args = Parser().read(["--seq-length", str(SEQ_LENGTH), "--sfr", "--train-data-path", folders[0].name])
    assert head_plan(plan_run(args, "cpu")).dim == 384


@pytest.mark.parametrize("fill", ["anchors_only", "nearest"])
def test_a_blend_of_folders_with_different_maxima_is_collated(folders: list[Path], fill: str):
    manifests = [PreparedData.open(folder).manifest for folder in folders]
    assert manifests[0].max_anchors < manifests[1].max_anchors
    assert manifests[0].max_response_tokens < manifests[1].max_response_tokens
    blend = [0.5, str(folders[0]), 0.5, str(folders[1])]

    config = dataset_config(arguments([*map(str, blend)], [str(folders[0])], sfr_anchors=fill))
    train, valid, _ = build(config, [24, 3, 0])

    rows = manifests[1].max_anchors
    entries = rows if fill == "anchors_only" else manifests[1].max_response_tokens * len(HORIZONS)
    batch = default_collate([train[i] for i in range(24)])
    assert set(batch["dataset_id"].tolist()) == {0, 1}
    for name, array in default_collate([valid[i] for i in range(3)]).items():
        assert array.shape[1:] == batch[name].shape[1:], name
    assert batch["target"].shape == (24, rows, 384)
    for name in ("anchor_position", "anchor_row", "anchor_horizon", "anchor_weight"):
        assert batch[name].shape == (24, entries)
    assert batch["anchor_horizon"].unique().tolist() == [0, 1]
    weighed = batch["anchor_weight"].sum(1)
    assert (weighed <= batch["loss_mask"].sum(1) + 1e-3).all(), "a reply without anchors has weight 0"
    assert weighed.max() > 0


def test_eval_iters_of_0_leaves_validation_data_out(folders: list[Path]):
    """Upstream's sampler refuses a blend of 0 sequences."""
    config = dataset_config(arguments([str(folders[0])], [*map(str, folders)]))
    assert build(config, [4, 0, 0])[1:] == [None, None]


@pytest.mark.parametrize(
    ("changes", "train", "valid"),
    [
        ({}, 6 * 16, 7 * 2 * 8),  # as upstream asks for, so the order of documents is that of a run that goes through
        ({"global_batch_size": 4}, 3 * 16 + 3 * 4, 7 * 2 * 8),
        ({"eval_interval": 4}, 6 * 16, 3 * 2 * 8 + 2 * 2 * 8),
        ({"eval_iters": 1, "train_samples": 96}, 6 * 16, 3 * 2 * 8 + 4 * 8),
        (
            {"start_eval_at_iter": 5, "iteration": 0, "consumed_train_samples": 0, "consumed_valid_samples": 0},
            6 * 16,
            2 * 2 * 8,
        ),
        ({"start_eval_at_iter": 2, "consumed_valid_samples": 16}, 6 * 16, 5 * 2 * 8),
        ({"skip_train": True}, 6 * 16, 2 * 8),
    ],
)
def test_a_run_that_resumes_with_other_batches_has_sequences_left(changes: dict, train: int, valid: int):
    """At step 3 of 6. Upstream's samplers refuse to start behind the last sequence."""
    given = {
        "train_iters": 6,
        "global_batch_size": 16,
        "eval_interval": 1,
        "eval_iters": 2,
        "eval_global_batch_size": 8,
    }
    read = {"iteration": 3, "consumed_train_samples": 48, "consumed_valid_samples": 48, "train_samples": None}
    args = Namespace(**given | read | {"skip_train": False, "start_eval_at_iter": None} | changes)
    upstream = args.train_iters // args.eval_interval + 1 - (args.start_eval_at_iter or 0) // args.eval_interval
    upstream = 1 if args.skip_train else upstream
    asked = args.train_iters * args.global_batch_size, upstream * args.eval_iters * 8, args.eval_iters * 8
    assert sequences_to_read(args, asked) == [train, valid, asked[2]]
    assert sequences_to_read(args, (asked[0], None, 0)) == [train, None, 0]


def test_each_entry_has_the_target_of_its_anchor(folders: list[Path]):
    data, dataset = PreparedData.open(folders[1]), whole(folders[1])
    store = TargetStore.open(folders[1] / "targets", data)

    for place in range(len(dataset)):
        _, (index,) = dataset.conversations(place)
        anchors, item = data[int(index)].anchors, dataset[place]
        target = item["target"][item["anchor_row"]]
        n = len(anchors.position)
        assert (target[:n] == store[anchors.segment]).all()
        assert (item["anchor_position"][:n] == anchors.position).all()
        assert (item["anchor_horizon"][:n] == anchors.horizon).all()


def test_folders_with_different_horizons_are_refused(folders: list[Path], tmp_path: Path):
    other = write_prepared(tmp_path, 3)

    with pytest.raises(ValueError, match=f"{folders[0]} has 1:8 5:3, {other} has 1:8; .* the same --horizons"):
        dataset_config(arguments([str(folders[0])], [str(other)]))
    plain = dataset_config(arguments([str(folders[0])], [str(other)], sfr=False))
    assert plain.anchors is None


def pack(folder: Path, fill: str = "anchors_only", epochs: int = 1, ranks: int = 1) -> PreparedDataset:
    packing = {"sfr_packing": "first_fit_decreasing", "seq_length": 3 * SEQ_LENGTH, "context_parallel_size": ranks}
    dataset = whole(folder, sfr_anchors=fill, **packing)
    dataset.num_samples = epochs * len(dataset)
    return dataset


@pytest.mark.parametrize(("fill", "ranks"), [("anchors_only", 1), ("nearest", 1), ("anchors_only", 4)])
def test_a_packed_sequence_holds_its_conversations_in_order(folders: list[Path], fill: str, ranks: int):
    """Under context parallelism each is padded, and its padding belongs to it."""
    dataset, data = pack(folders[1], fill, epochs=2, ranks=ranks), PreparedData.open(folders[1])
    alone = whole(folders[1], Split.valid, sfr_anchors=fill)  # in the order of the folder
    assert len(dataset) // 2 < len(data) / 2

    seen, padding = [], 0
    for row in range(len(dataset)):
        item, (epoch, conversations) = dataset[row], dataset.conversations(row)
        seen += [(epoch, int(i)) for i in conversations]
        at = entry = 0
        for number, index in enumerate(conversations):
            single, n = alone[int(index)], data.positions[index]
            for name in ("tokens", "labels", "loss_mask", "position_ids"):
                assert (item[name][at : at + n] == single[name][:n]).all(), name
            room = n + (-n % (2 * ranks) if ranks > 1 else 0)
            assert (item["document"][at : at + room] == number).all()
            assert (item["position_ids"][at : at + room] == np.arange(room)).all()
            assert not item["loss_mask"][at + n : at + room].any()
            m = np.count_nonzero(single["anchor_weight"])
            mine = slice(entry, entry + m)
            assert (item["anchor_weight"][mine] == single["anchor_weight"][:m]).all()
            assert (item["anchor_position"][mine] - at == single["anchor_position"][:m]).all()
            assert (item["anchor_place"][mine] == single["anchor_place"][:m]).all()
            assert (item["anchor_sample"][mine] == epoch * len(data) + index).all()
            targets = (x["target"][x["anchor_row"][y]] for x, y in ((item, mine), (single, slice(m))))
            assert (next(targets) == next(targets)).all()
            at, entry, padding = at + room, entry + m, padding + room - n
        assert (item["document"][at:] == len(conversations)).all()
        assert not item["loss_mask"][at:].any()
        assert not item["anchor_weight"][entry:].any()
    assert sorted(seen) == [(epoch, i) for epoch in (0, 1) for i in range(len(data))]
    assert (padding > 0) == (ranks > 1)


def test_packed_sequences_of_folders_are_collated(folders: list[Path]):
    blend = ["0.5", str(folders[0]), "0.5", str(folders[1])]
    config = dataset_config(arguments(blend, sfr_packing="first_fit_decreasing"))
    train, _, _ = build(config, [12, 0, 0])

    batch = default_collate([train[i] for i in range(12)])
    assert batch["document"].shape == (12, SEQ_LENGTH)
    rows = max(dataset.sizes(config.anchors.entries).targets for dataset in train.datasets)
    assert batch["target"].shape == (12, rows, 384)


def test_positions_know_the_group_of_their_conversation(folders: list[Path]):
    """In a blend, in packed sequences, and in each of two validation sets; personas are ordered by their number."""
    blend = ["0.5", str(folders[0]), "0.5", str(folders[1])]
    packing = {"sfr_packing": "first_fit_decreasing", "seq_length": 3 * SEQ_LENGTH, "sfr": False}
    several = {"full_validation": True, "multiple_validation_sets": True}
    config = dataset_config(arguments(blend, [str(folder) for folder in folders], **packing, **several))
    built = build(config, [12, None, 0])

    groups = number_groups(built, multiple=True, names=["few", "many"])
    voices = [f"voice {i}" for i in range(3)]
    parts = ("", "validation-few", "validation-many")
    assert groups == [Group(part, voice) for part in parts for voice in voices]
    for part, dataset, folder in zip(parts[1:], built[1], folders, strict=True):
        data = PreparedData.open(folder)
        for i in range(len(dataset)):
            item, (_, conversations) = dataset[i], dataset.conversations(i)
            for number, index in enumerate(conversations):
                own = item["group"][item["document"] == number]
                assert {groups[group] for group in own} == {Group(part, data[int(index)].persona)}
    assert set(default_collate([built[0][i] for i in range(12)])["group"].unique().tolist()) <= {0, 1, 2}


def test_a_complete_validation_set_is_divided_evenly_without_counting_anything_twice(folders: list[Path]):
    dataset = whole(folders[0], Split.valid)
    even = EvenlyDivided(dataset, 4)

    assert (len(dataset), len(even), even.split) == (3, 4, Split.valid)
    assert (even[2]["tokens"] == dataset[2]["tokens"]).all()
    assert even[3].keys() == dataset[0].keys()
    assert not even[3]["loss_mask"].any()
    assert not even[3]["anchor_weight"].any()
    assert dataset[0]["loss_mask"].any()
