"""The families that can be converted: one line each. Without torch, so that commands refuse others at once."""

from pathlib import Path

from megatron_sfr.hf.config_values import Config, mapping
from megatron_sfr.hf.families import glm, llama, mistral, phi3, qwen2, qwen3, seed_oss, smollm3
from megatron_sfr.hf.families.hybrid import nemotron_h
from megatron_sfr.hf.families.moe import mixtral, qwen2_moe, qwen3_moe
from megatron_sfr.hf.mappings import Family
from megatron_sfr.storage.model_folders import check_config, find_gguf
from megatron_sfr.storage.user_files import cut, read_json_object, shown

FAMILIES: dict[str, Family] = {
    "GlmForCausalLM": glm.FAMILY,
    "LlamaForCausalLM": llama.FAMILY,
    "MistralForCausalLM": mistral.FAMILY,
    "MixtralForCausalLM": mixtral.FAMILY,
    "NemotronHForCausalLM": nemotron_h.FAMILY,
    "Phi3ForCausalLM": phi3.FAMILY,
    "Qwen2ForCausalLM": qwen2.FAMILY,
    "Qwen2MoeForCausalLM": qwen2_moe.FAMILY,
    "Qwen3ForCausalLM": qwen3.FAMILY,
    "Qwen3MoeForCausalLM": qwen3_moe.FAMILY,
    "SeedOssForCausalLM": seed_oss.FAMILY,
    "SmolLM3ForCausalLM": smollm3.FAMILY,
}
COPIED_CODE = frozenset(["NemotronHForCausalLM", "Phi3ForCausalLM"])
"""Families whose published folders hold a copy of the code that transformers has (`auto_map`)."""


def family_of(config: Config) -> Family:
    """The family that an HF config names. Raises ValueError for an unknown one, listing the known families."""
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ValueError(f"config.json: architectures is {shown(architectures)}; it has to be a list of names")
    for name in architectures:
        if name in FAMILIES:
            _check_class(config, name)
            return FAMILIES[name]
    said = cut(", ".join(architectures)) or f"model_type {shown(config.get('model_type'))}"
    raise ValueError(f"architecture {said}: not converted; known: {', '.join(FAMILIES)}")


def _check_class(config: Config, architecture: str) -> None:
    """Raises ValueError if transformers would build another class from config.json than `architecture` names."""
    kind, family = config.get("model_type"), architecture.removesuffix("ForCausalLM")
    if kind is not None and str(kind).replace("_", "").lower() != family.lower():
        raise ValueError(
            f"config.json: model_type is {shown(kind)}, but architectures names {architecture}: transformers goes by "
            "model_type; correct the one that is wrong"
        )
    code = mapping(config, "auto_map").get("AutoModelForCausalLM")
    if code is not None and architecture not in COPIED_CODE:
        raise ValueError(
            f"config.json: auto_map: the model is computed by custom code, {shown(code)}, which is not converted; "
            f"remove auto_map if transformers' {architecture} computes the same"
        )
    theta = config.get("rope_theta")
    inner = {**mapping(config, "rope_scaling"), **mapping(config, "rope_parameters")}.get("rope_theta")
    if None not in (theta, inner) and theta != inner:
        raise ValueError(
            f"config.json: rope_theta is {shown(theta)}, and {shown(inner)} in rope_parameters: versions of "
            "transformers read one or the other; remove the wrong one"
        )


def megatron_flags(config: Config) -> dict[str, object]:
    """Recipe keys for the model that an HF config.json describes; booleans are store_true flags."""
    return family_of(config).flags(config)


def check_family(folder: Path) -> None:
    """Raises ValueError if a folder has no config.json of a known family."""
    family_of(read_json_object(check_config(folder)))


def check_source(source: Path) -> None:
    """Raises ValueError if a path cannot be imported, as far as config.json tells. GGUF files are checked later."""
    if find_gguf(source) is None:
        megatron_flags(read_json_object(check_config(source)))
