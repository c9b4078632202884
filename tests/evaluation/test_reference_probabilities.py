"""`megatron-sfr reference`: what it stores is the model's distribution at each supervised token, and is kept whole.

Shapes: T supervised tokens of a conversation, V vocabulary, K stored tokens, S positions of a sequence.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_sfr.cli import main
from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.prepared.reference_store import DTYPES, ReferenceStore, check_references
from megatron_sfr.evaluation import conversation_logits, reference_probabilities
from megatron_sfr.evaluation.generate.transformers_engine import Model
from megatron_sfr.evaluation.reference_probabilities import ReferenceOptions, most_likely, write_reference
from megatron_sfr.objectives.anchored.reference import merged_log_softmax
from tests.data.stores import flip
from tests.evaluation.conftest import prepare_conversations

CHATS = 12


@pytest.fixture
def prepared(chats: Path, tmp_path: Path) -> Path:
    """A copy for a test to write in."""
    return Path(shutil.copytree(chats, tmp_path / "prepared"))


@torch.inference_mode()
def logits_of(model: Model, data: PreparedData, index: int) -> Tensor:
    """Logits [T, V] at the supervised tokens of a conversation, read whole and on its own."""
    sample = data[index]
    tokens, wanted = torch.from_numpy(sample.tokens).long(), torch.from_numpy(sample.loss_mask[1:]) > 0
    return model.network(input_ids=tokens[None, :-1]).logits[0, wanted]


def write(model: Model, tiny_model: Path, data: PreparedData, store: str = "reference", **changes: Any) -> Path:
    given = {"top_k": 5, "batch_size": 3} | {name: changes.pop(name) for name in ("top_k",) if name in changes}
    options = ReferenceOptions(**given)
    write_reference(model, tiny_model, data, data.folder / store, options, progress=False, **changes)
    return data.folder / store


def test_it_holds_the_models_distribution_at_each_supervised_token(
    model: Model, tiny_model: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several blocks, batches, and blocks of positions; in a sequence of two conversations."""
    data = PreparedData.open(prepared)
    monkeypatch.setattr(reference_probabilities, "BLOCK", 2)
    monkeypatch.setattr(conversation_logits, "LOGITS", 3 * 40 * conversation_logits.vocabulary_of(model))
    store = ReferenceStore.open(write(model, tiny_model, data), data)
    store.check()
    store.verify()

    pairs = [(i, (i + 5) % CHATS) for i in range(CHATS)]
    for pair in pairs:
        masks = [data[i].loss_mask[1:] for i in pair]
        loss_mask_S = np.concatenate([*masks, np.zeros(7)]).astype(np.float32)
        token_SK, log_p_SN = store.arrays(pair, loss_mask_S)
        known = loss_mask_S > 0
        z_TV = torch.cat([logits_of(model, data, i) for i in pair])
        token_TK, log_p_TN = torch.from_numpy(token_SK[known]).long(), torch.from_numpy(log_p_SN[known])
        torch.testing.assert_close(log_p_TN, merged_log_softmax(z_TV, token_TK), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(log_p_TN[:, :-1], z_TV.log_softmax(-1).topk(5).values, rtol=1e-4, atol=1e-5)
        assert not token_SK[~known].any()
        assert not log_p_SN[~known].any()
    assert store.manifest.supervised_tokens == sum(int(data[i].loss_mask[1:].sum()) for i in range(CHATS))


def test_a_run_that_was_stopped_resumes_and_writes_the_same_bytes(
    model: Model, tiny_model: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = PreparedData.open(prepared)
    monkeypatch.setattr(reference_probabilities, "BLOCK", 1)
    whole = write(model, tiny_model, data, "whole")
    calls: list[int] = []

    def stops_in_the_third_batch(z_TV: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return most_likely(z_TV, top_k)

    monkeypatch.setattr(reference_probabilities, "most_likely", stops_in_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        write(model, tiny_model, data, "resumed")
    resumed = write(model, tiny_model, data, "resumed")
    assert len(calls) == 3 + CHATS // 3 - 2  # two batches were kept
    for name in (*DTYPES, "manifest.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_all_tokens_leave_no_rest() -> None:
    z_TV = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    token_TK, log_p_TN = most_likely(z_TV, 6)
    assert (log_p_TN[:, -1] == -torch.inf).all()
    torch.testing.assert_close(log_p_TN[:, :-1], z_TV.log_softmax(-1).gather(1, token_TK.long()))
    z_TV[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        most_likely(z_TV, 2)


def test_the_command_and_what_it_refuses(tiny_model: Path, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["reference", "--model", str(tiny_model), "--data", str(prepared), "--device", "cpu"]

    def refused(*words: str) -> str:
        assert main([*base, *words]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        return line

    data = PreparedData.open(prepared)
    vocabulary, supervised = data.manifest.vocab_size, sum(int(data[i].loss_mask[1:].sum()) for i in range(CHATS))
    said = f"the 4 most likely of {vocabulary:,} tokens by {tiny_model}, at each of {supervised:,} supervised tokens"
    for _ in range(2):  # the second time it is up to date
        assert main([*base, "--top-k", "4"]) == 0
        assert said in capsys.readouterr().out
    assert main(["inspect", "--verify", "--data", str(prepared)]) == 0
    assert f"{prepared / 'reference'}: every probability is as it was written" in capsys.readouterr().out
    assert "made with other values of top_k; choose another --output, or --force" in refused("--top-k", "6")
    assert "top_k is 0; give at least 1" in refused("--top-k", "0")
    assert f"top_k is 9999, and {tiny_model} has {vocabulary} tokens" in refused("--top-k", "9999")
    assert "is not a reference store" in refused("--output", str(tiny_model))
    with pytest.raises(ValueError, match=f"over {vocabulary} tokens, and vocab_size is 7"):
        check_references([prepared], "reference", 7)
    with pytest.raises(ValueError, match=r"nowhere does not exist; run: megatron-sfr reference --data .* --model"):
        check_references([prepared], "nowhere", vocabulary)
    flip(prepared / "reference" / "log_p.bin", 9)
    assert main(["inspect", "--verify", "--data", str(prepared)]) == 2
    said = capsys.readouterr().err
    assert "log_p.bin is not what was written" in said
    assert f"; run: megatron-sfr reference --data {prepared} --model {tiny_model} --top-k 4 --force" in said


@pytest.mark.parametrize(("name", "value", "why"), [("token.bin", -5, "out of range"), ("log_p.bin", 2, "is above 1")])
def test_damage_that_was_not_in_the_compared_checksums_is_found_where_it_is_read(
    model: Model, tiny_model: Path, prepared: Path, name: str, value: int, why: str
) -> None:
    data = PreparedData.open(prepared)
    path = write(model, tiny_model, data) / name
    numbers = np.fromfile(path, DTYPES[name])
    numbers[0] = value
    numbers.tofile(path)
    store = ReferenceStore.open(path.parent, data)
    with pytest.raises(ValueError, match=f"{name} is damaged: .*{why}; run: megatron-sfr reference"):
        store.arrays([0], data[0].loss_mask[1:])


def test_a_store_of_other_conversations_or_another_model_is_refused(
    model: Model, tiny_model: Path, prepared: Path, tmp_path: Path
) -> None:
    data = PreparedData.open(prepared)
    write(model, tiny_model, data)
    (tmp_path / "fewer").mkdir()
    folder = prepare_conversations(tmp_path / "fewer", tiny_model, PrepareOptions(seq_length=400), CHATS - 1)
    fewer = PreparedData.open(folder)
    shutil.copytree(prepared / "reference", folder / "reference")
    with pytest.raises(ValueError, match=r"is stale: .* other conversations, or another tokenizer"):
        ReferenceStore.open(folder / "reference", fewer)
    write(model, tiny_model, fewer, top_k=4, force=True)
    with pytest.raises(ValueError, match="different models or numbers of tokens"):
        check_references([prepared, folder], "reference", data.manifest.vocab_size)
