"""`generate` and `evaluate` from the command line to their files, on a tiny model with random weights."""

import json
import re
from pathlib import Path

import pytest

from megatron_sfr.cli import build_parser, main
from megatron_sfr.cli.engine_args import ENGINE
from megatron_sfr.cli.evaluation.evaluate import _identity
from megatron_sfr.cli.judge_args import SERVED
from megatron_sfr.cli.model_args import model_folders
from megatron_sfr.demo.world import PERSONAS, QUESTIONS, World
from megatron_sfr.evaluation.scores.metrics import METRICS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "valid.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in World().validation(QUESTIONS[::20], "seen")))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def generate(tiny_model: Path, data: Path, output: Path, *flags: str) -> list[dict]:
    fixed = ["--prompts", str(data), "--samples", "2", "--max-new-tokens", "8", "--output", str(output)]
    assert main(["generate", "--model", f"a={tiny_model}", f"b={tiny_model}", *fixed, *flags]) == 0
    return read(output)


def test_generate_writes_every_reply_of_every_model(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    rows = generate(tiny_model, data, tmp_path / "out" / "replies.jsonl")
    assert len(rows) == 2 * 3 * 9 * 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"replies.jsonl", ".replies.jsonl.identity.json"}
    assert rows[0].keys() == {
        *("model", "prompt", "question", "persona", "sample"),
        *("seed", "temperature", "text", "tokens", "logprob", "finished"),
    }
    half = len(rows) // 2
    assert [row | {"model": "b"} for row in rows[:half]] == rows[half:]  # one model under two names: the same numbers
    again = generate(tiny_model, data, tmp_path / "again.jsonl", "--batch-size", "5")
    key = ("model", "prompt", "persona", "sample")
    assert {(*(row[k] for k in key), row["text"]) for row in again} == {
        (*(row[k] for k in key), row["text"]) for row in rows
    }


