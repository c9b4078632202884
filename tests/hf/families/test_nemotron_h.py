"""Nemotron-H: its flags in upstream's parser, what is refused, and its Mamba layers in upstream's own sections.

Not exercised: upstream's Mamba layers themselves, whose constructor needs CUDA kernels (mamba_ssm, causal_conv1d).
"""

import ast
import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.ssm.utils import _split_tensor_factory

from megatron_sfr.config.model_class_checks import check_stored_model
from megatron_sfr.config.settings import Parser, to_flags
from megatron_sfr.hf.export_hf import export_hf
from megatron_sfr.hf.families.family_registry import FAMILIES, megatron_flags
from megatron_sfr.hf.families.hybrid.layers import mamba
from megatron_sfr.hf.hf_folder import Weights
from megatron_sfr.hf.import_hf import import_hf
from megatron_sfr.hf.mappings import entries
from megatron_sfr.hf.megatron.hybrid_names import comparable
from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint
from megatron_sfr.hf.megatron.megatron_model import disagreement
from tests.hf.models import NEMOTRON_H, save_model, tiny_config

PUBLISHED = {  # the values of Nemotron-H-8B and of Nemotron 3 Nano that their config.json gives in another form
    "hybrid_override_pattern": "M-*ME-M",
    "layers_block_type": None,
    "num_hidden_layers": 7,
    "sliding_window": None,
    "time_step_limit": [0.0, float("inf")],
}
MIXER = "decoder.layers.{layer}.mixer."


def config(**changes: Any) -> dict[str, Any]:
    return tiny_config(NEMOTRON_H).to_dict() | {"architectures": [NEMOTRON_H]} | changes


def parsed(**changes: Any) -> Any:
    """The flags as upstream's parser reads them."""
    parser = Parser()
    return parser.read(to_flags(megatron_flags(config(**changes)), parser))


def test_megatron_takes_the_flags_as_they_are() -> None:
    args = parsed()
    assert (args.model_class, args.hybrid_layer_pattern, args.num_layers) == ("hybrid", "M-*ME-M", None)
    assert (args.hidden_size, args.ffn_hidden_size, args.vocab_size) == (36, 44, 503)
    assert (args.num_attention_heads, args.num_query_groups, args.kv_channels) == (6, 2, 10)
    assert (args.mamba_num_heads, args.mamba_head_dim, args.mamba_num_groups, args.mamba_state_dim) == (8, 7, 4, 5)
    assert (args.position_embedding_type, args.squared_relu, args.swiglu) == ("none", True, False)
    assert (args.normalization, args.layernorm_epsilon, args.add_bias_linear) == ("RMSNorm", 1e-5, False)
    assert (args.num_experts, args.moe_ffn_hidden_size, args.moe_shared_expert_intermediate_size) == (6, 20, 28)
    assert (args.moe_router_topk, args.moe_router_score_function, args.moe_router_topk_scaling_factor) == (
        3,
        "sigmoid",
        2.5,
    )
    assert (args.moe_router_enable_expert_bias, args.untie_embeddings_and_output_weights) == (True, True)


def test_published_configs_say_the_same_in_another_form() -> None:
    assert megatron_flags(config(**PUBLISHED)) == megatron_flags(config())
    older = config(layers_block_type=["mamba", "mlp", "attention"])
    assert megatron_flags(older)["hybrid_layer_pattern"] == "M-*"
    assert "num_experts" not in megatron_flags(older)
    named = {key: value for key, value in config().items() if key != "head_dim"} | {"attention_head_dim": 16}
    assert megatron_flags(named)["kv_channels"] == 16


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"conv_kernel": 2}, "conv_kernel: 2: Megatron or transformers computes 4 only"),
        ({"hidden_dropout": 0.1}, "hidden_dropout"),
        ({"layer_norm_epsilon": 1e-6}, "the norm in Megatron's Mamba layers has 1e-05"),
        ({"layers_block_type": ["mamba", "window"]}, "it has to be a list of linear_attention"),
        ({"layers_block_type": None}, "hybrid_override_pattern is None; it has to be of M"),
        (PUBLISHED | {"hybrid_override_pattern": "MG"}, "hybrid_override_pattern is 'MG'; it has to be of M"),
        (PUBLISHED | {"num_hidden_layers": 8}, "num_hidden_layers describe different layers"),
        ({"layers_block_type": []}, "it has 0 layers"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act: 'silu'"),
        ({"moe_latent_size": 8}, "moe_latent_size: 8: Megatron or transformers computes null only"),
        ({"n_group": 2}, "n_group"),
        ({"n_groups": 3}, "n_groups 3 does not divide mamba_num_heads 8"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "quantized"),
        ({"residual_in_fp32": True}, "residual_in_fp32"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"time_step_limit": [0.01, 1.0]}, "time_step_limit"),
        ({"use_bias": True}, "use_bias"),
        ({"use_conv_bias": False}, "use_conv_bias: False"),
        ({"hidden_size": None}, "config.json has no 'hidden_size'"),
        ({"n_routed_experts": None}, "config.json has no 'n_routed_experts'"),
    ],
)
def test_what_megatron_computes_otherwise_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        megatron_flags(config(**changes))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/, and megatron/ with its import."""
    folder = tmp_path_factory.mktemp("nemotron")
    save_model(folder / "hf", NEMOTRON_H)
    import_hf(folder / "hf", folder / "megatron", progress=False)
    return folder


def saved_by_upstream() -> ast.Module:
    """The code that saves upstream's Mamba layer."""
    return ast.parse(textwrap.dedent(inspect.getsource(MambaMixer.sharded_state_dict)))


