"""Replies of any program, scored without a model: what a record may look like, and what is refused."""

import base64
import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from megatron_sfr.cli import main
from megatron_sfr.evaluation.compare.evaluate_replies import ONE_TEMPERATURE, evaluate_replies
from megatron_sfr.evaluation.compare.questions import EvaluationOptions
from megatron_sfr.evaluation.compare.reply_files import reply_files, reply_from
from megatron_sfr.evaluation.generate.prompts import Asked, ask
from megatron_sfr.evaluation.generate.sampling import SamplingOptions
from megatron_sfr.evaluation.page.reply_explorer import PROMPTS

PERSONAS = ("poet", "cook")
WORDS = "salt moon river bread stone light rain smoke"


def write(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records(model: str | None, *, distinct: bool, temperatures: Iterable[float] = (0.5, 1.0)) -> list[dict[str, Any]]:
    """Four prompts, two personas, three replies; all equal, or all different."""
    found = []
    for t in temperatures:
        for p in range(4):
            for persona in PERSONAS:
                for i in range(3):
                    words = WORDS.split()[i :: 2 + int(2 * t)] if distinct else WORDS.split()
                    record = {"prompt": f"Why {p}?", "persona": persona, "temperature": t, "sample": i}
                    mark = f"{persona} {p} {i}" if distinct else "the same"
                    found.append(record | {"text": f"{mark} {' '.join(words)}"} | ({"model": model} if model else {}))
    return found


def test_a_package_that_is_not_installed_is_named_in_one_line(tmp_path: Path) -> None:
    """As in an environment for scoring by words only (docs/install.md), where somebody asks for embeddings."""
    path = write(tmp_path / "replies.jsonl", records("same", distinct=False))
    code = (
        "import sys; sys.modules |= dict.fromkeys(['torch', 'tokenizers', 'transformers', 'megatron.core']); "
        "from megatron_sfr.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["evaluate", "--replies", str(path), "--output", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert re.match(r"megatron-sfr evaluate: error: the Python module tokenizers\S* is not installed; ", last)
    assert "Traceback" not in done.stderr


def test_two_files_become_a_page_without_torch(tmp_path: Path) -> None:
    """In a separate process, to see what it imports."""
    same, varied = records("same", distinct=False), records(None, distinct=True)
    files = [write(tmp_path / "same.jsonl", same), write(tmp_path / "varied.v2.jsonl", varied)]
    code = (
        "import sys; from megatron_sfr.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'megatron', 'sentence_transformers'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    words = ["evaluate", "--replies", *map(str, files), "--encoder", "none", "--output", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["temperatures"] == [0.5, 1.0]
    assert list(found["scores"]) == ["same", "varied"]
    assert found["scores"]["same"]["self-BLEU-4"][0]["mean"] == 1
    assert found["scores"]["same"]["CS-SB-1"][0]["mean"] == 1
    assert found["scores"]["varied"]["self-BLEU-4"][0]["mean"] < 0.9
    assert found["scores"]["varied"]["relevance"][0]["n"] == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "48 replies of 2 models" not in page
    assert "96 replies of 2 models, read from files" in page
    assert "Nothing is embedded" in page
    personas = found["personas"]
    assert (personas["has_quality"], personas["axes"]["diversity"]) == (False, "self-BLEU-4")
    assert [models["same"][0][1]["mean"] for models in personas["estimates"].values()] == [1, 1]
    assert page.count("<figure>") == 2
    assert "There are no real replies to compare with" in page


def test_beside_a_reply_is_the_nearest_real_one(tmp_path: Path) -> None:
    """Of any persona's replies to the same prompt; by words, because nothing is embedded."""
    cells = [(f"Why {p}?", persona) for p in range(30) for persona in PERSONAS]
    replies = [
        {"prompt": prompt, "persona": persona, "temperature": t, "text": f"Salt and {persona}'s rain!"}
        for prompt, persona in cells
        for t in (0.5, 1.0)
    ]
    real = {"poet": ["The moon.", "rain, SALT"], "cook": ["a river", "salt and rain and the cook's bread"]}
    turns = [(prompt, persona, text) for prompt, persona in cells for text in real[persona]]
    data = [
        {"persona": persona, "messages": [dict(role="user", content=prompt), dict(role="assistant", content=text)]}
        for prompt, persona, text in turns
    ]
    files = {write(tmp_path / "a.jsonl", replies): None}
    evaluate_replies(files, tmp_path / "out", write(tmp_path / "data.jsonl", data), encoder=None, show=False)
    page = (tmp_path / "out" / "report.html").read_text()
    lines = replies_csv(page)
    assert len({line["prompt"] for line in lines}) == PROMPTS
    assert len(lines) == PROMPTS * len(PERSONAS) * 3
    poet, _, real_poet, cook = (lines[i] for i in (0, 1, 2, 3))
    assert poet["reply"] == "Salt and poet's rain!"
    assert (poet["nearest real reply"], poet["its persona"]) == ("rain, SALT", "poet")
    assert cook["nearest real reply"] == "salt and rain and the cook's bread"
    assert cook["similarity"] == f"{2 * 4 / 11:.2f}"  # of salt, and, cook's, rain
    assert (real_poet["model"], real_poet["reply"], real_poet["nearest real reply"]) == ("real", "The moon.", "")
    assert "nothing is embedded, so by words in common" in page
    assert "24 of 30 prompts" in page


def replies_csv(page: str) -> list[dict[str, str]]:
    (content,) = re.findall(r'download="replies.csv" href="data:text/csv;charset=utf-8;base64,([^"]*)"', page)
    return list(csv.DictReader(io.StringIO(base64.b64decode(content).decode())))


def test_models_may_have_other_temperatures_and_numbers(tmp_path: Path) -> None:
    a = records("a", distinct=True, temperatures=(0.5,))
    b = records("b", distinct=True, temperatures=(0.5, 1.5))[:-5]  # the last prompt is answered once
    unknown = [record | {"temperature": None, "model": "c"} for record in a]
    files = {write(tmp_path / "all.jsonl.gz.jsonl", [*a, *b, *unknown]): None}
    report = evaluate_replies(files, tmp_path / "out", encoder=None, show=False)
    assert report.temperatures == (None, 0.5, 1.5)
    counts = {model: [estimate.n for estimate in scores["self-BLEU-4"]] for model, scores in report.scores.items()}
    assert counts == {"a": [0, 4, 0], "b": [0, 4, 3], "c": [4, 0, 0]}
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.count("| a | ") == 1
    assert "| c | - |" in text


def test_references_are_found_by_prompt_and_persona(tmp_path: Path) -> None:
    references = [Asked(ask(f"Why {p}?", persona)) for p in (1, 2, 9) for persona in PERSONAS]
    with reply_files({write(tmp_path / "a.jsonl", records("a", distinct=True)): "named"}) as found:
        asked = found.asked(references)
        assert [entry.prompt.question for entry in asked] == ["Why 1?"] * 2 + ["Why 2?"] * 2
        assert found.outside(asked) == 4
        (answered,) = found.answered(asked)
        assert answered.model == "named"
        assert answered.replies[1][3] == [record["text"] for record in records("a", distinct=True)[39:42]]
        with pytest.raises(ValueError, match=r"no prompt of --data has a reply, for example 'Why 0\?'"):
            found.asked([Asked(ask("Who?"))])


def test_utilities_are_scored_with_what_is_new(tmp_path: Path) -> None:
    """minilm embeds: two equal replies and one other, with utilities of 4, 9 and 2; the first is also a real reply."""
    texts = ["The sky is blue because of scattering.", "The sky is blue because of scattering.", "Bake it for an hour."]
    record = {"prompt": "Why?", "text": texts, "utility": [4, 9, 2], "model": "a"}
    options = EvaluationOptions(SamplingOptions())
    path = write(tmp_path / "a.jsonl", [record])
    turns = [[("user", "Why?"), ("assistant", text)] for text in ("Bake it for an hour.", texts[0])]
    said = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]
    data = write(tmp_path / "data.jsonl", said)
    report = evaluate_replies({path: None}, tmp_path / "out", data, options=options, show=False)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "by cosine of minilm" in page
    shown, _ = replies_csv(page)
    assert (shown["nearest real reply"], shown["similarity"]) == (texts[0], "1.00")
    (found,) = report.scores["a"]["utility_k"]
    assert found.mean == pytest.approx((1 - 0.8) / (1 - 0.8**3) * (4 + 2 * 0.8**2))
    assert report.scores["a"]["distinct_k"][0].mean == 2
    assert report.scores["a"]["collisions"][0].mean == pytest.approx(1 / 3)
    other = write(tmp_path / "b.jsonl", [record | {"model": "b", "utility": [4, None, 2]}])  # one reply without
    both = evaluate_replies({path: None, other: None}, tmp_path / "both", encoder=None, show=False)
    assert all("utility_k" not in scores for scores in both.scores.values())


def test_one_temperature_is_named_in_the_notes(tmp_path: Path) -> None:
    files = {write(tmp_path / "a.jsonl", records("a", distinct=True, temperatures=(1.0,))): None}
    report = evaluate_replies(files, tmp_path / "out", encoder=None, show=False)
    assert any(ONE_TEMPERATURE in note for note in report.notes)


@pytest.mark.parametrize(
    ("record", "texts"),
    [
        ({"prompt": "Why?", "text": "a"}, ["a"]),
        ({"prompt": "Why?", "response": ["a", "b"]}, ["a", "b"]),
        ({"messages": [{"role": "user", "content": "Why?"}], "completion": "a"}, ["a"]),
        ({"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "a"}]}, ["a"]),
        ({"prompt": "Why?", "messages": None, "question": None, "text": None, "reply": "a"}, ["a"]),
        ({"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": [{"text": "a"}]}]}, ["a"]),
        ({"id": "curated-0", "prompt": "Why?", "model": "m", "generations": ["a", "b"]}, ["a", "b"]),
        ({"prompt": "Why?", "outputs": [{"index": 0, "text": "a", "token_ids": [1]}]}, ["a"]),
        ({"prompt": "Why?", "choices": [{"index": 0, "message": {"role": "assistant", "content": "a"}}]}, ["a"]),
        ({"doc_id": 0, "arguments": {"gen_args_0": {"arg_0": "Why?", "arg_1": {}}}, "resps": [["a", "b"]]}, ["a", "b"]),
        ({"doc_id": 0, "arguments": [["Why?", {"until": []}]], "resps": [["a"]], "filtered_resps": ["a"]}, ["a"]),
        ({"prompt": "5f0e", "question": "Why?", "text": "a", "model": "m", "sample": 3, "temperature": 0}, ["a"]),
    ],
)
def test_forms_of_a_record(record: dict[str, Any], texts: list[str]) -> None:
    reply = reply_from(record)
    assert (reply.prompt.question, list(reply.texts)) == ("Why?", texts)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "not a reply"),
        ({"text": "a"}, "not a prompt"),
        ({"prompt": "Why?"}, "no text of a reply"),
        ({"prompt": "Why?", "text": 3}, "no text of a reply"),
        ({"prompt": "Why?", "text": []}, "no text of a reply"),
        ({"prompt": "Why?", "text": "a", "reply": "a"}, "two texts"),
        ({"prompt": "Why?", "text": "a", "temperature": "hot"}, "the temperature is 'hot'"),
        ({"prompt": "Why?", "text": "a", "temperature": float("nan")}, "the temperature is nan"),
        ({"prompt": "Why?", "text": "a", "temperature": 10**400}, "the temperature is 1000"),
        ({"prompt": "Why?", "text": "a", "utility": 10**400}, "the utility is 1000"),
        ({"prompt": "Why?", "text": "a", "sample": True}, "the sample is True"),
        ({"prompt": "Why?", "text": "a", "model": 1}, "the model is 1"),
        ({"prompt": "Why?", "text": ["a", "b"], "utility": [1]}, "a number for each text"),
        ({"prompt": "Why?", "text": "a", "utility": "good"}, "the utility is 'good'"),
        ({"prompt": "Why?", "generations": ["a", "b"], "utility": 4.5}, "a number for each text"),
        ({"prompt": "Why?", "outputs": [{"token_ids": [1]}]}, "no text of a reply"),
        ({"custom_id": "r1", "response": {"body": {"choices": []}}}, "the output of the batch's request 'r1', without"),
        ({"arguments": {"gen_args_0": {"arg_0": "Why?"}}, "resps": [[["-1.5", "False"]]]}, "no text of a reply"),
        ({"arguments": [], "resps": []}, "a sample of lm-eval without one generated reply"),
        ({"prompt": 7, "question": "Why?", "text": "a"}, "have to be text"),
        ({"prompt": "Why?", "text": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_a_record_that_cannot_be_scored_is_one_line(
    record: Any, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = write(tmp_path / "replies.jsonl", [*records("a", distinct=True)[:2], record])
    words = ["evaluate", "--replies", str(path), "--encoder", "none", "--output", str(tmp_path / "out")]
    assert main(words) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()  # before it stands the progress bar
    assert line.startswith(f"megatron-sfr evaluate: error: {path}:3: ")
    assert reason in line
    assert not (tmp_path / "out" / "report.md").exists()


def test_a_reply_that_was_read_before_is_refused(tmp_path: Path) -> None:
    path, other = (write(tmp_path / name, records("a", distinct=True)) for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(ValueError, match=r"b\.jsonl:1: sample 0 of this prompt by 'a' was read before"):
        evaluate_replies({path: None, other: None}, tmp_path / "out", encoder=None)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--samples", "3"], "--samples is about sampling and has no effect on --replies"),
        (["--temperatures", "1"], "--temperatures is about sampling"),
        (["--template-date", "2020-01-01"], "--template-date is about sampling"),
        (["--limit", "0"], "at least one prompt"),
        (["--replies", "{}"], "is given twice"),
        (["--replies", "=x"], "the name is empty"),
        (["--data", "{}.missing"], "No such file"),
    ],
)
def test_flags_without_effect_are_refused(
    flags: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", records("a", distinct=True))
    words = ["evaluate", "--replies", str(path), "--encoder", "none", "--output", str(tmp_path / "out")]
    assert main([*words, *(flag.format(path) for flag in flags)]) == 2
    assert reason in capsys.readouterr().err


def test_models_need_data(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", "--model", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "--model needs --data" in capsys.readouterr().err
