"""Measures speed and memory of conversion (`python -m tools.bench_convert --folder DIR`).

Creates a random Qwen3 model of a given size in DIR, then copies, imports and exports it in turn, each in a separate
process. Prints median GB/s, CPU seconds, and the peak resident memory minus what the interpreter had before. Sources
are in the page cache if they fit. Imports and exports flush their files to the disk, so they are compared with `cp`
and a flush; "cp alone" has no flush. On a file system that shares blocks between copies, `cp` copies nothing. DIR needs
room for three such models and is removed at the end.
"""

import argparse
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from os import cpu_count, sync, times
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

import torch

from megatron_sfr.hf.export_hf import export_hf
from megatron_sfr.hf.families.family_registry import family_of
from megatron_sfr.hf.hf_folder import CONFIG, INDEX
from megatron_sfr.hf.import_hf import import_hf
from megatron_sfr.hf.mappings import entries
from megatron_sfr.hf.megatron.megatron_checkpoint import CHUNK_BYTES
from megatron_sfr.hf.safetensors_writer import Header, ShardWriter, plan_shards
from megatron_sfr.storage.atomic import sync_files

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 65536,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
}


def headers(layers: int) -> dict[str, Header]:
    config = SHAPE | {"num_hidden_layers": layers}
    family = family_of(config)
    d = family.dimensions(config)
    return {
        name: Header(shape, torch.bfloat16)
        for entry in entries(family.mappings(config), d)
        for name, shape in zip(entry.names, entry.mapping.shapes(d), strict=True)
    }


def make_model(folder: Path, size: float, shard_bytes: int) -> tuple[int, int]:
    """Writes a model of at least that size with random finite weights. Returns its bytes and its largest tensor's."""
    layers = 1
    while sum(x.bytes for x in headers(layers).values()) < size:
        layers += 1
    shards = plan_shards(headers(layers), shard_bytes)
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for shard in shards:
        with ShardWriter(folder, shard) as writer:
            for name, x in shard.tensors.items():
                bits = torch.randint(-(1 << 15), 1 << 15, x.shape, dtype=torch.int16, generator=generator)
                bits &= ~(1 << 14)  # the exponent is never that of infinity and NaN, which an import refuses
                writer.write(name, bits.view(torch.bfloat16))
    (folder / CONFIG).write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}))
    files = {name: shard.file for shard in shards for name in shard.tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    sizes = [x.bytes for x in headers(layers).values()]
    return sum(sizes), max(sizes)


def resident(kind: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def take(arm: str, folder: Path, shard_bytes: int) -> dict[str, float]:
    """Runs one measurement: seconds, CPU seconds, and peak resident bytes (largest process) minus those before."""
    source, megatron, output = folder / "hf", folder / "megatron", folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, spent, start = resident("VmRSS"), sum(times()[:4]), time.perf_counter()
    if arm in ("cp", "cp alone"):
        subprocess.run(["cp", "-r", source, output], check=True)
        if arm == "cp":
            sync_files(output)
    elif arm == "import":
        import_hf(source, megatron, force=megatron.exists(), progress=False)
    else:
        workers = int(arm.removeprefix("export "))
        export_hf(megatron, output, like=source, shard_bytes=shard_bytes, workers=workers, progress=False)
    seconds = time.perf_counter() - start
    peak = max(resident("VmHWM"), getrusage(RUSAGE_CHILDREN).ru_maxrss * 1024)
    return {"seconds": seconds, "cpu": sum(times()[:4]) - spent, "peak": peak - before}


def identical(folder: Path) -> bool:
    """Whether the last export equals the original byte for byte."""
    names = sorted(x.name for x in (folder / "hf").glob("*.safetensors"))
    return all((folder / "hf" / x).read_bytes() == (folder / "out" / x).read_bytes() for x in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="an empty or absent folder for 3 x --gigabytes")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shard-gigabytes", type=float, default=0.5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shard_bytes = int(options.shard_gigabytes * 1e9)
    if options.arm:
        print(json.dumps(take(options.arm, options.folder, shard_bytes)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    if any(options.folder.iterdir()):
        raise SystemExit(f"{options.folder} is not empty")
    size, largest = make_model(options.folder / "hf", options.gigabytes * 1e9, shard_bytes)
    arms = ["cp alone", "cp", "import", *(f"export {n}" for n in options.workers)]
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    command = [sys.executable, "-m", "tools.bench_convert", *sys.argv[1:], "--arm"]
    for _ in range(options.repetitions):
        for arm in arms:
            sync()
            done = subprocess.run([*command, arm], check=True, stdout=subprocess.PIPE, text=True)
            found[arm].append(json.loads(done.stdout.splitlines()[-1]))
    report(size, largest, shard_bytes, found, identical(options.folder))
    shutil.rmtree(options.folder)


def report(size: int, largest: int, shard_bytes: int, found: dict[str, list[dict[str, float]]], same: bool) -> None:
    versions = ", ".join(f"{x} {version(x)}" for x in ("torch", "safetensors", "megatron-core"))
    print(f"{platform.machine()}, {cpu_count()} cores, Python {platform.python_version()}, {versions}")
    print(f"{size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, files of {shard_bytes / 1e6:.0f} MB, ", end="")
    print(f"chunks of {CHUNK_BYTES / 1e6:.0f} MB; the export equals the original byte for byte: {same}")
    copy = [x["seconds"] for x in found["cp"]]
    print(f"{'arm':12}{'GB/s':>8}{'range':>16}{'of cp':>8}{'CPU s':>8}{'peak MB':>10}")
    for arm, takes in found.items():
        speeds = sorted(size / 1e9 / x["seconds"] for x in takes)
        share = statistics.median(a / b["seconds"] for a, b in zip(copy, takes, strict=True))
        peak = max(x["peak"] for x in takes) / 1e6
        span = f"{speeds[0]:.2f} to {speeds[-1]:.2f}"
        cpu = statistics.median(x["cpu"] for x in takes)
        print(f"{arm:12}{statistics.median(speeds):8.2f}{span:>16}{share:8.2f}{cpu:8.2f}{peak:10.0f}")


if __name__ == "__main__":
    main()
