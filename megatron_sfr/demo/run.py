"""The demo's pipeline: world, data, training, export, sampling, comparison. A rerun skips finished steps."""

import json
import re
import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

import yaml
from transformers import GenerationConfig, Qwen3Config

from megatron_sfr.data.chat.rendered_turns import persona_turn
from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.data.targets.embed import EmbedOptions, embed
from megatron_sfr.data.targets.encoder import Encoder, EncoderOptions
from megatron_sfr.demo.scale import Scale
from megatron_sfr.demo.train_tokenizer import train_tokenizer
from megatron_sfr.demo.truth import WorldTruth
from megatron_sfr.demo.world import PERSONAS, Record
from megatron_sfr.evaluation.compare.curves import Scorer
from megatron_sfr.evaluation.compare.evaluate_models import sample_and_write
from megatron_sfr.evaluation.compare.questions import EvaluationOptions
from megatron_sfr.evaluation.compare.report import Axes
from megatron_sfr.evaluation.generate.engines import HuggingFace
from megatron_sfr.evaluation.generate.prompts import Asked, ask, read_asked
from megatron_sfr.evaluation.generate.sampling import SamplingOptions
from megatron_sfr.hf.export_hf import export_hf
from megatron_sfr.hf.families.family_registry import megatron_flags
from megatron_sfr.hf.hf_folder import read_config
from megatron_sfr.hf.megatron.tracker import newest
from megatron_sfr.launch import train
from megatron_sfr.storage.atomic import replacing

ENCODER = "minilm"
VOCABULARY = 2048  # upper bound of the tokenizer's vocabulary
STAGES = 2
MODELS = {"CE": "ce", "CE+SFR": "sfr"}  # the baseline first
KINDS = ("seen", "near", "far")
AXES = tuple(Axes("precision", f"coverage, {kind}") for kind in ("far", "near", "seen"))
PREPARE = PrepareOptions(seq_length=112, stride=16, horizons=((1, 24),), min_segment_length=8)


def demo(output: Path, scale: Scale, *, verbose: bool = False) -> None:
    """Runs the unfinished steps of the demo in `output` and prints its results."""
    started = time.monotonic()
    _claim(output, scale)
    print(f"A world of {len(PERSONAS)} personas and {len(scale.world.questions)} prompts -> {output}", flush=True)
    architecture = _write_world(output, scale)
    _prepare(output, architecture)
    recipes = _write_recipes(output, scale, architecture)
    for name, recipe in recipes.items():
        if not _is_trained(output / "runs" / name, recipe):
            train(recipe, STAGES, verbose=verbose, title=name)
        if not (output / "models" / name).exists():
            export_hf(output / "runs" / name, output / "models" / name, like=architecture, progress=False)
    if (output / "comparison" / "evaluation.json").exists():
        print((output / "comparison" / "report.md").read_text(encoding="utf-8"))
    else:
        _compare(output, scale)
    _farewell(output, scale, time.monotonic() - started)


def _claim(output: Path, scale: Scale) -> None:
    """Records the demo's settings in the folder; ValueError if it holds something else."""
    settings = json.loads(json.dumps(asdict(scale) | {"prepare": asdict(PREPARE)}))
    record = output / "demo.json"
    if record.exists():
        if json.loads(record.read_text(encoding="utf-8")) != settings:
            raise ValueError(f"{output} holds a demo with other settings; remove it or choose another --output")
        return
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and is not a demo folder; choose another --output")
    with replacing(record) as file:
        json.dump(settings, file, indent=1)


def _write_world(output: Path, scale: Scale) -> Path:
    """Writes data/*.jsonl, and architecture/ with the model's config and tokenizer."""
    world = scale.world
    records = {"pretraining": list(world.pretraining(scale.pretraining_rows)), "finetuning": list(world.finetuning())}
    records |= {f"validation-{kind}": list(world.validation(scale.asked, kind)) for kind in KINDS}
    for name, content in records.items():
        with replacing(output / "data" / f"{name}.jsonl") as file:
            file.writelines(json.dumps(record) + "\n" for record in content)
    architecture = output / "architecture"
    if not (architecture / "config.json").exists():
        tokenizer = train_tokenizer(_texts([*records["pretraining"], *records["finetuning"]]), VOCABULARY)
        tokenizer.save_pretrained(architecture)
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        GenerationConfig(do_sample=True, **ends).save_pretrained(architecture)
        Qwen3Config(
            architectures=["Qwen3ForCausalLM"],
            vocab_size=len(tokenizer),
            hidden_size=scale.width,
            intermediate_size=3 * scale.width,
            num_hidden_layers=4,
            num_attention_heads=scale.width // 32,
            num_key_value_heads=scale.width // 64,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            **ends,
        ).save_pretrained(architecture)
    return architecture


