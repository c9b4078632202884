"""Numbers of parameters of Megatron's GPT, by how they are divided over ranks.

Counted from the arguments, so that a plan needs neither a GPU nor the model; tests compare them with built models.
"""

import argparse
from dataclasses import dataclass
from math import ceil
from typing import Any

from megatron_sfr.model.lora.options import LoRAOptions

UNKNOWN: dict[str, Any] = {  # argument: the only value that is counted
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "mtp_num_layers": None,
    "model_class": "gpt",
    "hybrid_layer_pattern": None,
    "moe_latent_size": None,
    "pipeline_model_parallel_layout": None,
    "use_megatron_fsdp": False,
    "use_torch_fsdp2": False,
    "optimizer_cpu_offload": False,
    "training_task": "autoregressive",
}


@dataclass(frozen=True)
class Counts:
    """Parameters of a part of the model."""

    split: int = 0
    """Divided over the tensor-parallel ranks."""
    copied: int = 0
    """On each tensor-parallel rank."""
    expert: int = 0
    """Divided over the ranks that share the experts."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.split + other.split, self.copied + other.copied, self.expert + other.expert)

    def __mul__(self, times: int) -> "Counts":
        return Counts(times * self.split, times * self.copied, times * self.expert)

    @property
    def total(self) -> int:
        """Parameters of the complete model."""
        return self.split + self.copied + self.expert

    def dense(self, tensor: int) -> int:
        """Parameters of a rank outside the experts."""
        return self.split // tensor + self.copied


def check_known(args: argparse.Namespace) -> None:
    """ValueError for a model or a way of training whose memory is not counted."""
    for name, known in UNKNOWN.items():
        if (value := getattr(args, name)) != known:
            raise ValueError(f"{name} = {value}: `megatron-sfr plan` does not count its memory")
    if args.lora_rank is not None and args.num_experts:
        raise ValueError("lora_rank with num_experts: `megatron-sfr plan` does not count adapters of experts")


def expert_layers(args: argparse.Namespace) -> list[bool]:
    """Whether each decoder layer has experts."""
    if not args.num_experts:
        return [False] * args.num_layers
    frequency = args.moe_layer_freq
    if isinstance(frequency, int):
        return [i % frequency == 0 for i in range(args.num_layers)]
    return [bool(x) for x in frequency]


def padded_vocab(args: argparse.Namespace, tensor: int) -> int:
    """Rows of the embedding, which Megatron pads to a multiple for each tensor-parallel rank."""
    multiple = args.make_vocab_size_divisible_by * tensor
    return ceil(args.vocab_size / multiple) * multiple


def attention_sizes(args: argparse.Namespace) -> tuple[int, int]:
    """Features of all queries, and of all keys: those of the values are as many."""
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    return args.num_attention_heads * args.kv_channels, groups * args.kv_channels


def matrices(args: argparse.Namespace, *, experts: bool) -> Counts:
    """The weights of a decoder layer's linear layers, which FP8 copies, without the router."""
    h, (queries, keys) = args.hidden_size, attention_sizes(args)
    gates = queries if args.attention_output_gate else 0
    attention = h * (queries + gates + 2 * keys) + queries * h
    up_and_down = 3 if args.swiglu else 2
    if not experts:
        return Counts(split=attention + up_and_down * h * args.ffn_hidden_size)
    shared = up_and_down * h * (args.moe_shared_expert_intermediate_size or 0)
    routed = args.num_experts * up_and_down * h * _expert_width(args)
    return Counts(split=attention + shared, expert=routed)


def layer(args: argparse.Namespace, *, experts: bool) -> Counts:
    """All parameters of a decoder layer."""
    h, (queries, keys), norm = args.hidden_size, attention_sizes(args), _norm(args)
    split = queries + 2 * keys if args.add_bias_linear or args.add_qkv_bias else 0
    copied = 2 * h * norm + (2 * args.kv_channels * norm if args.qk_layernorm else 0)
    expert = 0
    up = 2 if args.swiglu else 1
    if args.add_bias_linear:
        copied += h
        if experts:
            expert = args.num_experts * (up * _expert_width(args) + h)
        else:
            split, copied = split + up * args.ffn_hidden_size, copied + h
    if experts:
        copied += h * args.num_experts + (args.num_experts if args.add_bias_linear else 0)
        copied += h if args.moe_shared_expert_intermediate_size and args.moe_shared_expert_gate else 0
    return matrices(args, experts=experts) + Counts(split, copied, expert)


def embedding(args: argparse.Namespace, tensor: int) -> Counts:
    """The word embedding, and that of positions where they are learned."""
    learned = args.position_embedding_type == "learned_absolute"
    positions = args.max_position_embeddings * args.hidden_size if learned else 0
    return Counts(split=padded_vocab(args, tensor) * args.hidden_size, copied=positions)


def final_norm(args: argparse.Namespace) -> Counts:
    """The norm before the output layer."""
    return Counts(copied=args.hidden_size * _norm(args))


def adapters(args: argparse.Namespace, options: LoRAOptions) -> Counts:
    """LoRA's parameters of a dense decoder layer: A and B of each part of each adapted linear layer."""
    assert options.rank is not None
    h, (queries, keys), up = args.hidden_size, attention_sizes(args), 2 if args.swiglu else 1
    layers = {  # name: parts, input features, output features, whether the output is divided
        "self_attention.linear_qkv": (3, h, queries + 2 * keys, True),
        "self_attention.linear_proj": (1, queries, h, False),
        "mlp.linear_fc1": (up, h, up * args.ffn_hidden_size, True),
        "mlp.linear_fc2": (1, args.ffn_hidden_size, h, False),
    }
    total = Counts()
    for name, (parts, inputs, outputs, column) in layers.items():
        if options.adapts(name):
            a, b = options.rank * parts * inputs, options.rank * outputs
            total += Counts(split=b, copied=a) if column else Counts(split=a, copied=b)
    return total


def _expert_width(args: argparse.Namespace) -> int:
    return args.moe_ffn_hidden_size or args.ffn_hidden_size


def _norm(args: argparse.Namespace) -> int:
    """Parameters of a norm for each feature: LayerNorm has a bias too."""
    return 1 if args.normalization == "RMSNorm" else 2
