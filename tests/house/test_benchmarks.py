"""The benchmarks' arithmetic: operations of a shape against those that torch counts, peaks, quartiles, sizes."""

import json
from pathlib import Path

import pytest

from megatron_sfr.runtime.devices import BF16, FP8, peak
from tests import warm
from tools.bench_overhead import quartiles, ratios, read_sizes, shape_of
from tools.model_shapes import SHAPES

TINY = (
    "--layers 2 --hidden 64 --ffn 96 --heads 4 --groups 2 --kv-channels 16 --vocab 512 --seq 32 --batch 2 --dim 16 "
    "--anchors 4 --width 32 --repetitions 4"
).split()


def test_the_operations_of_a_step_are_those_that_torch_counts(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    warm.run("-m", "tools.bench_overhead", *TINY, "--json", str(file), check=True)
    plain, sfr, measured = json.loads(file.read_text())["rows"]
    sizes = read_sizes(TINY)
    assert plain["counted_flops"] == sizes.batch * sizes.seq * shape_of(sizes).flops(causal=False)
    assert (plain["ratio"], plain["predicted_by_flops"]) == (1, 1)
    assert 1 < sfr["predicted_by_flops"] < measured["predicted_by_flops"]
    assert sfr["ratio_quartiles"][0] <= sfr["ratio"] <= sfr["ratio_quartiles"][1]
    assert plain["tokens_per_second"] == pytest.approx(1e3 * sizes.batch * sizes.seq / plain["ms"])
    assert (plain["mfu"], plain["peak_gib"]) == (None, None)  # a CPU has no peak here


def test_lora_computes_no_gradient_of_a_frozen_weight(tmp_path: Path) -> None:
    """Counted by torch: no product beside those of the forward pass, of inputs' gradients and of the adapters."""
    file = tmp_path / "numbers.json"
    warm.run("-m", "tools.bench_lora", *TINY, "--rank", "3", "--json", str(file), check=True)
    for r in json.loads(file.read_text())["rows"]:
        for name in ("trained", "gradient_bytes", "optimizer_bytes", "flops"):
            assert r[name if name != "flops" else "counted_flops"] == r[f"calculated_{name}"], (r["step"], name)


def test_a_causal_mask_halves_the_scores_alone() -> None:
    shape = SHAPES["qwen3-8b"]
    scores = 3 * 2 * shape.layers * 2 * shape.seq * shape.heads * shape.kv_channels
    assert shape.flops(causal=False) - shape.flops() == scores // 2


def test_real_shapes_are_used_and_reduced() -> None:
    sizes = read_sizes(
        ["--like", "qwen3-8b", "--layers", "4", "--fp8", "tensorwise", "--transformer-impl", "transformer_engine"]
    )
    assert (sizes.layers, sizes.hidden, sizes.vocab, sizes.seq, sizes.batch) == (4, 4096, 151936, 4096, 1)
    assert sizes.bf16
    assert read_sizes([]).hidden == 256
    with pytest.raises(SystemExit):
        read_sizes(["--fp8", "tensorwise"])


def test_only_devices_of_the_table_have_a_peak() -> None:
    assert peak("NVIDIA H200", FP8) == 1978.9
    assert peak("NVIDIA H100 80GB HBM3", BF16) == 989.4
    assert peak("NVIDIA H100 PCIe", BF16) is None


def test_ratios_are_of_neighbouring_steps() -> None:
    assert ratios([2.0, 4.0, 8.0, 24.0], [1.0, 2.0, 4.0, 8.0]) == (2.0, 2.0, 2.0)
    assert quartiles([4.0, 1.0, 3.0, 2.0]) == (2.0, 2.5, 3.0)
