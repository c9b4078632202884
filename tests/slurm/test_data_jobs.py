"""launch/data.sbatch and `doctor --cluster` on a real Slurm of two nodes, which are this machine.

A shared file system of several machines is not exercised.
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.targets.store import DEFAULT, TargetStore
from tests.distributed.tiny import SEQ_LENGTH, write_conversations

from .cluster import ROOT, Cluster, free_ports, running, unavailable

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.recovery,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(unavailable()), reason=unavailable()),
]
SCRIPT = "launch/data.sbatch"


def submit(cluster: Cluster, log: Path, *words: str, **variables: str) -> None:
    """Submits an array of two parts and waits until both have ended well."""
    array = ("--array=0-1", "--cpus-per-task=1", "--mem-per-cpu=0", f"--output={log}")
    ours = {"MEGATRON_SFR": str(log.parent / "sfr"), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = ["sbatch", "--wait", *array, SCRIPT, *words]
    done = subprocess.run(
        command, cwd=ROOT, env=cluster.environment() | ours | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + log.read_text()


def test_an_array_prepares_and_encodes_what_one_run_does(tmp_path: Path) -> None:
    """The parts' conversations are those of one run over all files; a second submission changes nothing."""
    straight = PreparedData.open(write_conversations(tmp_path / "straight", 40))
    lines = (tmp_path / "straight/corpus.jsonl").read_text().splitlines(keepends=True)
    files = [tmp_path / f"{k}.jsonl" for k in range(3)]
    for k, file in enumerate(files):
        file.write_text("".join(lines[k::3]))
    launcher = tmp_path / "sfr"
    launcher.write_text(f'#!/bin/sh\nexec {sys.executable} -m megatron_sfr.cli "$@"\n')
    launcher.chmod(0o755)
    output, log = tmp_path / "parts", tmp_path / "log"
    options = f"--seq-length {SEQ_LENGTH} --stride 3 --horizons 1:8 --min-segment-length 2 --workers 1"
    prepare = {"TOKENIZER": str(tmp_path / "straight/tokenizer"), "DATA_ARGS": options}
    embed = {"ENCODER": "minilm", "DATA_ARGS": "--device cpu"}
    with TemporaryDirectory(prefix="slurm-") as folder, running(Path(folder)) as cluster:
        for _ in range(2):
            submit(cluster, log, "prepare", str(output), *map(str, files), **prepare)
        submit(cluster, log, "embed", str(output), **embed)
        variables = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        on_both = ("srun", "--nodes=2", "--ntasks=2", "--cpus-per-task=1", str(launcher))
        one_store = f"embed --data {straight.folder} --encoder minilm --device cpu --block-rows 8"
        cluster.call(*on_both, *one_store.split(), **variables)
        doctor = f"doctor --cluster --shared {tmp_path} --limit 300 --slow 0.001"
        local = {"GLOO_SOCKET_IFNAME": "lo", "MASTER_PORT": str(free_ports(1)[0])}
        checked = cluster.call(*on_both, *doctor.split(), **variables, **local)
    assert len(TargetStore.open(straight.folder / DEFAULT, straight)) == straight.manifest.segments
    assert "2 processes on 2 hosts: " in checked
    assert checked.splitlines()[-1] == "2 hosts can train together"
    assert log.read_text().count("is up to date") == 2

    listed = subprocess.run(["bash", SCRIPT, "list", str(output)], cwd=ROOT, capture_output=True, text=True, check=True)
    folders = [Path(path) for path in yaml.safe_load(listed.stdout)["train_data_path"]]
    parts = [PreparedData.open(folder) for folder in folders]
    assert [len(part) for part in parts] == [27, 13]
    assert sum(part.manifest.tokens for part in parts) == straight.manifest.tokens
    for part in parts:
        assert len(TargetStore.open(part.folder / DEFAULT, part)) == part.manifest.segments  # raises if incomplete
    assert "SLURM_JOB_ID" not in os.environ