def section_names() -> dict[int, list[str]]:
    """The names under which it saves sections of a tensor, by their number."""
    lists = (node.elts for node in ast.walk(saved_by_upstream()) if isinstance(node, ast.List))
    found = [[x.value for x in names if isinstance(x, ast.Constant)] for names in lists]
    return {len(names): names for names in found if names}


def test_the_mapping_has_the_parameters_of_upstreams_mamba_layer() -> None:
    """Fails by name if a new version adds, drops or renames one, or divides others over tensor-parallel ranks."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(MambaMixer.__init__)))
    makers = ("nn.Parameter", "build_module", "ExtendedRMSNorm")
    made = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)]
    tables = [node for node in ast.walk(saved_by_upstream()) if isinstance(node, ast.Dict) and node.keys]
    renamed, divided = sorted(map(ast.literal_eval, tables), key=lambda table: 0 in table.values())
    names = {node.targets[0].attr for node in made if ast.unparse(node.value.func) in makers}
    expected = {renamed.get(name, name) for name in names}
    ours = {x.megatron.removeprefix(MIXER): x for x in mamba("norm", "mixer.")}
    assert {name if name in expected else name.rpartition(".")[0] for name in ours} == expected
    assert [ours[renamed.get(name, name)].tp_dim for name in divided] == list(divided.values())


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_upstreams_sections_of_each_rank_are_chunks_of_the_import(model: Path, tp: int) -> None:
    """A rank's heads and groups, cut from Hugging Face's weights here, by upstream's own function for dividing them."""
    checkpoint, weights = Checkpoint(model / "megatron" / "release"), Weights(model / "hf")
    ends = section_names()
    inner, states, heads = 8 * 7, 4 * 5, 8
    for name, sizes in (
        ("in_proj.weight", (inner, inner, states, states, heads)),
        ("conv1d.weight", (inner, states, states)),
        ("conv1d.bias", (inner, states, states)),
    ):
        parts = weights[f"backbone.layers.3.mixer.{name}"].split(sizes)
        for rank in range(tp):
            local = torch.cat([part.chunk(tp)[rank] for part in parts])
            whole = ShardedTensor.from_rank_offsets(f"decoder.layers.3.mixer.{name}", local, (0, rank, tp))
            sections = _split_tensor_factory(whole, [n // tp for n in sizes], ends[len(sizes)], 0).build()
            assert len(sections) == len(sizes)
            for x in sections:
                assert tuple(checkpoint.tensors[x.key].size) == x.global_shape
                assert torch.equal(checkpoint.read(x.key, x.global_offset, x.local_shape), x.data)


def test_upstream_recognizes_the_import_as_a_hybrid_models(model: Path) -> None:
    """Without the pattern megatron-core 0.19.2 would take its names for GPTModel's and load no Mamba layer."""
    stored = Checkpoint(model / "megatron" / "release").arguments()
    assert (stored["hybrid_layer_pattern"], stored["num_layers"], stored["hidden_size"]) == ("M-*ME-M", 7, 36)
    args = parsed()
    args.hybrid_layer_pattern = "M-*M|E-M"
    assert check_stored_model(args, "start", stored) is False
    args.hybrid_layer_pattern = "M-*E"
    with pytest.raises(ValueError, match=r"pattern M-\*ME-M, this run has M-\*E"):
        check_stored_model(args, "start", stored)


def test_an_export_for_other_layers_is_refused(model: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "hf", NEMOTRON_H, hybrid_override_pattern="M-*ME-*")
    with pytest.raises(ValueError, match=r"trained with hybrid_layer_pattern M-\*ME-M, but the config means M-\*ME-\*"):
        export_hf(model / "megatron", tmp_path / "out", like=other, progress=False)


@pytest.mark.parametrize(
    ("trained", "found"),
    [
        ({"hybrid_layer_pattern": "M-*M|E-M", "mamba_num_groups": 4}, None),
        ({"hybrid_layer_pattern": None}, ("hybrid_layer_pattern", None, "M-*ME-M")),
        ({"hybrid_layer_pattern": "M-*ME-M", "mamba_num_groups": 2}, ("mamba_num_groups", 2, 4)),
        ({"squared_relu": False}, ("squared_relu", False, True)),
        ({"moe_router_topk_scaling_factor": None}, ("moe_router_topk_scaling_factor", None, 2.5)),
    ],
)
def test_what_no_shape_shows_is_compared(trained: dict[str, Any], found: tuple[str, object, object] | None) -> None:
    flags = megatron_flags(config())
    assert disagreement(comparable(trained, flags), flags) == found


def test_entries_are_in_the_order_of_the_model() -> None:
    family = FAMILIES[NEMOTRON_H]
    found = [name for entry in entries(family.mappings(config()), family.dimensions(config())) for name in entry.names]
    layers = [int(name.split(".")[2]) for name in found if "layers" in name]
    assert layers == sorted(layers)
    assert (found[0], found[-1]) == ("backbone.embeddings.weight", "lm_head.weight")
