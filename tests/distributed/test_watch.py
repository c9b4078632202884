"""`watch` beside a run that is made to collapse: a learning rate too high on four conversations."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.hf.families.family_registry import megatron_flags
from megatron_sfr.hf.hf_folder import read_config
from tests import warm
from tests.hf.models import save_model

from .launch import read_metrics, train
from .runs import Runs
from .tiny import write_conversations, write_recipe

FLAGS = ("--samples", "8", "--max-new-tokens", "12", "--encoder", "none")
STEPS, INTERVAL = 60, 15


def few_conversations(folder: Path) -> None:
    """FOLDER/prepared, FOLDER/corpus.jsonl, and FOLDER/like, a random model with the tokenizer."""
    write_conversations(folder, rows=4)
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    save_model(folder / "like", initializer_range=0.02, **ends)
    shutil.copytree(folder / "tokenizer", folder / "like", dirs_exist_ok=True)


@pytest.mark.distributed
def test_watch_shows_the_collapse_of_a_run_while_it_trains(runs: Runs, tmp_path: Path) -> None:
    """Every conversation has one reply, and at the end the model knows nothing else: all samples are equal."""
    few, run = runs.once("few", few_conversations), tmp_path / "run"
    shape = {"qk_layernorm": False} | megatron_flags(read_config(few / "like"))
    changes = {"seq_length": 80, "sfr": False, "lr": 0.02, "train_iters": STEPS, "save_interval": INTERVAL}
    write_recipe(tmp_path / "recipe.yaml", few / "prepared", **shape | changes)
    run.mkdir()
    prompts = ("--like", str(few / "like"), "--prompts", str(few / "corpus.jsonl"))
    with warm.popen("-m", "megatron_sfr.cli", "watch", str(run), *prompts, *FLAGS) as watcher:
        train(1, "--recipe", str(tmp_path / "recipe.yaml"), "--sfr-hf-load", str(few / "like"), "--save", str(run))
        watcher.wait(600)  # ends by itself, after the last step
        said, errors = watcher.communicate()
    assert watcher.returncode == 0, errors
    lines = [json.loads(line) for line in (run / "watch" / "watch.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(INTERVAL, STEPS + 1, INTERVAL)), said
    first, last = (lines[i]["scores"] for i in (0, -1))
    assert last["distinct-2"] < 0.5 * first["distinct-2"]
    assert last["self-BLEU-4"] > 0.8 > first["self-BLEU-4"] + 0.5
    page = (run / "watch" / "watch.html").read_text()
    assert "self-BLEU-4 rose from" in page
    assert "1 of 8" in page
    assert [row["step"] for row in read_metrics(run) if "lm loss" in row] == list(range(1, STEPS + 1))
    assert len(list((run / "tensorboard").glob("events.*"))) == 1  # the trainer's; those of watch are below watch/
