"""A run's checks of its prepared folders before the first step: token ids, damage, the ends of replies."""

import json
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_sfr.config.build import other_tokenizer, unknown_end
from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.data.prepared.open import open_prepared
from megatron_sfr.training.data.prepared_check import (
    check_prepared,
    check_vocabulary,
    data_warnings,
    flow_targets,
    max_token_id,
    reply_end_tokens,
)
from megatron_sfr.training.data.provider import dataset_config
from tests import warm
from tests.data.stores import flip
from tests.distributed.tiny import write_documents, write_prepared, write_recipe
from tests.training.data.test_provider import arguments

NEW = ("max_token_id", "reply_end_tokens", "corpus_files")


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("conversations"), rows=6)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "texts", documents=6)


def run(*folders: Path, vocab_size: int, **changes: object) -> Namespace:
    return arguments([str(folder) for folder in folders], vocab_size=vocab_size, **changes).megatron


def of_an_earlier_release(folder: Path) -> Path:
    """The folder without the manifest fields that earlier releases did not write."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in manifest.items() if key not in NEW}))
    return folder


def test_the_manifest_records_the_largest_id(conversations: Path, documents: Path) -> None:
    data, texts = open_prepared(conversations), open_prepared(documents)
    assert data.manifest.max_token_id == max(int(data[i].tokens.max()) for i in range(len(data)))
    tokens = np.fromfile(documents / "documents.bin", np.uint16)
    assert texts.manifest.max_token_id == tokens.max()


def test_ids_beyond_the_vocabulary_are_refused_in_any_folder(conversations: Path, documents: Path) -> None:
    for folder in (conversations, documents):
        most = max_token_id(open_prepared(folder))
        check_prepared(run(folder, vocab_size=most + 1))
        message = f"{folder} has token ids up to {most}, and vocab_size is {most}: set vocab_size to the model's"
        with pytest.raises(ValueError, match=message):
            check_prepared(run(folder, vocab_size=most))
    with pytest.raises(ValueError, match=f"{documents} has token ids up to"):  # also in validation data and in a blend
        check_prepared(run(conversations, vocab_size=9, train_data_path=None, valid_data_path=[str(documents)]))
    most = max_token_id(open_prepared(conversations))
    with pytest.raises(ValueError, match=f"{conversations} has token ids up to {most}"):
        check_prepared(run(vocab_size=most, train_data_path=None, data_path=["1.0", str(conversations)]))


def test_damage_is_refused(tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path, rows=6)
    flip(prepared / "mask.bin", 9)
    with pytest.raises(ValueError, match=r"mask\.bin is not what was written .*; run: megatron-sfr prepare"):
        check_prepared(run(prepared, vocab_size=600))


def test_folders_of_earlier_releases_are_read_and_refused_too(tmp_path: Path, documents: Path) -> None:
    for folder in (write_prepared(tmp_path / "chat", rows=6), documents):
        most = max_token_id(open_prepared(folder))
        old = open_prepared(of_an_earlier_release(folder))
        assert old.manifest.max_token_id is None
        assert max_token_id(old) == most
        check_vocabulary(old, most + 1)
        with pytest.raises(ValueError, match=f"token ids up to {most}"):
            check_vocabulary(old, most)


def test_the_token_that_ends_replies_is_known(conversations: Path, documents: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(conversations.parent / "tokenizer"))
    assert reply_end_tokens(run(conversations, vocab_size=600)) == [tokenizer.eos_token_id]
    assert reply_end_tokens(run(documents, vocab_size=600)) == []
    assert reply_end_tokens(run(of_an_earlier_release(write_prepared(tmp_path / "c", rows=3)), vocab_size=600)) == []


def test_a_run_warns_of_a_start_that_does_not_stop_where_replies_end(tmp_path: Path) -> None:
    def warning(eos: object, **start: str) -> str | None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        paths = {"sfr_hf_load": None, "lora_base": None, "pretrained_checkpoint": None, "load": None} | start
        return unknown_end(Namespace(reply_end_tokens=[310], **paths))

    for name in ("sfr_hf_load", "lora_base", "pretrained_checkpoint", "load"):
        assert warning([2, 310], **{name: str(tmp_path)}) is None
        found = warning(2, **{name: str(tmp_path)})
        assert found is not None
        assert f"the replies of the data end on token 310, and {tmp_path} stops at 2 alone" in found
    assert warning(2) is None, "a run from scratch"


def test_a_run_warns_of_data_of_another_tokenizer_than_the_model_has(conversations: Path, tmp_path: Path) -> None:
    theirs = conversations.parent / "tokenizer"
    args = run(conversations, vocab_size=600)
    args.lora_base = args.pretrained_checkpoint = args.load = None
    for name, change, known in (("same", {}, True), ("other", {"vocab": {"a": 0}}, False), ("none", None, True)):
        model = tmp_path / name
        model.mkdir()
        if change is not None:
            content = json.loads((theirs / "tokenizer.json").read_text())
            content["model"] |= change
            content["added_tokens"] = []  # a chat model has more of them than its base
            (model / "tokenizer.json").write_text(json.dumps(content))
        args.sfr_hf_load = str(model)
        said = f"{conversations} was prepared with the tokenizer in {theirs}, whose vocabulary is not that of {model}"
        assert other_tokenizer(args) == (None if known else said)
    args.sfr_hf_load = None
    assert other_tokenizer(args) is None


def test_a_run_refuses_foreign_ids_before_its_first_step(tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path / "data", rows=6)
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, save=str(tmp_path / "run"), train_iters=1, sfr=False)
    command = ("-m", "megatron_sfr.train", "--recipe", str(recipe), "--num-workers", "2")
    done = warm.run(*command, "--vocab-size", "300", ranks=1)
    assert done.returncode == 2
    assert f"megatron-sfr train: error: {prepared} has token ids up to" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_asft_is_refused_on_documents(documents: Path) -> None:
    plan = replace(arguments([str(documents)], sfr=False), reference_store="reference")
    with pytest.raises(ValueError, match=r"objective asft is for conversations: .* choose another objective"):
        dataset_config(plan)


def changed_copy(folder: Path, to: Path, part: str = ".", **values: object) -> Path:
    """A copy of a prepared folder with other values in the manifest of it or of a store in it."""
    shutil.copytree(folder, to)
    path = to / part / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return to


def test_a_run_warns_of_validation_data_that_it_trains_on_and_of_two_tokenizers(
    conversations: Path, documents: Path, tmp_path: Path
) -> None:
    copy = changed_copy(conversations, tmp_path / "copy")
    assert data_warnings(run(conversations, vocab_size=600)) == []
    assert data_warnings(run(conversations, vocab_size=600, valid_data_path=["1", str(copy)])) == [
        f"{copy} is training and validation data: its loss says nothing about other text"
    ]
    assert len(data_warnings(run(documents, vocab_size=600, valid_data_path=[str(documents)]))) == 1
    other = changed_copy(conversations, tmp_path / "other", tokenizer_sha256="0" * 64)
    (found,) = data_warnings(run(conversations, other, vocab_size=600))
    assert found.endswith("were prepared with different tokenizers or chat templates")


def test_what_the_targets_are_is_known_before_the_first_step(conversations: Path, tmp_path: Path) -> None:
    args = run(conversations, vocab_size=1000)
    args.sfr, args.sfr_targets, args.sfr_target_store = True, "stored", "targets"
    found = flow_targets(args)
    assert found is not None
    assert {"encoder", "pooling", "prompt", "horizons", "segments"} < found.keys()
    assert (found["pooling"], len(found["encoder"])) == ("mean", 64)
    other = changed_copy(conversations, tmp_path / "other", "targets", encoder_sha256="0" * 64, pooling="cls")
    both = run(conversations, other, vocab_size=1000)
    both.sfr, both.sfr_targets, both.sfr_target_store = True, "stored", "targets"
    with pytest.raises(ValueError, match=f"{other}/targets was made with other values of encoder, pooling than"):
        flow_targets(both)
    args.sfr_target_store = "others"
    with pytest.raises(ValueError, match="others does not exist; run: megatron-sfr embed"):
        flow_targets(args)
    args.sfr = False
    assert flow_targets(args) is None
