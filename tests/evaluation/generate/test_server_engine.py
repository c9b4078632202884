"""Replies of an OpenAI-compatible server: a real HTTP server on the loopback interface, right and wrong answers."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sfr.cli import main
from megatron_sfr.evaluation.generate import server_requests
from megatron_sfr.evaluation.generate.server_engine import replies_from
from megatron_sfr.evaluation.generate.server_requests import Connection, ordered
from tests.evaluation.generate.chat_server import ChatServer, running_server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setattr(server_requests, "FIRST_WAIT", 0.005)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with running_server() as server:
        yield server


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    records: list[dict[str, str]] = [{"prompt": f"Why {i}?"} for i in range(3)]
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"prompt": "Who?", "persona": "poet"}]))
    return path


def generate(server: ChatServer, prompts: Path, output: Path, *flags: str) -> list[dict[str, Any]]:
    command = ["generate", "--server", server.url, "--prompts", str(prompts), "--output", str(output)]
    assert main([*command, "--samples", "5", "--batch-size", "2", *flags]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(list(command)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"megatron-sfr {command[0]}: error: ")
    return line


def test_each_model_answers_each_prompt_in_order(
    server: ChatServer, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    flags = ["--server-model", "ce=base", "lora/sfr", "--server-concurrency", "3", "--server-key-env", "MY_KEY"]
    sampling = ["--temperature", "0.7", "--top-p", "0.9", "--top-k", "40", "--max-new-tokens", "32", "--seed", "3"]
    records = generate(server, prompts, tmp_path / "out.jsonl", *flags, *sampling)
    assert [(r["model"], r["question"], r["sample"]) for r in records] == [
        (model, question, sample)
        for model in ("ce", "lora/sfr")
        for question in ("Why 0?", "Why 1?", "Why 2?", "Who?")
        for sample in range(5)
    ]
    assert {r["text"].partition(":")[0] for r in records[:20]} == {"base"}
    assert all(f" {r['question']} 0.7 " in r["text"] for r in records)
    assert len({r["text"] for r in records}) == 40
    assert [r["tokens"] for r in records[:5]] == [None] * 4 + [7]  # the server counts the tokens of a request
    assert (records[0]["logprob"], records[0]["finished"]) == (None, True)
    assert server.most_running <= 3
    assert {(path, key) for path, _, key in server.requests} == {("/v1/chat/completions", "Bearer secret")}
    body = next(b for b in server.bodies() if b["messages"][-1]["content"] == "Who?" and "n" not in b)
    assert [turn["role"] for turn in body.pop("messages")] == ["system", "user"]
    assert type(body.pop("seed")) is int
    assert body == {"model": body["model"], "temperature": 0.7, "top_p": 0.9, "top_k": 40, "max_tokens": 32}
    assert b"secret" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_a_server_may_count_tokens_and_give_log_probabilities(
    server: ChatServer, prompts: Path, tmp_path: Path
) -> None:
    fields = '{"logprobs": true, "seed": null, "min_p": 0.1}'
    records = generate(server, prompts, tmp_path / "out.jsonl", "--server-args", fields)
    assert {(r["tokens"], r["logprob"]) for r in records} == {(2, -0.75)}
    assert {r["model"] for r in records} == {"only/model"}  # which the server names
    assert all(body["min_p"] == 0.1 and "seed" not in body for body in server.bodies())


def test_greedy_requests_have_one_sample_and_few_choices_are_asked_for_again(
    server: ChatServer, prompts: Path, tmp_path: Path
) -> None:
    generate(server, prompts, tmp_path / "greedy.jsonl", "--temperature", "0")
    assert all("n" not in body for body in server.bodies())
    server.requests.clear()
    server.most_choices = 1
    records = generate(server, prompts, tmp_path / "one.jsonl")
    assert [body.get("n", 1) for body in server.bodies()].count(2) == 8
    assert len(server.requests) == len({r["text"] for r in records}) == 20


def test_a_base_model_continues_the_text(
    server: ChatServer, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = generate(server, prompts, tmp_path / "out.jsonl", "--server-api", "completions", "--persona-as", "user")
    assert {path for path, _, _ in server.requests} == {"/v1/completions"}
    poet = "Answer in this persona: poet.\n\nWho?"
    assert {body["prompt"] for body in server.bodies()} == {"Why 0?", "Why 1?", "Why 2?", poet}
    assert not any(r["finished"] for r in records)
    command = ["generate", "--server", server.url, "--prompts", str(prompts), "--output", str(tmp_path / "no.jsonl")]
    assert "has 2 turns; --server-api completions continues one text" in refused(
        capsys, *command, "--server-api", "completions"
    )


@pytest.mark.parametrize("faults", [[429], [503, 500], ["cut"], ["damaged", "cut"], ["hang"]])
def test_faults_that_pass_change_nothing(server: ChatServer, prompts: Path, tmp_path: Path, faults: list) -> None:
    right = generate(server, prompts, tmp_path / "right.jsonl")
    before = len(server.requests)
    server.faults = list(faults)
    records = generate(server, prompts, tmp_path / "out.jsonl", "--server-timeout", "1" if faults == ["hang"] else "60")
    assert records == right
    assert len(server.requests) == 2 * before + len(faults)


@pytest.mark.parametrize(
    ("fault", "attempts", "parts"),
    [
        (500, 3, ["500 Internal Server Error (not today, None), after 3 attempts"]),
        (429, 3, ["429 Too Many Requests"]),
        ("hang", 3, ["no answer in 0.05 s, after 3 attempts"]),
        ("damaged", 3, ["not JSON", "after 3 attempts"]),
        ("cut", 3, ["IncompleteRead", "after 3 attempts"]),
        (400, 1, ["400 Bad Request", "correct the option"]),
        (401, 1, ["401 Unauthorized", "OPENAI_API_KEY"]),
        (404, 1, ["404 Not Found", "/v1"]),
        ("moved", 1, ["307 Temporary Redirect", "redirects are not followed"]),
    ],
)
def test_faults_that_stay_are_one_line(
    server: ChatServer, fault: Any, attempts: int, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    server.always = fault
    few = ["--server-retries", "2", "--server-timeout", "0.05" if fault == "hang" else "60"]
    line = refused(capsys, "generate", "--server", server.url, "--prompt", "Why?", "--batch-size", "8", *few)
    assert f"error: {server.url}/chat/completions: " in line
    assert all(part in line for part in parts), line
    assert len(server.requests) == attempts
    assert {path for path, _, _ in server.requests} == {"/v1/chat/completions"}


def test_a_key_is_not_in_the_message(
    server: ChatServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.always = 403
    line = refused(capsys, "generate", "--server", server.url, "--prompt", "Why?")
    assert "(not today, Bearer ***)" in line
    assert "secret" not in line


def test_nobody_answers(server: ChatServer, capsys: pytest.CaptureFixture[str]) -> None:
    url = "http://127.0.0.1:9/v1"  # the discard port
    line = refused(capsys, "generate", "--server", url, "--prompt", "Why?", "--server-retries", "1")
    assert f"error: {url}/models: [Errno 111] Connection refused, after 2 attempts" in line


PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from megatron_sfr.cli import main; code = main(sys.argv[1:]); "
    "heavy = {'torch', 'transformers', 'megatron'} & set(sys.modules); sys.exit(f'imported {heavy}' if heavy else code)"
)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_resumes_and_asks_for_nothing_twice(
    server: ChatServer, prompts: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """In a separate process, which needs no torch. It is stopped while the server holds its requests."""
    right = generate(server, prompts, tmp_path / "right.jsonl")
    output, partial = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.partial"
    command = ["generate", "--server", server.url, "--prompts", str(prompts), "--output", str(output)]
    command += ["--samples", "5", "--batch-size", "2", "--server-concurrency", "1"]
    server.requests.clear()
    server.faults = [None] * 4 + ["hang"]
    with subprocess.Popen([sys.executable, "-c", PROGRAM, *command], stderr=subprocess.DEVNULL) as run:
        while run.poll() is None and not (partial.exists() and partial.read_bytes().count(b"\n") == 7):
            time.sleep(0.005)
        while len(server.requests) < 5:
            time.sleep(0.005)
        run.send_signal(how)
    assert run.returncode == (-9 if how == signal.SIGKILL else 130)
    with partial.open("r+b") as file:
        file.truncate(partial.stat().st_size - 5)  # a torn line: its request is made again
    server.faults, before = [], len(server.requests)
    done = subprocess.run([sys.executable, "-c", PROGRAM, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in output.read_text().splitlines()] == right
    assert len(server.requests) - before == 12 - 3
    assert main(command) == 0
    assert len(server.requests) - before == 12 - 3, "a finished file asks for nothing"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--server", "localhost:8000"], "is not a URL"),
        (["--server", "http://me:secret@host/v1"], "--server http://host...: give the address alone"),
        (["--server", "http://h:x/v1"], "is not a URL"),
        (["--server", "http://h/v1", "--dtype", "float32"], "--dtype has no effect with --server"),
        (["--server", "http://h/v1", "--device", "cpu"], "--device has no effect with --server"),
        (["--server", "http://h/v1", "--engine", "vllm"], "--engine has no effect with --server"),
        (["--server", "http://h/v1", "--template-kwargs", "{}"], "--template-kwargs has no effect with --server"),
        (["--server", "http://h/v1", "--server-key-env", "NOT_SET_1"], "NOT_SET_1: this environment variable"),
        (["--server", "http://h/v1", "--server-model", "a", "a"], "is taken"),
        (["--server", "http://h/v1", "--server-model", "a", "--server-args", "[1]"], "write a JSON object"),
        (["--server", "http://h/v1", "--server-model", "a", "--server-args", "{"], "not JSON"),
        (["--server", "http://h/v1", "--server-model", "a", "--server-args", '{"n": 3}'], "n is set by the command"),
        (["--server", "http://h/v1", "--server-model", "a", "--server-args", '{"seed": 3}'], "give seed by --seed"),
        (["--server", "http://h/v1", "--server-model", "a", "--server-concurrency", "0"], "concurrency is 0"),
        (["--server", "http://h/v1", "--server-model", "a", "--server-timeout", "0"], "timeout is 0"),
        (["--model", "x", "--server-model", "a"], "--server-model goes with --server"),
        (["--model", "x", "--server-retries", "1"], "--server-retries goes with --server"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reason in refused(capsys, "generate", "--prompt", "Why?", *flags)


def test_a_server_with_several_models_asks_for_a_choice(server: ChatServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.offered = ["base", "lora"]
    line = refused(capsys, "generate", "--server", server.url, "--prompt", "Why?")
    assert "offers 2 models; choose with --server-model: base, lora" in line


@pytest.mark.parametrize(
    "answer", [[], {}, {"choices": []}, {"choices": [1]}, {"choices": [{"message": {"content": 1}}]}]
)
def test_an_answer_of_another_shape_is_damaged(answer: Any) -> None:
    with pytest.raises(ValueError, match="choice"):
        replies_from(answer)


def test_half_letters_and_missing_text_are_readable() -> None:
    choices = [{"message": {"content": "a\ud800"}}, {"message": {"content": None}, "finish_reason": "length"}]
    first, second = replies_from({"choices": choices})
    assert (first.text, first.finished) == ("a?", True)
    assert (second.text, second.finished) == ("", False)


def test_an_error_stops_the_other_tasks() -> None:
    begun = []

    def work(task: int) -> int:
        begun.append(task)
        if task == 3:
            raise ValueError("three")
        return task

    found: list[int] = []
    with pytest.raises(ValueError, match="three"):
        found.extend(ordered(range(1000), work, 2))
    assert found == [0, 1, 2]
    assert len(begun) < 20


def test_a_connection_prints_without_its_key() -> None:
    assert "secret" not in repr(Connection("http://h/v1", "secret"))


def test_evaluate_compares_the_models_of_a_server(server: ChatServer, tmp_path: Path) -> None:
    turns = [
        [{"role": "user", "content": f"Why {i}?"}, {"role": "assistant", "content": f"Because {i}."}] for i in (0, 1)
    ]
    data = tmp_path / "valid.jsonl"
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    few = ["--samples", "2", "--temperatures", "0.5", "1", "--pairs", "2", "--embedded", "2", "--device", "cpu"]
    models = ["--server", server.url, "--server-model", "a=one", "b=two"]
    assert main(["evaluate", *models, "--data", str(data), "--output", str(tmp_path / "out"), *few]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["identity"]["models"]["server"] == {"url": server.url, "api": "chat", "args": {}}
    assert found["scores"]["b"]["relevance"][1]["n"] == 2
    assert found["losses"] == {"a": {}, "b": {}}
    assert "random numbers are shared" not in " ".join(found["notes"])
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 2 * 2 * 2 * 2
