"""Small valid inputs of every command, and the commands that read them."""

import itertools
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_sfr.cli import main

SEQ_LENGTH, VOCABULARY, WIDTH = 512, 400, 16
CUT = "--workers 1 --min-segment-length 2 --stride 6 --horizons 1:8"
CHAT = f"--tokenizer model --output out --seq-length {SEQ_LENGTH} {CUT}"
SAMPLE = "--samples 1 --max-new-tokens 3 --device cpu"
MODEL = f"--model model {SAMPLE}"
TRAIN = "--recipe recipe.yaml --save out --train-iters 1"
RESUME = "--recipe recipe.yaml --save run --train-iters 3"
PREPARE = f"prepare --input chats.jsonl {CHAT}"
EMBED = "embed --data prepared --encoder minilm --device cpu --output out --block-rows 16"
FLOW = "flow-generate --checkpoint flow --tokenizer model --steps 3 --batch-size 2 --backend cpu"
EVALUATE = f"evaluate --model a=model {MODEL.removeprefix('--model model ')} --temperatures 0.5 1 --data chats.jsonl"
COMMANDS: dict[str, str] = {
    "prepare": PREPARE,
    "prepare, skipping": f"{PREPARE} --skip-bad-rows",
    "prepare sharegpt": PREPARE.replace("chats", "sharegpt"),
    "prepare alpaca": PREPARE.replace("chats", "alpaca") + " --skip-bad-rows",
    "prepare-text": f"prepare-text --input texts.jsonl --tokenizer model --output out {CUT}",
    "inspect": "inspect --data prepared --sample 0",
    "inspect documents": "inspect --data documents --sample 0",
    "verify": "inspect --data prepared --verify",
    "verify documents": "inspect --data documents --verify",
    "embed": EMBED,
    "calibrate": "calibrate-sed --model model --data prepared --device cpu",
    "reference": "reference --model model --data prepared --top-k 3 --device cpu --output out",
    "dry run": "train recipe.yaml --dry-run",
    "plan": "plan recipe.yaml --gpus 1 --anchors 8 --target-dim 384",
    "plan, sweep": "plan recipe.yaml --gpus 2 --sweep --json",
    "status": "status run",
    "watch": f"watch run --like model --prompts prompts.jsonl {SAMPLE} --encoder none --once --output out",
    "rank": f"rank {TRAIN}",
    "rank resumed": f"rank {RESUME}",
    "recipe": "convert recipe --hf model",
    "import": "convert import --hf model --output out",
    "export": "convert export --checkpoint checkpoint --like model --output out",
    "export head": "convert export --checkpoint run --like model --output out --keep-head",
    "generate": f"generate {MODEL} --prompts prompts.jsonl --output out.jsonl",
    "flow prompts": f"{FLOW} --prompts prompts.jsonl --output out.jsonl",
    "flow infill": f"{FLOW} --infill gaps.jsonl --output out.jsonl",
    "evaluate": f"{EVALUATE} --output out",
    "evaluate-code": "evaluate-code --tasks tasks.jsonl --replies replies.jsonl --output out --processes 1",
    "write prompts": "evaluate-code --tasks tasks.jsonl --write-prompts out.jsonl",
    "diagnose": "diagnose --model model --data prepared --device cpu --samples 2 --output out",
    "diagnose head": "diagnose --model headed --data prepared --device cpu --samples 1 --draws 4 --output out",
}
"""The commands that the kinds of damage are tried with, by name. `rank` is a rank of `train`, without torchrun."""
RECIPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": WIDTH,
    "ffn_hidden_size": 24,
    "num_attention_heads": 2,
    "group_query_attention": True,
    "num_query_groups": 1,
    "kv_channels": 8,
    "qk_layernorm": True,
    "swiglu": True,
    "disable_bias_linear": True,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
    "vocab_size": VOCABULARY,
    "seq_length": SEQ_LENGTH,
    "max_position_embeddings": SEQ_LENGTH,
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "train_iters": 2,
    "lr": 1e-3,
    "lr_decay_style": "constant",
    "num_workers": 0,
    "train_data_path": ["prepared"],
    "sfr": True,
    "sfr_head_width": 16,
    "save": "run",
}


@dataclass(frozen=True)
class Program:
    """A command as a function for a fork."""

    line: str

    def __call__(self) -> int:
        name, *rest = self.line.split()
        if name == "rank":
            return train(rest)
        if name == "flow-generate":
            _sample_in_this_process()
        return main([name, *rest])


