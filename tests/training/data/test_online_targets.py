"""Online targets of several folders: one shared encoder, and the targets that a blend needs."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from megatron_sfr.data.prepared.open import open_prepared
from megatron_sfr.data.targets.embed import EmbedOptions, embed
from megatron_sfr.data.targets.store import TargetStore
from megatron_sfr.runtime.cpu import CudaMeansCpu
from megatron_sfr.training.data.online_targets import OnlineTargets, needs_of
from megatron_sfr.training.data.provider import build, dataset_config
from tests.distributed.tiny import write_prepared
from tests.training.data.test_provider import arguments

STORES = {"coarse": EmbedOptions(block_rows=64), "fine": EmbedOptions(block_rows=8), "cls": EmbedOptions(pooling="cls")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("online")
    return [write_prepared(folder / str(rows), rows) for rows in (3, 9)]


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(
        "megatron_sfr.training.data.online_targets.device", lambda: torch.device("cpu")
    )  # no backend is started here


def begin(folders: list[Path], *kinds: str) -> None:
    """A store named `later` in each folder, to be filled."""
    for folder, kind in zip(folders, kinds, strict=True):
        shutil.rmtree(folder / "later", ignore_errors=True)
        embed(folder, "minilm", STORES[kind], output=folder / "later", later=True, progress=False)


def test_stores_with_different_block_sizes_share_an_encoder(folders: list[Path], one_rank: None) -> None:
    begin(folders, "coarse", "fine")
    online = OnlineTargets(folders, "later", lookahead=0, encoder_device="cpu", threads=1)
    try:
        rows = np.array([[0, 2, -1], [1, 0, 3]])
        target, waited = online.targets(torch.tensor([0, 1]), torch.from_numpy(rows), training=True)
    finally:
        online.close()
    assert waited > 0
    assert not target[0, 2].any()
    for store, row_R, actual in zip(folders, rows, target, strict=True):
        stored = TargetStore.open(store / "targets", open_prepared(store))
        there = row_R >= 0
        np.testing.assert_allclose(
            actual.numpy()[there], stored[row_R[there]], atol=2e-3
        )  # other block sizes change rounding


class Pinned(TorchFunctionMode):
    """Records for each torch.zeros call whether it requests pinned memory."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.zeros:
            self.asked.append(bool((kwargs or {}).get("pin_memory")))
        return func(*args, **(kwargs or {}))


def test_targets_for_a_gpu_are_read_into_pinned_memory(
    folders: list[Path], one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_sfr.training.data.online_targets.device", lambda: torch.device("cuda"))
    online = OnlineTargets(folders, "targets", lookahead=0, encoder_device="cpu", threads=1)
    try:
        with CudaMeansCpu(), Pinned() as pinned:
            target, _ = online.targets(torch.tensor([0]), torch.tensor([[0, -1]]), training=True)
    finally:
        online.close()
    assert target[0, 0].any()
    assert pinned.asked == [True, True]


def test_stores_of_other_encoders_are_refused(folders: list[Path], one_rank: None) -> None:
    begin(folders, "coarse", "cls")
    with pytest.raises(ValueError, match="differ in pooling: online targets have one encoder"):
        OnlineTargets(folders, "later", lookahead=0, encoder_device="cpu", threads=1)


@pytest.mark.parametrize("packing", ["none", "first_fit_decreasing"])
def test_needs_are_the_targets_that_items_read(folders: list[Path], packing: str) -> None:
    blend = ["0.5", str(folders[0]), "0.5", str(folders[1])]
    config = dataset_config(arguments(blend, sfr_targets="online", sfr_packing=packing))
    train, _, _ = build(config, [16, None, None])

    needs, numbers = needs_of(train, range(16)), set()
    for i, (store, rows) in enumerate(needs):
        item = train[i]
        read = item["target_row"][item["target_row"] >= 0]
        assert item["target_store"] == store
        assert (read == rows).all()
        numbers.add(store)
    assert numbers == {0, 1}
