"""flow-generate on a checkpoint of KL-flow training: equal texts from one process and two, and films."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sfr.cli import main
from megatron_sfr.cli.evaluation.flow_generate import start
from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.demo.train_tokenizer import train_tokenizer
from megatron_sfr.kl_flow.flow_generate import Job, plan
from tests import warm
from tests.distributed.launch import train
from tests.distributed.tiny import recipe, write_corpus
from tests.kl_flow import generation_program

pytestmark = pytest.mark.distributed
POSITIONS = 83  # of 84; the time's token takes one
GAPS = [
    {"prefix": "red green", "suffix": " quick slow", "length": 6},
    {"prefix": "river", "length": 9},
    {"suffix": "cloud", "length": 3},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training steps, with time as a token and by adaln. Logits are almost uniform, so noise decides the text."""
    folder = tmp_path_factory.mktemp("kl-flow")
    corpus = write_corpus(folder)
    train_tokenizer([corpus.read_text(encoding="utf-8")], 500).save_pretrained(folder / "tokenizer")
    prepare([corpus], folder / "prepared", folder / "tokenizer", PrepareOptions(seq_length=80), progress=False)
    given = recipe(folder / "prepared")
    plain = {key: value for key, value in given.items() if not key.startswith(("sfr", "loss_chunk"))}
    plain |= {"training_task": "kl-flow", "train_iters": 2, "save": str(folder / "run")}
    plain |= {"seq_length": POSITIONS + 1, "max_position_embeddings": POSITIONS + 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    token = ["--recipe", str(folder / "recipe.yaml")]
    train(1, *token)
    train(1, *token, "--save", str(folder / "adaln"), "--kl-flow-time", "adaln", "--normalization", "LayerNorm")
    (folder / "gaps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GAPS), encoding="utf-8")
    prompts = [{"prompt": "green stone", "persona": "voice 1"}, {"prompt": "song"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    return folder


def job(folder: Path, output: str, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = dict.fromkeys(Job.__annotations__)
    arguments |= {"checkpoint": str(folder / "run"), "tokenizer": str(folder / "tokenizer"), "backend": "cpu"}
    arguments |= {"nproc": 1, "samples": 3, "batch_size": 4, "method": "hybrid", "top_k": 0, "final_top_k": 0}
    arguments |= {"temperature": 1.0, "seed": 5, "output": str(folder / output)}
    return arguments | changes


def jobs(folder: Path, name: str, **changes: Any) -> list[dict[str, Any]]:
    gaps, prompts = str(folder / "gaps.jsonl"), str(folder / "prompts.jsonl")
    return [
        job(folder, f"{name}-blank.jsonl", method="basic", steps=7, length=20, **changes),
        job(folder, f"{name}-reply.jsonl", prompts=prompts, steps=7, top_k=9, max_new_tokens=11, **changes),
        job(folder, f"{name}-gap.jsonl", infill=gaps, method="sampling", film=str(folder / f"{name}.json"), **changes),
        job(folder, f"{name}-adaln.jsonl", checkpoint=str(folder / "adaln"), steps=16, **changes),
    ]


def do(folder: Path, nproc: int, listing: list[dict[str, Any]]) -> None:
    path = folder / f"jobs-{nproc}.json"
    path.write_text(json.dumps(listing), encoding="utf-8")
    warm.run(str(Path(generation_program.__file__)), str(path), ranks=nproc, check=True)


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    """Every job on one process and on two; one is interrupted and resumed."""
    reply = jobs(folder, "one")[1]
    do(folder, 1, [*jobs(folder, "one"), reply | {"output": str(folder / "cut.jsonl"), "batch_size": 2}])
    do(folder, 2, jobs(folder, "two", nproc=2))
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("what", ["blank", "reply", "gap", "adaln"])
def test_two_processes_write_what_one_writes(made: Path, what: str) -> None:
    one, two = rows(made / f"one-{what}.jsonl"), rows(made / f"two-{what}.jsonl")
    assert one == two
    assert len({tuple(row["token_ids"]) for row in one}) == len(one)


def test_records_contain_the_request_and_the_sampling_options(made: Path) -> None:
    blank, reply, gap = (rows(made / f"one-{what}.jsonl") for what in ("blank", "reply", "gap"))
    assert [(row["sample"], row["tokens"], row["method"], row["steps"]) for row in blank] == [
        (sample, 20, "basic", 7) for sample in range(3)
    ]
    assert [(row["question"], row["persona"]) for row in reply] == [("green stone", "voice 1")] * 3 + [
        ("song", None)
    ] * 3
    assert all(row["tokens"] == len(row["token_ids"]) <= 11 for row in reply)
    shown = {(row["prefix"], row["suffix"], row["tokens"], row["steps"]) for row in gap}
    assert shown == {("red green", " quick slow", 6, 6), ("river", "", 9, 9), ("", "cloud", 3, 3)}
    assert len(gap) == 9


def test_without_a_time_token_a_text_has_all_positions(made: Path) -> None:
    assert [row["tokens"] for row in rows(made / "one-adaln.jsonl")] == [POSITIONS + 1] * 3


def test_a_film_ends_with_the_sample(made: Path) -> None:
    first = next(row for row in rows(made / "one-gap.jsonl") if row["tokens"] == 6 and row["sample"] == 0)
    one, two = (json.loads((made / f"{name}.json").read_text(encoding="utf-8")) for name in ("one", "two"))
    assert one == two
    assert one["frames"][-1]["tokens"] == first["token_ids"]
    assert [frame["step"] for frame in one["frames"]] == list(range(7))


def test_the_command_writes_the_same_samples_in_other_batches_and_a_film(
    made: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = made / "command.jsonl"
    arguments = [
        *("flow-generate", "--checkpoint", str(made / "run"), "--tokenizer", str(made / "tokenizer")),
        *("--prompts", str(made / "prompts.jsonl"), "--output", str(output), "--samples", "3", "--batch-size", "2"),
        *("--steps", "7", "--top-k", "9", "--final-top-k", "0", "--max-new-tokens", "11", "--seed", "5"),
        *("--backend", "cpu", "--film", str(made / "film.html")),
    ]
    assert main(arguments) == 0
    one = rows(made / "one-reply.jsonl")
    assert rows(output) == one
    page = (made / "film.html").read_text(encoding="utf-8")
    assert json.loads(re.findall(r'id="film">(.*?)</script>', page)[0])["frames"][-1]["step"] == 7
    said = capfd.readouterr()
    assert "6 samples" in said.out
    assert "--method hybrid with 7 steps is basic" in said.err


def test_an_interrupted_job_resumes(made: Path) -> None:
    first, *others = rows(made / "cut.jsonl")
    assert first["seed"] == "of the first run"
    assert others == rows(made / "one-reply.jsonl")[1:]


def test_a_failure_in_a_worker_process_is_reported_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*nowhere: no checkpoint here[^\n]*$"):
        start(Job(**job(folder, "unwritten.jsonl", checkpoint=str(tmp_path / "nowhere"))), tmp_path / "log")


REFUSED = {
    "no checkpoint here": {"checkpoint": "{folder}/prepared"},
    "no tokenizer that can be read at": {"tokenizer": "{folder}/prepared"},
    "--nproc 3 does not divide": {"nproc": 3},
    "samples is 0": {"samples": 0},
    "--length 84 is more than the 83 positions": {"length": 84},
    "steps is 0": {"steps": 0},
    "none are left for the reply": {"prompt": "green " * 90},
    "gaps.jsonl:2: not an infill record": {"infill": "{folder}/bad/gaps.jsonl"},
}


@pytest.mark.parametrize("words", REFUSED)
def test_requests_that_do_not_fit_are_refused_before_a_process_starts(folder: Path, words: str) -> None:
    (folder / "bad").mkdir(exist_ok=True)
    good = json.dumps(GAPS[0])
    (folder / "bad" / "gaps.jsonl").write_text(f'{good}\n{{"text": "a <mask> b"}}\n', encoding="utf-8")
    changes = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in REFUSED[words].items()}
    with pytest.raises(ValueError, match=re.escape(words)):
        plan(Job(**job(folder, "unwritten.jsonl", **changes)))