def test_every_option_decides_whether_a_report_is_up_to_date(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("")
    command = ["evaluate", "--model", "a=x", "--data", str(tmp_path / "data.jsonl"), "--output", str(tmp_path)]
    args = build_parser().parse_args(command)
    others = {
        "command",
        "run",
        "model",
        "replies",
        "data",
        "output",
        "processes",
    } | {  # inputs, and what moves no number
        *("server", *ENGINE),  # in the identity of the models
        *("judge", "judge_votes", *SERVED),  # in the identity of the judge
    }
    assert set(_identity(args)["options"]) == vars(args).keys() - others  # type: ignore[call-overload]


def test_generate_answers_one_prompt_on_the_terminal(tiny_model: Path, capsys: pytest.CaptureFixture) -> None:
    model = ["--model", str(tiny_model), "--prompt", "Why?", "--persona", "poet"]
    assert main(["generate", *model, "--samples", "1", "--max-new-tokens", "5", "--temperature", "0"]) == 0
    first = capsys.readouterr().out
    assert main(["generate", *model, "--samples", "1", "--max-new-tokens", "5", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == first != ""


def test_the_path_of_a_model_may_have_an_equals_sign(tmp_path: Path) -> None:
    folder = tmp_path / "lr=1e-4"
    folder.mkdir()
    assert model_folders([str(folder), f"best={folder}"]) == {"lr=1e-4": folder, "best": folder}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--model", "a={}", "a={}", "--prompt", "x"], "is taken"),
        (["--model", "={}", "--prompt", "x"], "is taken or empty"),
        (["--model", "{}/nowhere", "--prompt", "x"], "not a Hugging Face model"),
        (["--model", "{}", "--prompts", "x.jsonl"], "--prompts needs --output"),
        (["--model", "{}", "--prompts", "x.jsonl", "--persona", "poet"], "--persona goes with --prompt"),
        (["--model", "{}", "--prompt", "x", "--samples", "0"], "samples is 0"),
    ],
)
def test_generate_names_what_is_wrong(
    tiny_model: Path, flags: list[str], reason: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["generate", *(flag.format(tiny_model) for flag in flags)]) == 2
    assert reason in capsys.readouterr().err


def test_evaluate_writes_table_numbers_and_picture(
    tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fixed = ["--data", str(data), "--samples", "3", "--max-new-tokens", "12", "--limit", "2", "--embedded", "2"]
    sweep = ["--temperatures", "1.2", "0.6", "--pairs", "4", "--output", str(tmp_path)]
    models = ["--model", f"a={tiny_model}", f"b={tiny_model}", "--processes", "2"]
    assert main(["evaluate", *models, *fixed, *sweep]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        *("evaluation.json", "report.md", "report.html", "samples.jsonl", "frontier.png"),
    }
    assert len(read(tmp_path / "samples.jsonl")) == 2 * 2 * 2 * 9 * 3
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["temperatures"] == [0.6, 1.2]
    assert found["scores"]["a"] == found["scores"]["b"]
    assert_models_are_similar(found)
    judged = {"judged context", "judged style"}
    others = {"precision", "fidelity", "coverage", "utility_k", *judged}  # need a truth, a user's scorer or a judge
    assert found["scores"]["a"].keys() == METRICS.keys() - others
    assert found["real"].keys() == found["scores"]["a"].keys()
    assert any("BLEU's tokens: sacrebleu's 13a (by the text)" in note for note in found["notes"])
    assert found["real"]["CS-SB-1"]["n"] == 2
    assert found["perplexities"]["a"].keys() == set(PERSONAS)
    gaps = [gap["estimate"]["mean"] for gap in found["gaps"]]  # one model under two names; None: noise has one style
    assert len(gaps) == 3
    assert set(gaps) <= {0, None}
    out = capsys.readouterr().out
    assert "no difference beyond noise" in out
    assert "held-out replies" in out
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "| model | temperature |" in (tmp_path / "report.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert set(re.findall(r'src="(.{14})', page)) == {"data:image/png"}  # nothing is fetched
    assert "http" not in page
    assert page.count('<details class="replies"') == 2  # prompts, each with nine personas at two temperatures
    assert page.count("<h2>Similarity of replies, temperature ") == 2
    assert page.count("<tr>") > 2 * 9 * 2
    assert main(["evaluate", *models, *fixed, *sweep]) == 0
    assert capsys.readouterr().out == f"{tmp_path} is up to date\n"
    assert_its_replies_have_the_same_scores(tmp_path, data)
    assert main(["evaluate", *models, *fixed, *sweep, "--seed", "1"]) == 2
    assert "made with other values of options.seed; choose another --output" in capsys.readouterr().err
    (tmp_path / "samples.jsonl").write_text("")
    assert main(["evaluate", *models, *fixed, *sweep]) == 2
    assert "samples.jsonl has 0 bytes instead of" in capsys.readouterr().err


def assert_models_are_similar(found: dict) -> None:
    """One model under two names: as similar to each other as each is to itself."""
    pairs = {(p["model"], p["other"], p["temperature"]): p["estimate"] for p in found["similarity"]}
    assert {(model, other) for model, other, _ in pairs} == {
        *(("a", "a"), ("a", "b"), ("b", "b"), ("a", "real replies"), ("b", "real replies"))
    }
    for t in (0.6, 1.2):
        assert pairs["a", "b", t]["mean"] == pytest.approx(pairs["a", "a", t]["mean"])
        assert pairs["a", "a", t]["mean"] == pytest.approx(1 - found["scores"]["a"]["spread"][t == 1.2]["mean"])
        assert pairs["a", "real replies", t]["n"] == 2


def assert_its_replies_have_the_same_scores(report: Path, data: Path) -> None:
    """evaluate --replies reads what evaluate --model wrote: the same scores, frontiers and verdicts, without losses."""
    output = report.with_name(report.name + "-replies")
    fixed = ["--data", str(data), "--limit", "2", "--embedded", "2", "--pairs", "4", "--output", str(output)]
    assert main(["evaluate", "--replies", str(report / "samples.jsonl"), *fixed]) == 0
    ours, theirs = (json.loads((folder / "evaluation.json").read_text()) for folder in (report, output))
    for key in ("prompts", "temperatures", "scores", "real", "gaps", "verdicts", "similarity"):
        assert ours[key] == theirs[key], key
    assert set(theirs["losses"]["a"]) == set()
    assert not (output / "samples.jsonl").exists()
    assert "216 replies of 2 models, read from files" in (output / "report.md").read_text()


@pytest.mark.parametrize(("temperatures", "reason"), [(["1", "1"], "each once"), (["1"], "--one-temperature")])
def test_evaluate_refuses_a_single_temperature(
    tiny_model: Path, data: Path, tmp_path: Path, temperatures: list[str], reason: str, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--data", str(data), "--output", str(tmp_path / "out"), "--temperatures", *temperatures]
    assert main(["evaluate", "--model", str(tiny_model), *flags]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_temperature_is_accepted_on_request(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    small = ["--samples", "1", "--max-new-tokens", "4", "--limit", "1", "--output", str(tmp_path)]
    flags = ["--data", str(data), "--temperatures", "1", "--one-temperature", *small]
    assert main(["evaluate", "--model", str(tiny_model), *flags]) == 0
