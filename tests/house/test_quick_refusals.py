"""A wrong path, name or value is refused before anything heavy is imported: torch takes seconds, Megatron six."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "megatron.core", "sentence_transformers")
COMMANDS = {
    "prepare --input absent.jsonl --tokenizer model --output out": "absent.jsonl does not exist",
    "prepare --input chats.jsonl --tokenizer ./absent --output out": "no tokenizer that can be read at ./absent",
    "prepare --input chats.jsonl --tokenizer empty --output out": "no tokenizer that can be read at empty",
    "prepare --input chats.jsonl --tokenizer model --output out --seq-length 0": "seq_length is 0",
    "prepare-text --input chats.jsonl --tokenizer ./absent --output out": "no tokenizer that can be read at ./absent",
    "inspect --data empty": "empty has no manifest.json",
    "embed --data absent --encoder minilm": "absent does not exist",
    "calibrate-sed --model empty --data empty": "empty is not a Hugging Face model",
    "calibrate-sed --model model --data absent": "absent does not exist",
    "prepare --input chats.jsonl --tokenizer org/absent --output out": "neither a folder nor in the cache",
    "prepare --input chats.jsonl --tokenizer absent/ --output out": "at absent/ (it does not exist)",
    "reference --model empty --data empty": "empty is not a Hugging Face model",
    "reference --model model --data absent": "absent does not exist",
    "train absent.yaml": "no such recipe",
    "train unknown.yaml": "unknown.yaml:2: unknown key 'micro_batch_sise'; did you mean micro_batch_size?",
    "train typed.yaml": "typed.yaml: argument --micro-batch-size: invalid int value: 'two'",
    "train recipe.yaml --recipe switch.yaml": "recipe.yaml + switch.yaml: sfr: 'maybe' is neither true nor false",
    "train recipe.yaml --dry-run --sfr-wieght 2": "unknown flag --sfr-wieght; did you mean --sfr-weight?",
    "status empty": "empty is not the folder of a run",
    "plan broken.yaml": "not YAML",
    "plan --recipe absent.yaml recipe.yaml": "no such recipe",
    "plan unknown.yaml": "unknown.yaml:2: unknown key 'micro_batch_sise'; did you mean micro_batch_size?",
    "plan recipe.yaml --attention-backend flesh": "invalid choice: 'flesh' (choose from",
    "convert import --hf absent --output out": "absent/config.json does not exist",
    "convert export --checkpoint absent --like model --output out": "no checkpoint here",
    "convert export --checkpoint empty --like model --output out --adapter": "no checkpoint here",
    "convert recipe --hf empty": "empty/config.json does not exist",
    "convert recipe --hf foreign": "architecture MambaForCausalLM: not converted; known: GlmForCausalLM, ",
    "convert recipe --hf wrong": "config.json: num_attention_heads is 'two'",
    "convert import --hf foreign --output out": "architecture MambaForCausalLM: not converted; known: ",
    "convert import --hf wrong --output out": "config.json: num_attention_heads is 'two'",
    "convert import --hf foreign --adapter empty --output out": "architecture MambaForCausalLM: not converted",
    "convert quantize foreign --output out --format fp8 --calibration absent": "architecture MambaForCausalLM: not",
    "convert quantize absent --output out --format fp8 --calibration absent": "absent/config.json does not exist",
    "generate --model absent --prompt x": "absent is not a Hugging Face model",
    "flow-generate --checkpoint empty --tokenizer model --prompt x": "empty: no checkpoint here",
    "evaluate --model a=model --data absent.jsonl --output out": "absent.jsonl",
    "evaluate --replies a=chats.jsonl --encoder org/absent --output out": "cannot load the encoder org/absent",
    "evaluate-code --tasks absent.jsonl --replies chats.jsonl --output out": "absent.jsonl",
    "watch absent --prompts absent.jsonl": "absent does not exist",
    "watch empty --prompts chats.jsonl": "names no Hugging Face model: give --like HF_DIR",
    "watch empty --like absent --prompts chats.jsonl": "absent has no config.json",
    "watch empty --like foreign --prompts chats.jsonl": "architecture MambaForCausalLM: not converted",
    "watch empty --like known --prompts absent.jsonl": "absent.jsonl",
    "watch empty --like known --prompts chats.jsonl": "chats.jsonl:1: not a prompt",
    "watch empty --like known --prompts chats.jsonl --encoder org/absent": "cannot load the encoder org/absent",
    "diagnose --model base=empty --data absent --output out": "absent does not exist",
    "demo --output chats.jsonl": "chats.jsonl is a file",
    "doctor --folder absent": "",
}
CONFIGS = {
    "model": {},
    "known": {"architectures": ["Qwen3ForCausalLM"]},
    "wrong": {"architectures": ["Qwen3ForCausalLM"], "num_attention_heads": "two"},
    "foreign": {"architectures": ["MambaForCausalLM"]},
}
RECIPES = {
    "recipe": "save: run\n",
    "broken": "a: [",
    "unknown": "save: run\nmicro_batch_sise: 2\n",
    "typed": "micro_batch_size: two\n",
    "switch": "sfr: maybe\n",
}
PROGRAM = """
import io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from megatron_sfr.cli.command_line import build_parser, main
build_parser()
for command in json.loads(sys.argv[1]):
    if os.fork() == 0:
        error = io.StringIO()
        with redirect_stderr(error), redirect_stdout(io.StringIO()):
            try:
                code = main(command.split())
            except SystemExit as stop:
                code = stop.code
        imported = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
        print(json.dumps([command, code, imported, error.getvalue()]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str], str]]:
    """Exit code, heavy imports and errors of each command; each runs in a fork of one light process."""
    folder: Path = tmp_path_factory.mktemp("quick")
    (folder / "empty").mkdir()
    for name, config in CONFIGS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "chats.jsonl").write_text("{}\n")
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text)
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(list(COMMANDS)), json.dumps(HEAVY)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return {command: (code, heavy, error) for command, code, heavy, error in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_path_is_refused_before_heavy_imports(
    results: dict[str, tuple[int, list[str], str]], command: str
) -> None:
    code, imported, error = results[command]
    assert (code, imported) == (2, []), error
    assert COMMANDS[command] in error
    assert "Traceback" not in error
