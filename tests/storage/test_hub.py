"""Names on the hub where there is no network: refused at once, or read from the cache. The hub is a closed port."""

import os
import subprocess
import sys
from pathlib import Path

NO_HUB = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | {
    "HF_ENDPOINT": "http://127.0.0.1:1"
}


def test_a_tokenizer_on_the_hub_is_refused_in_one_line(tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    command = [
        "prepare",
        "--input",
        data,
        "--tokenizer",
        "some/model",
        "--output",
        tmp_path / "out",
        "--seq-length",
        "8",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_sfr.cli", *command], env=NO_HUB, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no tokenizer that can be read at some/model" in line
    assert "http://127.0.0.1:1 cannot be reached" in line
    assert "give a folder" in line


def test_a_name_in_the_cache_is_loaded_offline(tmp_path: Path) -> None:
    (tmp_path / "hub/models--some--model").mkdir(parents=True)
    program = (
        "import os; from megatron_sfr.storage.model_folders import absent; from huggingface_hub import constants;"
        "print(absent('some/model'), constants.HF_HUB_OFFLINE, os.environ['HF_HUB_OFFLINE']);"
        "print('127.0.0.1:1 cannot be reached (ConnectError: ' in absent('some/other'))"
    )
    variables = NO_HUB | {"HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("None True 1\nTrue\n", ""), "the reason stays the one that the hub gave"
