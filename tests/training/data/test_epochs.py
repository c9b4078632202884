"""`train_epochs`: steps from the prepared folders, alone, packed and in blends; and that upstream's datasets agree."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_sfr.cli import main
from megatron_sfr.config.resume import DATA, changed_data
from megatron_sfr.config.settings import read_settings
from megatron_sfr.data.prepare.document_source import DocumentOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.data.prepared.documents import PreparedDocuments
from megatron_sfr.launch import read_run
from megatron_sfr.training.data.epochs import describe, read_epoch, sequences_of, train_iters_of
from megatron_sfr.training.data.provider import build, dataset_config
from tests.distributed.tiny import SEQ_LENGTH, write_prepared, write_recipe
from tests.training.data.test_document_dataset import document_arguments
from tests.training.data.test_provider import arguments

PACKED = {"sfr_packing": "first_fit_decreasing", "seq_length": 3 * SEQ_LENGTH}


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("epochs")
    return [write_prepared(folder / str(rows), rows) for rows in (4, 10)]


@pytest.fixture(scope="module")
def documents(folders: list[Path]) -> Path:
    rows = folders[0].parent / "texts.jsonl"
    rows.write_text("".join(json.dumps({"text": f"sea {i} " * 20}) + "\n" for i in range(9)))
    options = DocumentOptions(stride=3, horizons=((1, 8),), min_segment_length=2)
    prepare([rows], rows.parent / "documents", folders[0].parent / "tokenizer", options, progress=False)
    return rows.parent / "documents"


def options(*blend: Any, epochs: Any = 2, **changes: Any) -> dict[str, Any]:
    return {
        "train_data_path": [str(part) for part in blend],
        "train_epochs": epochs,
        "seq_length": SEQ_LENGTH,
        "global_batch_size": 4,
    } | changes


def test_the_length_of_a_run_decides_the_order_of_documents_that_it_repeats(documents: Path) -> None:
    epoch = read_epoch(options(documents))
    assert epoch is not None
    n = epoch.total

    def order(samples: int) -> list[list[int]]:
        plan = document_arguments(documents, sfr=False, seq_length=SEQ_LENGTH)
        train, _, _ = build(dataset_config(plan), [samples, None, None])
        return [train[i]["tokens"].tolist() for i in range(n)]

    for now, then, changed in ((n, 1, False), (n + 1, n, True), (2 * n, 2 * n, False), (3 * n, 2 * n, True)):
        assert (order(now) != order(then)) is changed
        given = dict.fromkeys(DATA) | options(documents)
        line = changed_data(Namespace(**given, train_samples=now), given | {"train_samples": then})
        said = f"train_samples is {now} (in the checkpoint {then}): sequences that were read before may be read again"
        assert (line is not None and line.startswith(said)) is changed
    halved = given | {"train_iters": 2 * n, "global_batch_size": 2, "train_samples": None}
    stored = given | {"train_iters": n, "global_batch_size": 4, "train_samples": None, "consumed_train_samples": 2 * n}
    line = changed_data(Namespace(**halved), stored)  # 4 n sequences in both, but 2 n + 3 n / 2 * 2 are read
    assert line is not None
    assert "global_batch_size is 2 (in the checkpoint 4)" in line


def test_an_epoch_is_what_upstreams_dataset_has(folders: list[Path], documents: Path) -> None:
    sizes = []
    for changes in ({}, {"context_parallel_size": 20}, PACKED, PACKED | {"context_parallel_size": 20}):
        train, _, _ = build(dataset_config(arguments([str(folders[1])], sfr=False, **changes)), [None, None, None])
        epoch = read_epoch(options(folders[1], **changes))
        assert epoch is not None
        assert epoch.total == len(train)
        sizes.append(epoch.total)
    assert sizes[0] == sizes[1] == 10
    assert sizes[2] < sizes[3] < 10, "20 ranks pad conversations to multiples of 40 tokens"
    plan = document_arguments(documents, sfr=False, split="60/30/10", data_path=[str(documents)], train_data_path=None)
    train, _, _ = build(dataset_config(plan), [None, None, None])
    epoch = read_epoch({"data_path": [str(documents)], "split": "60/30/10", "seq_length": plan.megatron.seq_length})
    assert epoch is not None
    assert epoch.total == len(train) > 1


def test_steps_follow_from_epochs_alone_and_in_blends(folders: list[Path]) -> None:
    a, b = folders
    assert train_iters_of(options(a)) == 2
    assert train_iters_of(options(a, epochs=2.1)) == 3
    assert train_iters_of(options(a, b)) == 7
    assert train_iters_of(options(0.5, a, 0.5, b)) == 7
    assert train_iters_of(options(a, epochs=None)) is None
    assert train_iters_of(options(a, train_iters=2)) == 2, "a saved recipe has both"
    packed = sequences_of(b, 3 * SEQ_LENGTH, packed=True)
    assert packed < 10
    assert train_iters_of(options(b, epochs=8, **PACKED)) == 2 * packed
    line = describe(options(0.5, a, 0.5, b, train_iters=7))
    assert line == f"an epoch is 3.5 steps (14 sequences), the run 2.00 epochs: {a} 3.50 times, {b} 1.40 times"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train_iters": 5}, "is 2 steps of this data, train_iters = 5: set one"),
        ({"train_samples": 5}, "cannot be combined with train_samples"),
        ({"global_batch_size": None}, "needs global_batch_size"),
        ({"train_data_path": None}, "needs the training data by path"),
        ({"train_epochs": 0}, "give a number above 0"),
        ({"train_epochs": "two"}, "give a number above 0"),
        ({"context_parallel_size": "two"}, "context_parallel_size = two: give a whole number"),
        ({"context_parallel_size": -1}, "context_parallel_size = -1: give at least 1"),
        ({"seq_length": None}, "seq_length = None: give a whole number"),
        ({"seq_length": 0, "sfr_packing": "first_fit_decreasing"}, "seq_length = 0: give at least 1"),
        ({"context_parallel_size": 3}, "seq_length = 80: set a multiple of 6, twice context_parallel_size"),
        ({"train_data_path": None, "data_path": "x", "split": "0,0,0"}, "split = 0,0,0: give the shares of training"),
        ({"train_data_path": None, "data_path": "x", "split": "1.2.3"}, "split = 1.2.3: give the shares of training"),
        ({"train_data_path": [0, "x", 0, "y"]}, "the weights 0, 0: give numbers of at least 0, not all 0"),
        ({"train_data_path": [-1, "x", 2, "y"]}, "the weights -1, 2: give numbers of at least 0, not all 0"),
        ({"train_data_path": ["nowhere"]}, "nowhere does not exist; run: megatron-sfr prepare"),
    ],
)
def test_what_does_not_say_a_length_is_refused(folders: list[Path], changes: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        train_iters_of(options(folders[0]) | changes)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("by_split", [False, True])
def test_a_blend_without_weights_is_repeated_for_more_than_an_epoch(
    folders: list[Path], part: int, by_split: bool
) -> None:
    """Of training, and of validation, where a run evaluates often. by_split: data_path is divided."""
    blend = [str(folder) for folder in folders]
    given = {"train_data_path": None, "data_path": blend, "split": "50,50,0"}
    plan = arguments(blend, None if by_split else blend, sfr=False, **given if by_split else {})
    asked: list[int | None] = [7, 7, 0]
    asked[part] = 42
    dataset = build(dataset_config(plan), asked)[part]
    assert len(dataset) == 42
    seen = [0, 0]
    for i in range(42):
        seen[int(dataset[i]["dataset_id"])] += 1
    assert seen == [12, 30]


def test_recipe_flags_and_launcher_agree(folders: list[Path], tmp_path: Path) -> None:
    changes = {"train_epochs": 3, "train_iters": None, "save": str(tmp_path / "run")}
    path = write_recipe(tmp_path / "recipe.yaml", folders[1], **changes)
    assert read_settings(["--recipe", str(path)]).recipe["train_iters"] == 8  # 30 sequences, 4 a step
    assert read_run(path, []).train_iters == 8
    assert read_run(path, ["--train-epochs", "6"]).train_iters == 15
    packing = ["--sfr-packing", "first_fit_decreasing", "--seq-length", str(3 * SEQ_LENGTH), "--train-epochs", "40"]
    steps = [read_run(path, [*packing, "--context-parallel-size", ranks]).train_iters for ranks in ("1", "20")]
    assert (
        steps[0] < steps[1] == train_iters_of(options(folders[1], epochs=40, **PACKED | {"context_parallel_size": 20}))
    )


def test_prepare_prints_what_an_epoch_is(folders: list[Path], documents: Path, capsys: pytest.CaptureFixture) -> None:
    folder, texts = folders[1].parent, documents.parent / "texts.jsonl"
    (rows,) = folder.glob("*.jsonl")
    how = ["--tokenizer", str(folder / "tokenizer"), "--workers", "1"]
    assert main(["prepare", "--input", str(rows), "--output", str(folder / "p"), *how]) == 0
    assert "an epoch is 10 sequences, or 1 packed ones with --sfr-packing" in capsys.readouterr().out
    assert main(["prepare-text", "--input", str(texts), "--output", str(folder / "t"), *how]) == 0
    tokens = PreparedDocuments.open(folder / "t").manifest.tokens
    assert f"an epoch is {(tokens - 1) // 4096} sequences at seq_length 4,096" in capsys.readouterr().out
