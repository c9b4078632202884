"""Damaged and hostile inputs of every command: exit code 2 and one line that names the file, never a traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_sfr.cli import main
from megatron_sfr.data.chat import template_limits
from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.demo.train_tokenizer import train_tokenizer
from megatron_sfr.hf.import_hf import import_hf
from megatron_sfr.runtime.devices import usable_device

DEEP = b"[" * 100_000 + b"]" * 100_000
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "not UTF-8": lambda data: data[:9] + b"\xff" + data[9:],
    "a list": lambda data: b"[]",
    "null": lambda data: b"null",
    "deep": lambda data: DEEP,
}
CHAT = {"messages": [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "green blue red"}]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, conversations, prompts, a prepared folder and a checkpoint, all tiny."""
    root = tmp_path_factory.mktemp("made")
    tokenizer = train_tokenizer(["red green blue"], 300)
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    config = Qwen3Config(
        **sizes,
        vocab_size=len(tokenizer),
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "chats.jsonl").write_text(f"{json.dumps(CHAT)}\n")
    (root / "prompts.jsonl").write_text('{"prompt": "red?"}\n')
    (root / "replies.jsonl").write_text('{"task_id": "T", "completion": "x"}\n')
    (root / "tasks.jsonl").write_text(
        json.dumps(
            {"task_id": "T", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    assert f()"}
        )
    )
    options = PrepareOptions(seq_length=60, min_segment_length=1)
    prepare([root / "chats.jsonl"], root / "prepared", root / "model", options, progress=False)
    import_hf(root / "model", root / "checkpoint", progress=False)
    return root


@pytest.fixture
def inputs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy in the current folder, for a test to damage."""
    shutil.copytree(made, tmp_path / "inputs")
    monkeypatch.chdir(tmp_path / "inputs")
    return tmp_path / "inputs"


PREPARE = (
    "prepare --input chats.jsonl --tokenizer model --output out --workers 1 --seq-length 60 --min-segment-length 1"
)
GENERATE = "generate --model model --prompts prompts.jsonl --output o.jsonl --samples 1 --max-new-tokens 2 --device cpu"
EXPORT = "convert export --checkpoint checkpoint --like model --output out"
CODE = "evaluate-code --tasks tasks.jsonl --replies replies.jsonl --output out"


def refused(command: str, capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """The command ends with exit code 2, and its last line is short and says each of the parts."""
    code = main(command.split())
    error = capsys.readouterr().err
    line = error.strip().splitlines()[-1]
    assert code == 2, error
    assert line.startswith(f"megatron-sfr {command.split()[0]}: error: "), error
    assert all(part in line for part in parts), line
    assert len(line) < 600, line
    assert "Traceback" not in error


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    ("file", "command", "part"),
    [
        ("model/tokenizer.json", PREPARE, "no tokenizer that can be read at model"),
        ("model/config.json", "convert recipe --hf model", "model/config.json: "),
        ("model/config.json", GENERATE, "model"),
        ("model/model.safetensors", GENERATE, "the model in model"),
        ("model/model.safetensors", "convert import --hf model --output out", "model/model.safetensors: "),
        ("prepared/manifest.json", "inspect --data prepared", "prepared/manifest.json is damaged"),
        ("checkpoint/release/.metadata", EXPORT, "release/.metadata is damaged"),
        ("checkpoint/release/metadata.json", EXPORT, "release/metadata.json: "),
        ("prompts.jsonl", GENERATE, "prompts.jsonl"),
        ("replies.jsonl", CODE, "replies.jsonl"),
        ("tasks.jsonl", CODE, "tasks.jsonl"),
    ],
)
def test_a_damaged_file_is_named(
    inputs: Path, capsys: pytest.CaptureFixture[str], file: str, command: str, part: str, damage: str
) -> None:
    path = inputs / file
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    refused(command, capsys, part)


JSON_VALUES: list[tuple[str, str, Any, str, str]] = [
    ("model/tokenizer.json", "model.merges", [{"a": 1}], PREPARE, "version of tokenizers"),
    ("model/tokenizer.json", "model.merges", [{"a": 1}], GENERATE, "version of tokenizers"),
    ("model/tokenizer_config.json", "eos_token", {}, PREPARE, "no tokenizer that can be read at model"),
    ("model/tokenizer_config.json", "model_max_length", "x", PREPARE, "no tokenizer that can be read at model"),
    ("model/config.json", "architectures", [0], "convert recipe --hf model", "architectures is [0]"),
    ("model/config.json", "architectures", [{}], "convert recipe --hf model", "architectures is [{}]"),
    ("model/config.json", "hidden_size", 16.0, "convert recipe --hf model", "hidden_size is 16.0"),
    ("model/config.json", "num_hidden_layers", 100_000, "convert recipe --hf model", "from 1 to 10,000"),
    ("model/config.json", "num_hidden_layers", 10**30, "convert recipe --hf model", "num_hidden_layers is 1000"),
    ("model/config.json", "attention_dropout", {}, "convert recipe --hf model", "attention_dropout is {}"),
    ("model/config.json", "rope_parameters", [[]], "convert recipe --hf model", "rope_parameters is [[]]"),
    ("model/config.json", "layer_types", -1, "convert recipe --hf model", "layer_types is -1"),
    ("model/config.json", "hidden_act", "x" * 9000, "convert recipe --hf model", "hidden_act: xxx"),
    ("model/config.json", "hidden_size", 8, GENERATE, "cannot load the model in model"),
    ("model/config.json", "rms_norm_eps", "x", GENERATE, "field 'rms_norm_eps'"),
    ("model/generation_config.json", "eos_token_id", ["x"], GENERATE, "eos_token_id is ['x']"),
    ("model/generation_config.json", "eos_token_id", True, GENERATE, "eos_token_id is True"),
    ("prepared/manifest.json", "files", [], "inspect --data prepared", "files is []"),
    ("prepared/manifest.json", "samples", "x", "inspect --data prepared", "samples is 'x'"),
    ("prepared/manifest.json", "kind", "x" * 9000, "inspect --data prepared", "prepared holds xxx"),
    ("prepared/manifest.json", "personas", ["a"], "inspect --data prepared", "personas is ['a']"),
]


@pytest.mark.parametrize(("file", "key", "value", "command", "part"), JSON_VALUES)
def test_a_value_of_another_type_is_named(
    inputs: Path, capsys: pytest.CaptureFixture[str], file: str, key: str, value: Any, command: str, part: str
) -> None:
    content = json.loads((inputs / file).read_text())
    *outer, last = key.split(".")
    place = content
    for name in outer:
        place = place[name]
    place[last] = value
    (inputs / file).write_text(json.dumps(content))
    refused(command, capsys, part)


@pytest.mark.parametrize("position", [20, 60, 200, 700, -40, -9])
def test_garbled_checkpoint_files_are_refused(inputs: Path, capsys: pytest.CaptureFixture[str], position: int) -> None:
    path = inputs / "checkpoint/release/.metadata"
    data = bytearray(path.read_bytes())
    data[position : position + 8 if position > 0 else None] = b"\xff" * len(data[position : position + 8])
    path.write_bytes(data)
    refused(EXPORT, capsys, "checkpoint/release")


def test_a_garbled_tensor_file_is_refused(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = (inputs / "checkpoint/release").glob("*.distcp")
    path.write_bytes(b"\xff" * path.stat().st_size)
    refused(EXPORT, capsys, "checkpoint/release", "cannot be read")


NESTED = "{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}"
TEMPLATES = {
    "division": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "none": ("{{ none + 1 }}", "TypeError"),
    "endless": (NESTED, "loop iterations"),
    "endless macro": (f"{{% macro f() %}}{NESTED}{{% endmacro %}}{{{{ f() }}}}", "loop iterations"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "huge": ("{{ 'x' * 10 ** 15 }}", "more than 1 GiB of memory"),
    "range": ("{% for i in range(10 ** 12) %}x{% endfor %}", "OverflowError"),
    "syntax": ("{% for", "TemplateSyntaxError"),
    "half a character": ("{{ '\\ud800' }}", "UnicodeEncodeError"),
    "refusal": ("{{ raise_exception('not this') }}", "not this"),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(("command", "part"), [(PREPARE, "chats.jsonl:1: "), (GENERATE, "the prompt 'red?'")])
def test_a_template_that_fails_or_never_ends(
    inputs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    part: str,
    name: str,
) -> None:
    template, reason = TEMPLATES[name]
    (inputs / "model/chat_template.jinja").write_text(template)
    monkeypatch.setattr(template_limits, "MOST_LOOPS", 10_000)
    refused(command, capsys, "the tokenizer at model cannot be used" if name == "syntax" else part, reason)


RECORDS: list[Any] = [
    {"conversations": [{"from": ["human"], "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"messages": [{"role": [], "content": "a"}, CHAT["messages"][1]]},
    {"messages": {"role": "user"}},
    {"messages": [3, "x", None]},
    {"messages": [{"role": "user", "content": {"a": []}}, CHAT["messages"][1]]},
    {"messages": CHAT["messages"], "persona": {"a": 1}},
    {"messages": CHAT["messages"], "tools": [[]]},
    {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "", "tool_calls": [{"function": []}]}]},
    {"instruction": ["a"], "output": "b"},
    {"conversations": [{"from": "function_call", "value": 3}]},
    {"messages": "\ud800"},
    [CHAT],
]


def test_a_bad_record_never_ends_prepare(inputs: Path) -> None:
    bad = [json.dumps(record).encode() for record in RECORDS] + [DEEP, b"\xff\xfe", b"{", b"\0", b"1" * 6000]
    for name in ("messages", "conversations", "instruction"):  # each detected from its first record
        first = {
            "messages": CHAT,
            "conversations": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "instruction": {"instruction": "a", "output": "b"},
        }[name]
        path = inputs / f"{name}.jsonl"
        path.write_bytes(b"\n".join([json.dumps(first).encode(), *bad]))
        command = PREPARE.replace("chats.jsonl", path.name).replace("--output out", f"--output out-{name}")
        assert main([*command.split(), "--skip-bad-rows"]) == 0
        rejected = (inputs / f"out-{name}/rejected.jsonl").read_text().splitlines()
        assert len(rejected) == len(bad)
        assert all(json.loads(line)["reason"] for line in rejected)


@pytest.mark.parametrize(
    ("reply", "part"),
    [
        ([1], "[1] is not a reply; write "),
        (3, "3 is not a reply"),
        ({"task_id": "T", "completion": "x", "temperature": "warm"}, "the temperature is 'warm'"),
        ({"task_id": "T", "completion": "x", "temperature": [0]}, "the temperature is [0]"),
        ({"task_id": "T", "completion": "x", "temperature": float("nan")}, "the temperature is nan"),
        ({"task_id": "T", "completion": "x", "model": []}, "the model is []"),
        ({"task_id": "T", "completion": None}, "not a reply to a task"),
        ({"question": [], "text": "x"}, "not a reply to a task"),
    ],
)
def test_a_reply_of_another_type_is_named(
    inputs: Path, capsys: pytest.CaptureFixture[str], reply: Any, part: str
) -> None:
    (inputs / "replies.jsonl").write_text(json.dumps(reply))
    refused(CODE, capsys, "replies.jsonl:1: ", part)


@pytest.mark.parametrize("option", ["--device foo", "--device meta", "--device cuda:99", "--dtype foo", "--dtype int8"])
def test_a_device_or_dtype_that_does_not_exist(inputs: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    name, value = option.split()
    refused(f"{GENERATE} {option}", capsys, f"{name.removeprefix('--')} '{value}'")
    if name == "--device":
        with pytest.raises(ValueError, match="this machine has cpu"):
            usable_device(value)


OUT_OF_RANGE = [
    *((GENERATE, option) for option in ("--temperature nan", "--temperature inf", "--top-p nan", "--samples 0")),
    *((CODE, option) for option in ("--seconds nan", "--seconds inf", "--memory 0")),
    (EXPORT, "--max-shard-gb inf"),
]


@pytest.mark.parametrize(("command", "option"), OUT_OF_RANGE)
def test_numbers_out_of_range(inputs: Path, capsys: pytest.CaptureFixture[str], command: str, option: str) -> None:
    name = option.split()[0].removeprefix("--")
    refused(f"{command} {option}", capsys, name.replace("-", "_") if command == GENERATE else name)


def test_weights_that_give_no_numbers_are_refused(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file("model/model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, "model/model.safetensors", {"format": "pt"})
    refused(GENERATE, capsys, "logits are not finite")
