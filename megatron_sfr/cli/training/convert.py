"""Convert weights between Hugging Face folders and Megatron checkpoints, strictly and bit for bit; read GGUF files."""

import argparse
from pathlib import Path

from megatron_sfr.hf.families.family_registry import check_family, check_source, megatron_flags
from megatron_sfr.hf.megatron.tracker import locate
from megatron_sfr.storage.model_folders import check_config, find_gguf
from megatron_sfr.storage.user_files import read_json_object

DTYPES = ("float32", "bfloat16")  # float16 would turn large weights into infinities
SOURCE = "folder of the Hugging Face model, or a GGUF file, which is de-quantized"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser(
        "import", help="Hugging Face folder or GGUF file -> checkpoint for --load in any TP/PP layout"
    )
    verb.add_argument("--hf", type=Path, required=True, metavar="MODEL", help=SOURCE)
    verb.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write, for --load")
    verb.add_argument(
        "--adapter", type=Path, metavar="PEFT_DIR", help="convert this adapter of the model, not the model"
    )
    verb.add_argument("--check", action="store_true", help="read everything back and compare it bit for bit")
    verb.add_argument("--force", action="store_true", help="replace an existing output")

    verb = verbs.add_parser("export", help="checkpoint -> folder that transformers and vLLM load")
    verb.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="--save folder (newest) or iter_N")
    verb.add_argument("--like", type=Path, required=True, metavar="HF_DIR", help="folder with the config and tokenizer")
    verb.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    kind = verb.add_mutually_exclusive_group()
    kind.add_argument("--adapter", action="store_true", help="of a run with LoRA: write a PEFT folder of its adapters")
    kind.add_argument("--merge", action="store_true", help="of a run with LoRA: merge its adapters into the base model")
    verb.add_argument(
        "--base", type=Path, metavar="DIR", help="base model of --merge, HF or Megatron (default: the run's)"
    )
    verb.add_argument("--check", type=Path, metavar="HF_DIR", help="compare logits with this model's")
    verb.add_argument(
        "--tolerance", type=float, help="tolerance of --check, relative to the largest logit (default 1e-5)"
    )
    verb.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: the checkpoint's)")
    verb.add_argument(
        "--max-shard-gb", type=float, default=5.0, metavar="GB", help="largest size of a file (default 5)"
    )
    verb.add_argument("--keep-head", action="store_true", help="write the flow head too: flow_head.safetensors, .json")
    verb.add_argument("--workers", type=int, default=1, metavar="N", help="threads that write files (default 1)")
    verb.add_argument("--force", action="store_true", help="replace an existing output")

    _add_arguments_of_other_formats(verbs)

    verb = verbs.add_parser("recipe", help="print the model part of a recipe")
    verb.add_argument("--hf", type=Path, required=True, metavar="MODEL", help=SOURCE)


