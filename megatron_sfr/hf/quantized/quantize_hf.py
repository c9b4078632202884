"""Calibrates a model with NVIDIA's Model Optimizer, and writes it for inference engines or for its own restore.

For engines: Model Optimizer's unified Hugging Face export, in real FP8 or NVFP4. Simulated: bf16 weights and
`modelopt_state.pth`, whose restore rounds them on any device. Optional: pip install "megatron-sfr[quant]".
"""

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sfr.data.chat.conversation import encode_samples, read_conversations
from megatron_sfr.data.chat.template_options import SampleOptions
from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.hf.config_values import Config
from megatron_sfr.hf.export_hf import copy_companions
from megatron_sfr.hf.families.family_registry import family_of
from megatron_sfr.hf.hf_folder import CONFIG, load_model, new_folder, read_config
from megatron_sfr.hf.quantized.accuracy import Accuracy, accuracy, logits_of
from megatron_sfr.hf.quantized.engine_folder import WeightErrors, linear_layers, load_folder, write_config
from megatron_sfr.hf.quantized.layer_format import FORMATS, Format, Name
from megatron_sfr.storage.provenance import contents_of
from megatron_sfr.storage.user_files import loading

STATE = "modelopt_state.pth"
_UNQUANTIZED = "start from the unquantized model"


@dataclass(frozen=True)
class QuantizeReport:
    """A quantized folder, and how it differs from the original in bf16."""

    accuracy: Accuracy
    """On conversations that were not used to calibrate."""
    calibrated: int
    """Conversations."""
    bytes: int
    """Size of the weights."""
    original_bytes: int
    weights: WeightErrors | None
    """None for a simulated folder, whose weights are the original's."""


def quantize_hf(
    source: Path,
    output: Path,
    *,
    format: Name,
    calibration: Path,
    samples: int,
    length: int,
    simulated: bool,
    force: bool,
) -> QuantizeReport:
    """Writes `output`, reads it back and compares it with the original. Keeps nothing if it is not as it has to be.

    Args:
        calibration: JSONL of conversations. Of the first `samples`, every eighth is measured, the others calibrate.
        length: tokens to read of each conversation.
        simulated: write Model Optimizer's own form, which it restores on any device, instead of the one for engines.
    Raises:
        ValueError: the model cannot be quantized, or what was written is not what was calibrated.
    """
    kind = FORMATS[format]
    _check(source, output, format, simulated)
    mtq, mto = _optimizer("quantization"), _optimizer("opt")
    rows = _tokens(source, calibration, samples, length)
    held, used = rows[::8], [row for i, row in enumerate(rows) if i % 8]
    if simulated:
        mto.enable_huggingface_checkpointing()
    identity = {"command": "convert quantize", "hf": contents_of(source), "format": format, "simulated": simulated}
    with new_folder(output, force=force, identity=identity) as folder:
        model = load_model(source, torch.bfloat16)
        _check_widths(source, model, kind)
        originals = [logits_of(model, row) for row in held]
        with (
            redirect_stdout(sys.stderr),
            loading(f"Model Optimizer cannot quantize {source}", "see its messages above"),
        ):
            mtq.quantize(model, getattr(mtq, kind.configuration), lambda model: _run(model, used))
        errors: WeightErrors | None = None
        if simulated:
            model = _write_simulated(model, source, folder, held)
        else:
            errors, model = _write_for_engines(model, source, folder, kind)
        return QuantizeReport(
            accuracy=accuracy(model, held, originals),
            calibrated=len(used),
            bytes=_weight_bytes(folder),
            original_bytes=_weight_bytes(source),
            weights=errors,
        )


def _write_for_engines(model: Any, source: Path, folder: Path, kind: Format) -> tuple[WeightErrors, Any]:
    """Model Optimizer's export. Returns the original model with the numbers of the folder."""
    export = _optimizer("export").export_hf_checkpoint
    hint = "see its messages above"
    with redirect_stdout(sys.stderr), torch.no_grad(), loading(f"Model Optimizer cannot export {source}", hint):
        export(model, dtype=torch.bfloat16, export_dir=folder)
    write_config(folder, source)
    copy_companions(source, folder)
    plain = load_model(source, torch.bfloat16)
    return load_folder(plain, folder, kind), plain


def _write_simulated(model: Any, source: Path, folder: Path, held: list[Tensor]) -> Any:
    """Model Optimizer's own form. Returns the restored model, whose logits equal those of the calibrated one."""
    expected = [logits_of(model, row) for row in held]
    model.save_pretrained(folder)
    copy_companions(source, folder)
    restored = load_model(folder, torch.bfloat16)
    if not all(torch.equal(logits_of(restored, row), logits) for row, logits in zip(held, expected, strict=True)):
        raise ValueError(f"{source}: what was written restores to another model: nothing is kept")
    return restored


def _check(source: Path, output: Path, format: Name, simulated: bool) -> None:
    config = read_config(source)
    if FORMATS[format].algorithm is None and not simulated:
        raise ValueError(
            f"--format {format}: engines load no {format} folder of Model Optimizer; add --simulated to evaluate the "
            "format, or choose fp8 or nvfp4"
        )
    if simulated and format == "nvfp4":
        raise ValueError(
            "--format nvfp4 --simulated: Model Optimizer rounds to NVFP4 only in a CUDA kernel, and the model is on "
            "the CPU; leave --simulated out, or choose fp8 or int8"
        )
    if (found := _quantized_as(source, config)) is not None:
        raise ValueError(f"{source} is quantized already ({found}): {_UNQUANTIZED}")
    if output.resolve() == source.resolve():
        raise ValueError(f"{output} is the model to quantize: choose another --output")
    if family_of(config).dimensions(config).experts:
        raise ValueError(f"{source}: experts are not quantized here")


def _quantized_as(source: Path, config: Config) -> str | None:
    """How a folder is quantized; None if it is not."""
    if (source / STATE).is_file():
        return f"it has {STATE}"
    found = config.get("quantization_config")
    if not found:
        return None
    return str(found.get("quant_algo") or found.get("quant_method")) if isinstance(found, dict) else CONFIG


def _check_widths(source: Path, model: Any, kind: Format) -> None:
    for name, module in linear_layers(model).items():
        if module.in_features % kind.block:
            raise ValueError(
                f"{source}: {name} has {module.in_features} inputs, and {kind.algorithm} needs a multiple of "
                f"{kind.block}: choose fp8"
            )


def _optimizer(part: str) -> Any:
    try:
        return import_module(f"modelopt.torch.{part}")
    except ImportError as e:
        raise ValueError(f'quantization needs nvidia-modelopt ({e}): pip install "megatron-sfr[quant]"') from e


def _tokens(source: Path, calibration: Path, samples: int, length: int) -> list[Tensor]:
    """Token ids [1, S] of each conversation, truncated to `length`."""
    if samples < 2 or length < 2:
        raise ValueError(f"--samples {samples}, --length {length}: give at least 2 of each")
    tokenizer = load_tokenizer(str(source))
    conversations = islice(read_conversations(calibration), samples)
    # The tokens of all turns, which every chat template can write.
    whole = SampleOptions(turns="last", reply_end="next-turn")
    encoded = [encode_samples(x, tokenizer, whole)[0] for x in conversations]
    rows = [torch.tensor(sample.tokens[:length], dtype=torch.int64)[None] for sample in encoded]
    if len(rows) < 2:
        raise ValueError(f"{calibration}: {len(rows)} conversations; at least 2 are needed, some hundreds are good")
    return rows


@torch.no_grad()
def _run(model: Any, rows: list[Tensor]) -> None:
    for row in rows:
        model(row)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