def train(argv: list[str]) -> int:
    """A rank of one process, as torchrun starts it."""
    import torch.distributed as dist

    from megatron_sfr import train as entry
    from megatron_sfr.runtime import lifetime

    _join_group(dist)
    lifetime.tie_rank("__main__")
    lifetime.run(entry.main, argv, entry.ERROR)


def _join_group(dist: Any) -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": socket.gethostname(), "MASTER_PORT": "1"}  # not used: the group is there
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _sample_in_this_process() -> None:
    """Lets flow-generate sample in this process: the one that it starts would import everything again."""
    import json
    from dataclasses import asdict

    import torch.distributed as dist

    from megatron_sfr.cli.evaluation import flow_generate as command
    from megatron_sfr.kl_flow import flow_generate as program

    def start(job: Any, log: Path) -> None:
        _join_group(dist)
        file = log.with_name("job.json")
        file.write_text(json.dumps(asdict(job)), encoding="utf-8")
        program.main([str(file)])

    command.start = start


def make(folder: Path, run: Callable[[Callable[[], int], Path], Any]) -> None:
    """Writes the inputs to a folder; `run` runs a function in a fork, in a folder, and returns how it ended."""
    folder.mkdir(parents=True)
    _write_texts(folder)
    _write_recipes(folder)
    steps: list[Callable[[], int]] = [_write_model]
    lines = [
        PREPARE.replace("--output out", "--output prepared"),
        EMBED.replace("--output out", "--output prepared/targets"),
        COMMANDS["prepare-text"].replace("--output out", "--output documents"),
        "embed --data documents --encoder minilm --device cpu --block-rows 16",
        "convert import --hf model --output checkpoint",
        "rank --recipe recipe.yaml --save-interval 1",
        "rank --recipe flow.yaml",
        COMMANDS["export head"].replace("--output out", "--output headed"),
    ]
    for step in steps + [Program(line) for line in lines]:
        ended = run(step, folder)
        if ended.code != 0:
            raise RuntimeError(f"{step}: {ended.error[-2000:]}")


def _write_texts(folder: Path) -> None:
    from megatron_sfr.demo.world import World

    rows = list(itertools.islice(World(topics=1).finetuning(), 16))
    rows[1]["messages"] = [{"role": "system", "content": "Be kind."}, *rows[1]["messages"], *rows[2]["messages"]]
    texts = [row["messages"][-1]["content"] for row in rows]
    pairs = [(row["messages"][0]["content"], row["messages"][-1]["content"]) for row in rows]
    tasks = [
        {"task_id": "T/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    assert f() == 1"},
        {"task_id": 1, "text": "add", "test_list": ["assert add(1, 2) == 3"], "code": "def add(a, b): return a + b"},
    ]
    asked = {"model": "m", "temperature": 0.5}
    replies = [
        {"task_id": "T/0", "completion": "    return 1\n", **asked},
        {"task_id": 1, "completion": "def add(a, b):\n    return a + b", **asked},
    ]
    files: dict[str, list[Any]] = {
        "chats": rows,
        "sharegpt": [{"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]} for a, b in pairs],
        "alpaca": [{"instruction": a, "input": "", "output": b} for a, b in pairs],
        "texts": [{"text": text} for text in texts],
        "prompts": [{"prompt": "red?", "persona": "poet"}, {"messages": [{"role": "user", "content": "blue?"}]}],
        "gaps": [{"prefix": "red ", "suffix": " blue", "length": 4}, {"suffix": "sky", "length": 3}],
        "tasks": tasks,
        "replies": replies,
    }
    for name, records in files.items():
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _write_recipes(folder: Path) -> None:
    plain = {key: value for key, value in RECIPE.items() if not key.startswith("sfr")}
    longer = {"seq_length": SEQ_LENGTH + 2, "max_position_embeddings": SEQ_LENGTH + 2}
    flow = plain | longer | {"training_task": "kl-flow", "save": "flow"}
    for name, recipe in {"recipe": RECIPE, "flow": flow}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def _write_model() -> int:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megatron_sfr.demo.train_tokenizer import train_tokenizer

    torch.manual_seed(1)
    tokenizer = train_tokenizer(Path("chats.jsonl").read_text(encoding="utf-8").splitlines(), VOCABULARY)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=SEQ_LENGTH,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained("model")
    tokenizer.save_pretrained("model")
    return 0