def _add_arguments_of_other_formats(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    verb = verbs.add_parser("quantize", help="HF folder -> FP8 or NVFP4 folder for engines, by nvidia-modelopt")
    verb.add_argument("hf", type=Path, metavar="HF_DIR", help="folder of the Hugging Face model")
    verb.add_argument("--format", choices=("fp8", "nvfp4", "int8"), required=True, help="int8 needs --simulated")
    verb.add_argument(
        "--simulated", action="store_true", help="write what modelopt restores on any device, not what engines load"
    )
    verb.add_argument("--calibration", type=Path, required=True, metavar="FILE", help="JSONL of conversations")
    verb.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    verb.add_argument("--samples", type=int, default=256, help="number of conversations to read (%(default)s)")
    verb.add_argument("--length", type=int, default=512, help="tokens to read of each conversation (%(default)s)")
    verb.add_argument("--force", action="store_true", help="replace an existing output")

    verb = verbs.add_parser("dequantize", help="GGUF file -> Hugging Face folder with config and tokenizer")
    verb.add_argument("gguf", type=Path, metavar="GGUF", help="the file, or a folder that holds one")
    verb.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    verb.add_argument("--force", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> int:
    verbs = {
        "import": _import,
        "export": _export,
        "quantize": _quantize,
        "dequantize": _dequantize,
        "recipe": _recipe,
    }
    verbs[args.verb](args)
    return 0


def _import(args: argparse.Namespace) -> None:
    if args.adapter is not None:
        _import_adapter(args)
        return
    check_source(args.hf)
    from megatron_sfr.hf.import_hf import import_hf

    report = import_hf(args.hf, args.output, check=args.check, force=args.force)
    if report.up_to_date:
        print(f"{report.output} is up to date")
    checked = ", read back bit for bit" if report.checked else ""
    print(f"{report.output}: {report.tensors} tensors, {_size(report.bytes)}, {_names(report.dtypes)}{checked}")
    if report.gguf:
        print(report.gguf)
    print(f"train from it with: load: {report.output}, finetune: true, and what `convert recipe --hf {args.hf}` prints")


def _import_adapter(args: argparse.Namespace) -> None:
    if args.check:
        raise ValueError("--check compares a model; leave it out for --adapter")
    check_family(args.hf)
    from megatron_sfr.hf.adapter.import_adapter import import_adapter

    report = import_adapter(args.adapter, args.output, hf=args.hf, force=args.force)
    if report.up_to_date:
        print(f"{report.output} is up to date")
    print(f"{report.output}: {report.tensors} matrices of rank {report.rank}, {_size(report.bytes)}")
    print(
        f"train it further with: pretrained_checkpoint: {report.output}, sfr_hf_load: {args.hf}, "
        f"lora_rank: {report.rank}, lora_alpha: {report.alpha:g}, lora_targets: {report.targets}"
    )


def _export_adapter(args: argparse.Namespace) -> None:
    if args.base or args.check or args.keep_head or args.workers != 1:
        raise ValueError("--base, --check, --keep-head and --workers are for a complete model: leave --adapter out")
    check_family(args.like)
    import torch

    from megatron_sfr.hf.adapter.export_adapter import export_adapter

    dtype = getattr(torch, args.dtype) if args.dtype else None
    report = export_adapter(args.checkpoint, args.output, like=args.like, dtype=dtype, force=args.force)
    if report.up_to_date:
        print(f"{report.output} is up to date")
    print(f"{report.output}: {report.tensors} matrices of rank {report.rank}, {_size(report.bytes)}")
    print(f"from {report.checkpoint}; peft.PeftModel.from_pretrained(base, {str(report.output)!r}) loads it")


def _export(args: argparse.Namespace) -> None:
    locate(args.checkpoint)
    if args.adapter:
        _export_adapter(args)
        return
    if args.tolerance is not None and args.check is None:
        raise ValueError("--tolerance is the tolerance of --check: give --check HF_DIR too")
    if not 0 < args.max_shard_gb < 1e9:
        raise ValueError(f"--max-shard-gb {args.max_shard_gb:g}: give a size in GB, such as 5")
    check_family(args.like)
    import torch

    from megatron_sfr.hf.compare_logits import TOLERANCE, check_logits
    from megatron_sfr.hf.export_hf import export_hf

    report = export_hf(
        args.checkpoint,
        args.output,
        like=args.like,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        shard_bytes=int(args.max_shard_gb * 1e9),
        workers=args.workers,
        head=args.keep_head,
        merge=args.merge,
        base=args.base,
        force=args.force,
    )
    if report.up_to_date:
        print(f"{report.output} is up to date")
    files = report.files[0] if len(report.files) == 1 else f"{len(report.files)} files"
    print(f"{report.output}: {report.tensors} tensors, {_size(report.bytes)}, {_names(report.dtypes)}, in {files}")
    print(f"from {report.checkpoint}; {report.padding} rows of vocabulary padding cut off")
    print(f"left behind: {', '.join(report.dropped) or 'nothing'}")
    if report.end_tokens:
        ids = ", ".join(map(str, report.end_tokens))
        print(f"end tokens: the replies of the training data end on token {ids}, added to eos_token_id")
    if args.check:
        check = check_logits(args.output, args.check, tolerance=TOLERANCE if args.tolerance is None else args.tolerance)
        print(f"checked against {args.check}: {check.logits} logits, the largest {check.largest:.3g}")
        print(f"largest difference {check.difference:.3g}")


def _quantize(args: argparse.Namespace) -> None:
    check_family(args.hf)
    from megatron_sfr.hf.quantized.quantize_hf import quantize_hf

    report = quantize_hf(
        args.hf,
        args.output,
        format=args.format,
        calibration=args.calibration,
        samples=args.samples,
        length=args.length,
        simulated=args.simulated,
        force=args.force,
    )
    sizes = f"{_size(report.original_bytes)} -> {_size(report.bytes)}"
    print(f"{args.output}: {args.format}, calibrated on {report.calibrated} conversations; {sizes}")
    if (errors := report.weights) is None:
        print("simulated: rounded while it computes, restored bit for bit; engines do not load this folder")
    else:
        print(
            f"{errors.weights} weights in {args.format}, read back; rms error relative to bf16: median "
            f"{errors.median:.3g}, largest {errors.worst:.3g} ({errors.worst_name})"
        )
    found = report.accuracy
    print(
        f"loss on {found.compared} other conversations: {found.original_loss:.4f} in bf16, {found.loss:.4f} in "
        f"{args.format}, in nats per token"
    )
    print(
        f"logits: rms of the difference {found.rms:.3g} of theirs, largest {found.largest:.3g}; "
        f"the same most likely token at {found.agreement:.1%} of positions"
    )


def _dequantize(args: argparse.Namespace) -> None:
    from megatron_sfr.hf.gguf.dequantize import dequantize_gguf

    report = dequantize_gguf(args.gguf, args.output, force=args.force)
    if report.up_to_date:
        print(f"{report.output} is up to date")
    print(f"{report.output}: {report.tensors} tensors, {_size(report.bytes)}, with config and tokenizer")
    print(report.gguf)


def _recipe(args: argparse.Namespace) -> None:
    import yaml

    if (gguf := find_gguf(args.hf)) is None:
        path = check_config(args.hf)
        source, config = str(path), read_json_object(path)
    else:
        from megatron_sfr.hf.gguf.gguf_file import read_header, read_model_config

        source, config = str(read_header(gguf)), read_model_config(gguf)
    print(f"# model, from {source}\n{yaml.safe_dump(megatron_flags(config), sort_keys=False)}", end="")


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"


def _names(dtypes: tuple[object, ...]) -> str:
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
