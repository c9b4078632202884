"""Sample replies from Hugging Face models.

Replies to one prompt are printed; replies to a file of prompts are written to a JSONL file. Equal commands give equal
replies, and several models share their random numbers. The same command resumes a stopped run and writes the same file.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sfr.cli.model_args import MODEL, add_sampling_arguments, model_folders, sampling_options

if TYPE_CHECKING:
    from megatron_sfr.data.chat.template_options import TemplateOptions
    from megatron_sfr.evaluation.generate.prompts import Prompt
    from megatron_sfr.evaluation.generate.sampling import SamplingOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, **MODEL)
    add_sampling_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="one user turn; the replies are printed")
    what.add_argument(
        "--prompts", type=Path, metavar="FILE", help="JSONL records with prompt or messages, and optionally persona"
    )
    parser.add_argument("--persona", metavar="NAME", help="persona that answers --prompt")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="sampling temperature; 0: greedy decoding (%(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the JSONL file to write")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers", help="(%(default)s)")


def run(args: argparse.Namespace) -> int:
    from megatron_sfr.evaluation.generate.prompts import ask, read_prompts

    if args.prompts is not None and args.persona is not None:
        raise ValueError("--persona goes with --prompt; in a file each record names its own")
    if (args.prompts is None) != (args.output is None):
        raise ValueError("--prompts needs --output FILE for the replies; --prompt prints them and takes no --output")
    options = sampling_options(args)
    place = options.template.persona_as
    prompts = read_prompts(args.prompts, place) if args.prompts else [ask(args.prompt, args.persona, place)]
    folders = model_folders(args.model)
    answer = _write if args.output else _print
    answer(args, folders, prompts, options)
    return 0


def _write(
    args: argparse.Namespace, folders: dict[str, Path], prompts: "list[Prompt]", options: "SamplingOptions"
) -> None:
    """Writes every reply of every model as a line, and resumes an earlier run."""
    import json
    from dataclasses import asdict

    from tqdm import tqdm

    from megatron_sfr.evaluation.generate.sampling import record
    from megatron_sfr.evaluation.generate.transformers_engine import check_folder
    from megatron_sfr.storage.provenance import contents_of
    from megatron_sfr.storage.resumable import is_finished, resumable

    load_model, sample = _engine(args, options.template)
    each = len(prompts) * options.samples
    for folder in folders.values():
        check_folder(folder)
    identity = {
        "models": {name: contents_of(folder) for name, folder in folders.items()},
        "prompts": [prompt.messages for prompt in prompts],
        "personas": [prompt.persona for prompt in prompts],
        "options": asdict(options) | {"device": args.device, "dtype": args.dtype, "engine": args.engine},
    }

    def boundary(lines: int) -> int:
        """Keeps complete batches: an incomplete batch is sampled again, with identical rounding."""
        return lines - lines % each % options.batch_size

    if is_finished(args.output, identity):
        print(f"{args.output} is up to date")
        return
    total = len(folders) * each
    with (
        resumable(args.output, identity, boundary) as (file, done),
        tqdm(total=total, initial=done, unit="reply", dynamic_ncols=True) as bar,
    ):
        for name, folder in list(folders.items())[done // each :]:
            bar.set_description(name)
            model = load_model(name, folder)
            for p, reply in sample(model, prompts, options, start=done % each):
                file.write(json.dumps(record(name, prompts[p], options, reply), ensure_ascii=False) + "\n")
                bar.update()
            done = 0
    print(f"{args.output}: {total:,} replies")


def _print(
    args: argparse.Namespace, folders: dict[str, Path], prompts: "list[Prompt]", options: "SamplingOptions"
) -> None:
    """Prints every model's replies."""
    load_model, sample = _engine(args, options.template)
    for name, folder in folders.items():
        model = load_model(name, folder)
        for _, reply in sample(model, prompts, options):
            print(f"[{name}] {reply.text}" if len(folders) > 1 else reply.text, flush=True)


def _engine(args: argparse.Namespace, template: "TemplateOptions") -> tuple[Any, Any]:
    """(load_model, sample) of the engine. load_model takes a name and a folder, and warns of missing end tokens."""
    from megatron_sfr.evaluation.generate import transformers_engine, vllm_engine
    from megatron_sfr.evaluation.generate.end_token_warning import warn_of_unknown_end

    engine: Any = {"transformers": transformers_engine, "vllm": vllm_engine}[args.engine]

    def load_model(name: str, folder: Path) -> Any:
        model = engine.load_model(name, folder, device=args.device, dtype=args.dtype)
        warn_of_unknown_end(folder, model.tokenizer, model.end_tokens, template)
        return model

    return load_model, engine.sample
