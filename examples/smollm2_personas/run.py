"""The example from the package to the page, stage by stage: python -m examples.smollm2_personas.run (`make smollm2`).

A stage is one command, shown before it runs. One whose result is there is skipped, and an interrupted one resumes.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from examples.dictionary_styles.study.materials import LAST, unpack
from examples.smollm2_personas import page
from examples.smollm2_personas.fetch import GGUF, fetch
from megatron_sfr.data.targets.store import DEFAULT, STATISTICS
from megatron_sfr.runtime.lifetime import tied
from megatron_sfr.storage.atomic import replacing

ROOT = Path("runs/smollm2_personas")  # the recipes name it too
PACKAGES = Path("runs/dictionary_styles/packages")  # shared with examples/dictionary_styles
HERE = Path("examples/smollm2_personas")
MODEL = ROOT / "SmolLM2-135M-Instruct"
LENGTHS = "--seq-length 256 --stride 16 --horizons 1:64 --min-segment-length 8 --skip-bad-rows"
MODELS = {"before": MODEL, "CE": ROOT / "ce-hf", "CE+SFR": ROOT / "sfr-hf"}
NAMED = {name: f"{name}={folder}" for name, folder in MODELS.items()}


@dataclass(frozen=True)
class Stage:
    """result: what is there once the stage is done. action: a command, or a function and what to call it."""

    name: str
    result: Path
    action: str | Callable[[], object]


def prepared(side: str) -> list[Stage]:
    """Tokens and loss masks of one side of the text by the model's own chat template, and its targets."""
    data = ROOT / side
    tokens = f"megatron-sfr prepare --input {ROOT}/text/{side}.jsonl --tokenizer {MODEL} --output {data} {LENGTHS}"
    embed = f"megatron-sfr embed --data {data} --encoder minilm --dtype bfloat16"
    return [
        Stage(f"tokens of {side}", data / "manifest.json", tokens),
        Stage(f"targets of {side}", data / DEFAULT / STATISTICS, embed),
    ]


def trained(name: str, *changes: str) -> list[Stage]:
    """A run over two pipeline stages, and its export."""
    recipes = " ".join(f"--recipe {recipe}" for recipe in (ROOT / "model.yaml", *(HERE / f"{x}.yaml" for x in changes)))
    train = f"megatron-sfr train {HERE}/ce.yaml {recipes} --nproc 2"
    export = f"megatron-sfr convert export --checkpoint {ROOT}/{name} --like {MODEL} --output {ROOT}/{name}-hf"
    done = ROOT / f"{name}-hf" / "config.json"  # the checkpoints are not needed after the export
    return [Stage(f"train {name}", done, train), Stage(f"export {name}", done, export)]


def stages() -> list[Stage]:
    text = f"python -m examples.dictionary_styles.prepare --dictionaries {PACKAGES} --output {ROOT}/text"
    text += " --max-per-persona 250 --max-senses 3 --validation-share 0.15 --prompts 24"
    asked = f"--max-new-tokens 64 --output {ROOT}"
    generate = f"megatron-sfr generate --model {' '.join(NAMED.values())} --prompts {ROOT}/questions.jsonl"
    evaluate = f"megatron-sfr evaluate --model {NAMED['CE']} {NAMED['CE+SFR']} {NAMED['before']} --data {ROOT}/text"
    return [
        Stage("dictionaries", PACKAGES / LAST, partial(unpack, PACKAGES)),
        Stage("the model's package", ROOT / GGUF, partial(fetch, ROOT / GGUF)),
        Stage("the model", MODEL / "config.json", f"megatron-sfr convert dequantize {ROOT}/{GGUF} --output {MODEL}"),
        Stage("text", ROOT / "text" / "report.json", text),
        *prepared("train"),
        *prepared("validation"),
        Stage(
            "the model's recipe", ROOT / "model.yaml", f"megatron-sfr convert recipe --hf {MODEL} > {ROOT}/model.yaml"
        ),
        *trained("ce"),
        *trained("sfr", "sfr"),
        Stage("questions", ROOT / "questions.jsonl", partial(page.write_questions, ROOT)),
        Stage("replies", ROOT / "replies.jsonl", f"{generate} --samples 1 --temperature 0.7 {asked}/replies.jsonl"),
        Stage("page", ROOT / "page.html", partial(page.write_page, ROOT, list(MODELS))),
        Stage(
            "evaluation",
            ROOT / "evaluation" / "evaluation.json",
            f"{evaluate}/prompts.jsonl --limit 16 --samples 4 --temperatures 0.6 0.9 {asked}/evaluation",
        ),
    ]


def run(stage: Stage) -> None:
    """Raises ValueError if its command fails, which has printed why, and KeyboardInterrupt if it was stopped."""
    if not isinstance(stage.action, str):
        stage.action()
        return
    print(f"$ {stage.action}", flush=True)
    command, _, output = stage.action.partition(" > ")
    program, *rest = shlex.split(command)
    words = [sys.executable, *(["-m", "megatron_sfr.cli"] if program == "megatron-sfr" else []), *rest]
    if not output:
        code = subprocess.run(tied(words), check=False).returncode
    else:
        done = subprocess.run(tied(words), check=False, stdout=subprocess.PIPE, text=True)
        code = done.returncode
        if not code:
            with replacing(Path(output)) as file:
                file.write(done.stdout)
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise ValueError(f"{stage.name}: the command above ended with exit code {code}")


def main() -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    ROOT.mkdir(parents=True, exist_ok=True)
    path = ROOT / "seconds.json"
    seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    todo = stages()
    try:
        for number, stage in enumerate(todo, 1):
            if stage.result.exists():
                continue
            print(f"[{number}/{len(todo)}] {stage.name}", flush=True)
            began = time.monotonic()
            try:
                run(stage)
            finally:
                seconds[stage.name] = seconds.get(stage.name, 0.0) + round(time.monotonic() - began, 1)
                with replacing(path) as file:
                    json.dump(seconds, file, indent=1)
    except (ValueError, OSError) as error:
        print(f"smollm2: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsmollm2: stopped; the same command resumes it", file=sys.stderr)
        return 130
    print(f"replies  {ROOT / 'page.html'}")
    print(f"scores   {ROOT / 'evaluation' / 'report.html'}")
    print(f"models   {', '.join(str(folder) for folder in MODELS.values())} (Hugging Face format)")
    print(f"time     {sum(seconds.values()) / 60:.1f} minutes, all calls together")
    return 0


if __name__ == "__main__":
    sys.exit(main())
