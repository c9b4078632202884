"""Shared by families with experts: the router, each expert's gated MLP, and their flags.

According to megatron-core 0.19.2, grouped experts (Transformer Engine) and sequential ones (the local spec) save the
same names, tensors of [layers, experts, ...]. Only the sequential ones were tested.
"""

from megatron_sfr.hf.config_values import Config, size
from megatron_sfr.hf.families import dense
from megatron_sfr.hf.families.dense import H, M
from megatron_sfr.hf.mappings import EXPERT, Dimensions, Direct, GatedMLP, ParameterMapping


def mlp(router: str, gate: str, up: str, down: str) -> tuple[ParameterMapping, ...]:
    """The weights of a layer after its attention.

    Args:
        router, gate, up, down: Hugging Face's names inside a layer; `{expert}` is an expert's number.
    """
    return (
        Direct(M + "pre_mlp_layernorm.weight", (H + "post_attention_layernorm.weight",), ("hidden",)),
        Direct(M + "mlp.router.weight", (H + router,), ("experts", "hidden")),
        GatedMLP(M + "mlp.experts.experts.linear_fc1.weight", (H + gate, H + up), "expert_ffn"),
        Direct(M + "mlp.experts.experts.linear_fc2.weight", (H + down,), ("hidden", "expert_ffn"), 1),
    )


QWEN_MLP = mlp("mlp.gate.weight", *(f"mlp.experts.{EXPERT}.{name}_proj.weight" for name in ("gate", "up", "down")))
STATES = (
    M + "pre_mlp_layernorm",
    M + f"mlp.experts.experts.{EXPERT}.linear_fc1",
    M + f"mlp.experts.experts.{EXPERT}.linear_fc2",
)


def extra_states(config: Config, more: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The modules with an extra state. more: those that a family adds."""
    return (*dense.ATTENTION_STATES, dense.NORM_STATE, *STATES, *more)


def count(config: Config) -> int:
    """The number of experts, which transformers 5 renamed."""
    return size(config, "num_experts" if config.get("num_experts") else "num_local_experts")


def flags(config: Config, d: Dimensions, normalized: bool) -> dict[str, object]:
    """Megatron's flags for the experts.

    Args:
        normalized: whether the weights of the chosen experts sum to one.
    """
    chosen = size(config, "num_experts_per_tok")
    if normalized and chosen == 1:
        raise ValueError("num_experts_per_tok: 1: its weight is always 1, which Megatron does not compute")
    return {
        "num_experts": d.experts,
        "moe_ffn_hidden_size": d.expert_ffn,
        "moe_router_topk": chosen,
        # A softmax over the chosen experts equals a softmax over all, renormalized over the chosen.
        "moe_router_pre_softmax": not normalized,
        "moe_router_score_function": "softmax",
        "moe_token_dispatcher_type": "alltoall",
    }


def refuse_dense_layers(config: Config) -> None:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise ValueError("mlp_only_layers, decoder_sparse_step: layers without experts among them are not converted")
