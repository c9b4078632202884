"""Measures sampling speed (`python -m tools.bench_kl_flow`): a KL-flow denoiser at several numbers of steps, and an
autoregressive model of the same layers with a key-value cache (transformers' Qwen3 and its `generate`), interleaved.

Synthetic weights, one rank, on CUDA if there is a GPU. B texts at a time, of L tokens each. Prints tokens per second.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import megatron.core
import torch
import transformers
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import training

from megatron_sfr.config.settings import parse, read_settings
from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.kl_flow.checkpoint import denoiser_config
from megatron_sfr.kl_flow.model import KLFlowModelBuilder, denoise
from megatron_sfr.kl_flow.sampling.requests import SampleSpec, blank, canvas
from megatron_sfr.kl_flow.sampling.sampler_options import Method, SamplerOptions
from megatron_sfr.kl_flow.sampling.samplers import Denoiser, sample
from megatron_sfr.kl_flow.sampling.vocab_shard import Shard
from megatron_sfr.kl_flow.simplex_path import Simplex
from megatron_sfr.runtime import backend


@dataclass
class Arm:
    """One method and length: a function that samples texts, and the seconds that it took."""

    name: str
    length: int
    calls: int
    """Number of forward passes."""
    write: Callable[[], object]
    seconds: list[float] = field(default_factory=list)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sizes = {"layers": 4, "hidden": 256, "ffn": 704, "heads": 4, "vocab": 512, "batch": 16, "repetitions": 5}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512], help="tokens per text (128 512)")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 32, 128], help="steps of the denoiser (8 32 128)")
    parser.add_argument("--method", choices=get_args(Method), default="hybrid", help="(%(default)s)")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    return parser


def flags(sizes: argparse.Namespace) -> list[str]:
    """Megatron's flags for a denoiser of these sizes on one rank."""
    given = {
        "num-layers": sizes.layers,
        "hidden-size": sizes.hidden,
        "ffn-hidden-size": sizes.ffn,
        "num-attention-heads": sizes.heads,
        "seq-length": max(sizes.lengths) + 1,
        "max-position-embeddings": max(sizes.lengths) + 1,
        "vocab-size": sizes.vocab,
        "micro-batch-size": 1,
        "global-batch-size": 1,
        "train-iters": 1,
        "lr": 1e-4,
        "train-data-path": "unread",
        "normalization": "RMSNorm",
        "position-embedding-type": "rope",
        "transformer-impl": "local",
        "training-task": "kl-flow",
    }
    switches = ["swiglu", "disable-bias-linear", "qk-layernorm", "bf16"]
    return [word for k, v in given.items() for word in (f"--{k}", str(v))] + [f"--{switch}" for switch in switches]


def make_denoiser(sizes: argparse.Namespace, name: Literal["cpu", "cuda"]) -> tuple[Denoiser, Shard]:
    """A denoiser with random weights in bf16."""
    args = parse(read_settings(flags(sizes)))
    training.initialize_megatron()
    config = denoiser_config(args)
    backend.adapt_config(name, config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = KLFlowModelBuilder(config).build_model(groups, pre_process=True, post_process=True)
    model = model.to(device=backend.device(), dtype=torch.bfloat16).eval()
    vocab = Vocab(sizes.vocab)
    return partial(denoise, model, vocab=vocab), Shard(vocab, len(model.embedding.word_embeddings.weight))


def make_autoregressive(sizes: argparse.Namespace) -> Any:
    """A Qwen3 of the same layers, with random weights in bf16."""
    config = transformers.Qwen3Config(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        head_dim=sizes.hidden // sizes.heads,
        max_position_embeddings=max(sizes.lengths),
        tie_word_embeddings=False,
    )
    return transformers.Qwen3ForCausalLM(config).to(device=backend.device(), dtype=torch.bfloat16).eval()


def make_arms(sizes: argparse.Namespace, name: Literal["cpu", "cuda"]) -> list[Arm]:
    """The methods for each length in turn, the autoregressive model first."""
    denoiser, shard = make_denoiser(sizes, name)
    network, simplex = make_autoregressive(sizes), Simplex(sizes.vocab, 0.01)

    def left_to_right(length: int) -> None:
        first_B1 = torch.zeros(sizes.batch, 1, dtype=torch.int64, device=backend.device())
        new = length - 1
        network.generate(
            first_B1,
            attention_mask=torch.ones_like(first_B1),
            do_sample=True,
            top_k=0,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
        )

    def at_once(length: int, steps: int) -> None:
        area = canvas([SampleSpec(blank(length), i) for i in range(sizes.batch)], backend.device())
        sample(denoiser, area, shard, simplex, SamplerOptions(sizes.method, steps))

    arms = []
    for length in sizes.lengths:
        arms.append(Arm("autoregressive, cache", length, length - 1, partial(left_to_right, length)))
        for steps in sizes.steps:
            arms.append(Arm(f"KL-flow, {sizes.method}", length, steps + 1, partial(at_once, length, steps)))
    return arms


def main() -> None:
    sizes = build_parser().parse_args()
    os.environ.setdefault("RANK", "0")
    os.environ |= {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29579"}
    name = backend.choose("auto")
    backend.start(name)
    arms = make_arms(sizes, name)
    for repetition in range(sizes.repetitions + 1):
        for arm in arms:
            torch.cuda.synchronize()  # does nothing on the CPU backend
            start = time.perf_counter()
            arm.write()
            torch.cuda.synchronize()
            if repetition:  # the first repetition warms up
                arm.seconds.append(time.perf_counter() - start)
    report(sizes, name, arms)


def report(sizes: argparse.Namespace, name: backend.Name, arms: list[Arm]) -> None:
    """A table of medians and ranges, and the same as JSON."""
    where = torch.cuda.get_device_name() if name == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{where}, {platform.machine()}, {versions}, megatron-core {megatron.core.__version__}, bf16")
    print(", ".join(f"{k} {v}" for k, v in vars(sizes).items() if k != "json"))
    print(f"{'':24}{'length':>8}{'calls':>8}{'tokens/s':>12}{'range':>18}{'times':>8}")
    rows: list[dict[str, Any]] = []
    for arm in arms:
        if arm.name.startswith("autoregressive"):
            base = arm
        speed = sorted(sizes.batch * arm.length / s for s in arm.seconds)
        ratio = statistics.median(b / a for a, b in zip(arm.seconds, base.seconds, strict=True))
        median, low, high = statistics.median(speed), speed[0], speed[-1]
        rows.append({"arm": arm.name, "length": arm.length, "calls": arm.calls, "speed": speed, "times": ratio})
        print(f"{arm.name:24}{arm.length:8}{arm.calls:8}{median:12,.0f}{f'{low:,.0f} to {high:,.0f}':>18}{ratio:8.2f}")
    if sizes.json:
        sizes.json.write_text(json.dumps({"device": where, "sizes": vars(sizes) | {"json": None}, "rows": rows}))


if __name__ == "__main__":
    main()
