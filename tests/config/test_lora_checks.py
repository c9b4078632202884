"""LoRA's options: what they adapt, what does not go together, and which frozen weights a run may resume with."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_sfr.config.lora_checks import base_fingerprint
from megatron_sfr.config.settings import read_settings
from megatron_sfr.model.lora.options import LoRAOptions
from megatron_sfr.storage.model_folders import SAMPLE_BYTES

from .test_settings import write

LORA = {"lora_rank": 8, "lora_base": "base"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "scale without rank": ({"lora_alpha": 4.0}, "lora_alpha has no effect without lora_rank"),
    "base without rank": ({"lora_base": "base"}, "lora_base has no effect without lora_rank"),
    "no base": ({"lora_rank": 8}, "the frozen weights are read at every start; name them as lora_base"),
    "two bases": (LORA | {"sfr_hf_load": "hf"}, "lora_base and sfr_hf_load both name the frozen weights"),
    "rank": (LORA | {"lora_rank": 0}, "`?lora_rank`? = 0: give at least 1"),
    "alpha": (LORA | {"lora_alpha": 0.0}, r"`?lora_alpha`? = 0\.0: give a number above 0"),
    "dropout": (LORA | {"lora_dropout": 1.0}, r"`?lora_dropout`? = 1\.0: choose at least 0 and below 1"),
    "targets": (LORA | {"lora_targets": "qkv,"}, "`?lora_targets`? = 'qkv,': give 'all'"),
    "prediction": (LORA | {"mtp_num_layers": 1}, "mtp_num_layers is not supported with lora_rank yet"),
    "Muon": (LORA | {"optimizer": "muon"}, "optimizer muon is not supported with lora_rank yet"),
    "groups": (
        LORA | {"group_query_attention": True, "num_query_groups": 2, "tensor_model_parallel_size": 4},
        "tensor_model_parallel_size 4 cuts inside the 2 groups",
    ),
    "format": (LORA | {"ckpt_format": "torch"}, "checkpoints of adapters are written as torch_dist only"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused(name: str, tmp_path: Path) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        read_settings(write(tmp_path, **changes))


def test_options_are_accepted(tmp_path: Path) -> None:
    recipe = read_settings(write(tmp_path, **LORA, lora_targets="qkv,fc2")).recipe
    assert (recipe["lora_rank"], recipe["lora_targets"]) == (8, "qkv,fc2")
    both = {"lora_rank": 8, "sfr_hf_load": "hf", "pretrained_checkpoint": "adapters"}  # the base, and adapters for it
    assert read_settings(write(tmp_path, **both)).recipe["pretrained_checkpoint"] == "adapters"


NAMES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.experts.linear_fc2")


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [("all", NAMES), ("qkv, fc2", NAMES[::3]), ("self_attention.*", NAMES[:2]), ("mlp.experts.*,proj", NAMES[1::2])],
)
def test_targets_name_layers(targets: str, adapted: tuple[str, ...]) -> None:
    options = LoRAOptions(rank=8, targets=targets)
    assert tuple(name for name in NAMES if options.adapts(name)) == adapted


def test_fingerprint_distinguishes_weights_and_survives_a_copy(tmp_path: Path) -> None:
    def fingerprint(folder: str, middle: bytes) -> str | None:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        content = b"0" * SAMPLE_BYTES * 8 + middle + b"0" * SAMPLE_BYTES * 8
        (tmp_path / folder / "model.safetensors").write_bytes(content)
        return base_fingerprint(Namespace(lora_rank=8, lora_base=None, sfr_hf_load=str(tmp_path / folder)))

    first = fingerprint("a", b"weights")
    assert fingerprint("b", b"weights") == first
    assert fingerprint("c", b"others!") != first
    assert base_fingerprint(Namespace(lora_rank=None)) is None