def _texts(records: Iterable[Record]) -> Iterator[str]:
    """All texts that the chat template is applied to."""
    yield from ("system", "user", "assistant")
    yield from (persona_turn(persona)["content"] for persona in PERSONAS)
    yield from (message["content"] for record in records for message in record["messages"])


def _prepare(output: Path, architecture: Path) -> None:
    """Writes prepared/pretraining, and prepared/finetuning with its targets. Finished folders are kept."""
    for name in ("pretraining", "finetuning"):
        prepare([output / "data" / f"{name}.jsonl"], output / "prepared" / name, architecture, PREPARE, progress=False)
    embed(output / "prepared" / "finetuning", ENCODER, EmbedOptions())


def _write_recipes(output: Path, scale: Scale, architecture: Path) -> dict[str, Path]:
    """Writes recipes/*.yaml: the package's recipes with paths, the model's shape and the scale filled in."""
    model = yaml.safe_dump(megatron_flags(read_config(architecture)), sort_keys=False)
    written = {}
    for name, steps in (("base", scale.pretraining_steps), *((name, scale.finetuning_steps) for name in ("ce", "sfr"))):
        text = (files("megatron_sfr.demo") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        values = {"STEPS": steps, "SEQ_LENGTH": PREPARE.seq_length, "WARMUP": scale.warmup, "MEASURE": scale.measure}
        for key, value in values.items():
            text = text.replace(key, str(value))
        text = re.sub(r"OUTPUT([\w/]*)", lambda path: json.dumps(f"{output}{path[1]}"), text)  # any path, last
        written[name] = output / "recipes" / f"{name}.yaml"
        with replacing(written[name]) as file:
            file.write(f"{text}\n# The model: {architecture / 'config.json'}\n{model}")
    return written


def _is_trained(save: Path, recipe: Path) -> bool:
    """Whether the run's newest complete checkpoint is from its last step."""
    checkpoint = newest(save)
    steps = yaml.safe_load(recipe.read_text(encoding="utf-8"))["train_iters"]
    return checkpoint is not None and checkpoint.step >= steps


def _compare(output: Path, scale: Scale) -> None:
    """Writes comparison/: both fine-tuned models at all temperatures, judged by the world's exact rules."""
    options = EvaluationOptions(
        sampling=SamplingOptions(samples=scale.samples, max_new_tokens=PREPARE.seq_length, batch_size=256),
        temperatures=scale.temperatures,
        pairs=8,
        embedded=3,
        embedded_prompts=2,
    )
    asked = [Asked(ask(question.text, persona)) for question in scale.asked for persona in PERSONAS]
    sets = {kind: read_asked(output / "data" / f"validation-{kind}.jsonl") for kind in KINDS}
    scorer = Scorer(asked, sets, options, Encoder(ENCODER, EncoderOptions()), WorldTruth(scale.world))
    sample_and_write(
        HuggingFace({label: output / "models" / name for label, name in MODELS.items()}, device="cpu"),
        scorer,
        AXES,
        output / "comparison",
        title="Persona world: coverage of correct replies against precision",
        picture="comparison.png",
        processes=len(MODELS),
    )


def _farewell(output: Path, scale: Scale, seconds: float) -> None:
    """Prints where the results are, and a command that prompts the model."""
    model = output / "models" / "sfr"
    talk = ["megatron-sfr", "generate", "--model", str(model), "--prompt", scale.asked[0].text, "--persona", "poet"]
    print(f"\npicture  {output / 'comparison' / 'comparison.png'}")
    print(f"report   {output / 'comparison' / 'report.md'}")
    print(f"models   {output / 'models'}: {', '.join(('base', *MODELS.values()))} (Hugging Face format)")
    print(f"talk     {shlex.join([*talk, '--temperature', '0.7', '--samples', '3'])}")
    print(f"time     {seconds / 60:.1f} minutes")
