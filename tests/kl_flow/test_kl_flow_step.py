"""KL-flow's step on the datasets: noise keys of the sequences, and complete texts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.utils import Split
from torch.utils.data import default_collate

from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.kl_flow.corruption import KLFlowOptions
from megatron_sfr.kl_flow.kl_flow_step import KLFlowStep
from megatron_sfr.training.auxiliary_loss import DATASET_BITS
from megatron_sfr.training.data.conversation_dataset import PreparedDataset
from megatron_sfr.training.data.provider import build, dataset_config
from tests.distributed.tiny import SEQ_LENGTH, VOCAB_SIZE, write_documents, write_prepared
from tests.training.data.test_provider import arguments

LENGTH = SEQ_LENGTH + 2  # plus the sequence's last label and the time token
KL_FLOW = {"training_task": "kl-flow", "sfr": False, "seq_length": LENGTH}
STEP = KLFlowStep(VOCAB_SIZE, LENGTH, KLFlowOptions(), time_everywhere=False)


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("conversations"), rows=12)


def rows(folder: Path, epochs: int = 2) -> PreparedDataset:
    data = PreparedData.open(folder)
    config = dataset_config(arguments([str(folder)], **KL_FLOW))
    return PreparedDataset(data, str(folder), np.arange(len(data)), epochs * len(data), Split.train, config)


def test_a_conversation_is_keyed_by_itself_and_its_epoch(folder: Path) -> None:
    dataset = rows(folder)
    keys = [dataset[i]["sample"] for i in range(24)]
    assert sorted(keys[:12]) == list(range(12))
    assert sorted(keys[12:]) == list(range(12, 24))
    assert [key % 12 for key in keys[12:]] != keys[:12]  # reshuffled
    for i, key in enumerate(keys):
        assert torch.equal(torch.tensor(dataset[i]["tokens"][0]), torch.tensor(dataset.dataset[key % 12].tokens[0]))


def test_the_text_of_a_conversation_keeps_its_reply_and_its_end(folder: Path) -> None:
    """Each reply is free in some epoch; the end token fills the sequence after the last one."""
    dataset = rows(folder, epochs=6)
    ends, lasts = set(), 0
    for i in range(len(dataset)):
        item = dataset[i]
        texts = STEP.texts(default_collate([item]), LENGTH - 1)
        sample = dataset.dataset[item["sample"] % 12]
        tokens_N, free_N = texts.tokens_BN[0], texts.free_BN[0]
        first = int(free_N.int().argmax())
        assert free_N[first:].all()
        assert not free_N[:first].any()
        supervised = np.flatnonzero(sample.loss_mask)
        run = supervised[supervised >= first]
        end = int(run[: np.flatnonzero(np.diff(run, append=10**6) > 1)[0] + 1][-1])
        assert torch.equal(tokens_N[: end + 1], torch.tensor(np.asarray(sample.tokens[: end + 1], np.int64)))
        assert (tokens_N[end:] == tokens_N[end]).all()
        ends.add(int(tokens_N[end]))
        lasts += end == supervised[-1]
    assert len(ends) == 1  # the template's end of a turn
    assert 0 < lasts < len(dataset)


def test_conversations_longer_than_the_texts_are_refused(folder: Path) -> None:
    for time, fits in (("token", LENGTH), ("adaln", LENGTH - 1)):
        build(
            dataset_config(arguments([str(folder)], **KL_FLOW | {"kl_flow_time": time, "seq_length": fits})), [4, 0, 0]
        )
        short = arguments([str(folder)], **KL_FLOW | {"kl_flow_time": time, "seq_length": fits - 1})
        with pytest.raises(ValueError, match=f"raise seq_length to {fits}$"):
            build(dataset_config(short), [4, 0, 0])


def test_documents_are_free_and_keyed_by_their_index_in_the_run(tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "documents")
    more = {"vocab_size": VOCAB_SIZE, "eod_mask_loss": False, "mmap_bin_files": True, "data_cache_path": str(tmp_path)}
    train, _, _ = build(dataset_config(arguments([str(folder)], **KL_FLOW | more)), [20, None, None])
    assert [train[i]["sample"] for i in range(20)] == list(range(20))
    texts = STEP.texts(default_collate([train[3], train[4]]), LENGTH - 1)
    assert texts.free_BN.all()
    assert texts.tokens_BN[0].tolist() == train[3]["tokens"][: LENGTH - 1].tolist()
    assert texts.t_B.min() > 0
    assert texts.t_B.max() < 0.3


@pytest.mark.usefixtures("one_rank")
def test_the_datasets_of_a_blend_have_separate_noise(folder: Path) -> None:
    batch = default_collate([rows(folder)[0]] * 2)
    texts = STEP.texts(batch | {"dataset_id": torch.tensor([0, 1])}, LENGTH - 1)
    assert texts.sample_B.tolist() == [batch["sample"][0], batch["sample"][0] + (1 << DATASET_BITS)]
    assert texts.t_B[0] != texts.t_B[1]
    x_BNV = STEP.points(texts, 504)
    assert (x_BNV[..., VOCAB_SIZE:] == 0).all()
    assert (x_BNV[0] != x_BNV[1]).any()


def test_their_loss_counts_given_positions_too(folder: Path) -> None:
    theirs = KLFlowStep(VOCAB_SIZE, LENGTH, KLFlowOptions(loss="all"), time_everywhere=False)
    batch = default_collate([rows(folder)[i] for i in range(3)])
    ours, all_of_them = (step.texts(batch, LENGTH - 1) for step in (STEP, theirs))
    assert torch.equal(ours.free_BN, all_of_them.free_BN)
    assert ours.counted_BN is ours.free_BN
    assert not ours.free_BN.all()
    assert all_of_them.counted_BN.all()
    nothing = batch | {"loss_mask": torch.zeros_like(batch["loss_mask"])}
    assert not theirs.texts(nothing, LENGTH - 1).counted_BN.any()
