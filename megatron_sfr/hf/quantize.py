"""Calibrates a model for FP8 or INT8 with NVIDIA's Model Optimizer, and compares its logits with the original's.

The output has Model Optimizer's format: the weights, and `modelopt_state.pth`, which its restore reads. Quantized
products are simulated on any device. Optional: pip install "megatron-sfr[quant]".
"""

from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_sfr.data.chat.conversation import encode_samples, read_conversations
from megatron_sfr.data.chat.template_options import SampleOptions
from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.hf.export_hf import copy_companions
from megatron_sfr.hf.families.family_registry import family_of
from megatron_sfr.hf.hf_folder import CONFIG, new_folder, read_config
from megatron_sfr.storage.user_files import loading

FORMATS = {"fp8": "FP8_DEFAULT_CFG", "int8": "INT8_SMOOTHQUANT_CFG"}
"""Model Optimizer's configurations: E4M3 per tensor; INT8 weights per channel, with smoothed activations."""


@dataclass(frozen=True)
class QuantizeReport:
    """Difference between the quantized logits and the original's in bf16, on conversations not used to calibrate."""

    rms: float
    """Root mean square of the difference, relative to that of the logits."""
    largest: float
    """Largest difference of a logit."""
    agreement: float
    """Share of positions at which both models have the same most likely token."""
    calibrated: int
    compared: int
    """Conversations."""


def quantize_hf(
    source: Path,
    output: Path,
    *,
    format: Literal["fp8", "int8"],
    calibration: Path,
    samples: int = 256,
    length: int = 512,
    force: bool = False,
) -> QuantizeReport:
    """Writes `output` and restores it. Raises ValueError, and keeps nothing, unless the logits are equal bit for bit.

    calibration: JSONL of conversations. Of the first `samples`, every eighth is for measuring, the others calibrate.
    """
    mtq, mto = _optimizer("quantization"), _optimizer("opt")
    if family_of(read_config(source)).dimensions(read_config(source)).experts:
        raise ValueError(f"{source}: experts are not quantised here")
    rows = _tokens(source, calibration, samples, length)
    held, used = rows[::8], [row for i, row in enumerate(rows) if i % 8]
    mto.enable_huggingface_checkpointing()
    with new_folder(output, mark=CONFIG, force=force) as folder:
        model = _load(source)
        wanted = _logits(model, held)
        mtq.quantize(model, getattr(mtq, FORMATS[format]), lambda model: [model(row) for row in used])
        found = _logits(model, held)
        model.save_pretrained(folder)
        copy_companions(source, folder)
        del model
        if not all(torch.equal(a, b) for a, b in zip(_logits(_load(folder), held), found, strict=True)):
            raise ValueError(f"{output}: what was written restores to another model: nothing is kept")
    a, b = torch.cat(found), torch.cat(wanted)
    return QuantizeReport(
        rms=((a - b).square().mean() / b.square().mean()).sqrt().item(),
        largest=(a - b).abs().max().item(),
        agreement=(a.argmax(-1) == b.argmax(-1)).float().mean().item(),
        calibrated=len(used),
        compared=len(held),
    )


def _optimizer(part: str) -> Any:
    try:
        return import_module(f"modelopt.torch.{part}")
    except ImportError as e:
        raise ValueError(f'quantisation needs nvidia-modelopt ({e}): pip install "megatron-sfr[quant]"') from e


def _tokens(source: Path, calibration: Path, samples: int, length: int) -> list[Tensor]:
    """Token ids [1, S] of each conversation, truncated to `length`."""
    tokenizer = load_tokenizer(str(source))
    conversations = islice(read_conversations(calibration), samples)
    # The tokens of all turns, which every chat template can write.
    whole = SampleOptions(turns="last", reply_end="next-turn")
    encoded = [encode_samples(x, tokenizer, whole)[0] for x in conversations]
    rows = [torch.tensor(sample.tokens[:length], dtype=torch.int64)[None] for sample in encoded]
    if len(rows) < 2:
        raise ValueError(f"{calibration}: {len(rows)} conversations; at least 2 are needed, some hundreds are good")
    return rows


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with loading(f"cannot load the model in {folder}", "give a folder that transformers loads"):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@torch.no_grad()
def _logits(model: Any, rows: list[Tensor]) -> list[Tensor]:
    """Logits in fp32, [S, V] for each conversation."""
    return [model(row).logits[0].float() for row in rows]
