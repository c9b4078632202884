"""`doctor --cluster` in four processes on two hosts, with gloo: equal hosts, one that differs, one that is lost.

A host is a network namespace with its own host name and address. NCCL, torchrun's agents and Slurm are not exercised.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.namespaces import ADDRESS, connect, has_namespaces, host, ip, kill_all

ROOT = Path(__file__).resolve().parents[2]
WORLD = 4
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.recovery,
    pytest.mark.skipif(not has_namespaces(), reason="needs root and ip netns"),
]
# Two processes of a host, which has a name; its exit code is the higher of theirs.
ON_HOST = """
echo "$NAME" > /proc/sys/kernel/hostname; eval "$BEFORE"
highest=0; pids=
for rank in $RANKS; do RANK=$rank LOCAL_RANK=$((rank % 2)) "$@" & pids+=" $!"; done
for pid in $pids; do wait "$pid" || { code=$?; ((code > highest)) && highest=$code; }; done
exit $highest
"""


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Namespaces of the connected hosts a and b."""
    with ExitStack() as stack:
        found = {name: stack.enter_context(host(name)) for name in "ab"}
        connect(found["a"], found["b"])
        yield found


def start(name: str, namespace: str, *options: str, before: str = "", path: str = "") -> subprocess.Popen[str]:
    ranks = {"a": "0 1", "b": "2 3"}[name]
    variables = {"NAME": name, "RANKS": ranks, "BEFORE": before, "WORLD_SIZE": str(WORLD), "MASTER_PORT": "29512"}
    variables |= {"MASTER_ADDR": ADDRESS["a"], "GLOO_SOCKET_IFNAME": f"eth-{name}", "OMP_NUM_THREADS": "1"}
    variables |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{path}:{ROOT}" if path else str(ROOT)}
    doctor = (sys.executable, "-W", "ignore", "-m", "megatron_sfr.cli", "doctor", "--cluster", "--slow", "0.001")
    return subprocess.Popen(
        [
            "ip",
            "netns",
            "exec",
            namespace,
            "unshare",
            "--mount",
            "--uts",
            "bash",
            "-c",
            ON_HOST,
            "-",
            *doctor,
            *options,
        ],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outputs(*jobs: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    found = []
    for job in jobs:
        output, errors = job.communicate(timeout=600)
        found.append((job.returncode, output, errors))
    return found


def test_equal_hosts_pass_and_are_measured(hosts: dict[str, str], tmp_path: Path) -> None:
    options = ("--shared", str(tmp_path), "--limit", "300")
    (code, output, errors), other = outputs(*(start(name, hosts[name], *options) for name in "ab"))
    assert (code, other[:2]) == (0, (0, "")), (output, errors, other)
    lines = output.splitlines()
    assert lines[0] == "ok       4 processes on 2 hosts: a (ranks 0-1), b (ranks 2-3)"
    assert lines[1].startswith("ok       the same on all hosts: Python 3.")
    assert "packages have the same versions on all hosts" in lines[2]
    for text in (
        "clocks agree with a's within",
        f"ok       {tmp_path}: 4 processes wrote to it, and each read the files of all",
        "slowest host: ",
        "ok       gloo all-reduce of 64 MiB: ",
        "slowest link: a - b, ",
    ):
        assert text in output
    assert lines[-1] == "2 hosts can train together"
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_differs_is_named_and_every_process_fails(hosts: dict[str, str], tmp_path: Path) -> None:
    """On b a package has another version, the folder is another file system, and the link answers late."""
    shared, local = tmp_path / "shared", tmp_path / "local"
    shared.mkdir()
    for name, version in (("a", "1.0"), ("b", "1.1")):
        info = local / name / f"tiny_package-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tiny-package\nVersion: {version}\n")
    delayed = shutil.which("tc") is not None and "Error" not in slow_down(hosts["b"])
    options = ("--shared", str(shared), "--limit", "300", "--json")
    before = f"mount -t tmpfs none {shared}"
    jobs = (
        start("a", hosts["a"], *options, path=str(local / "a")),
        start("b", hosts["b"], *options, path=str(local / "b"), before=before),
    )
    (code, output, errors), other = outputs(*jobs)
    assert (code, other[:2]) == (2, (2, "")), (output, errors, other)
    report = json.loads(output)
    found = [f"{finding['mark']} {finding['text']}" for finding in report["findings"] if finding["mark"] != "ok"]
    assert "note package tiny-package differs: 1.0 on a, 1.1 on b; install the same on all hosts" in found
    assert any(line.startswith(f"problem a does not see what b wrote to {shared}") for line in found)
    assert any(line.startswith(f"problem b does not see what a wrote to {shared}") for line in found)
    assert report["ok"] is False
    assert [node["ranks"] for node in report["hosts"]] == [[0, 1], [2, 3]]
    assert report["hosts"][1]["packages"]["tiny-package"] == "1.1"
    assert report["links"][0]["latency_s"] > (0.01 if delayed else 0)
    assert list(shared.iterdir()) == []


def slow_down(namespace: str) -> str:
    """Delays what a host sends by 20 ms, where the kernel can do this."""
    command = ["ip", "netns", "exec", namespace, *"tc qdisc add dev eth-b root netem delay 20ms".split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode == 0 else f"Error {done.stderr}"


def test_a_host_that_falls_silent_is_named_in_one_line(hosts: dict[str, str]) -> None:
    """It is stopped once all have joined, so that no connection closes."""
    first, second = (start(name, hosts[name], "--limit", "20") for name in "ab")
    assert first.stdout
    line = first.stdout.readline()
    for pid in ip("netns", "pids", hosts["b"]).split():
        os.kill(int(pid), signal.SIGSTOP)
    assert "2 hosts" in line, first.communicate()
    ((code, output, errors),) = outputs(first)
    kill_all(hosts["b"])
    second.communicate()
    problem = output.splitlines()[-1]
    assert code == 2, (output, errors)
    assert problem.startswith("problem  "), output
    assert "b (ranks 2-3) no longer answers: its process ended or its link is down" in problem
    assert "Traceback" not in errors


def test_a_host_that_never_joins_is_named(hosts: dict[str, str]) -> None:
    started = time.monotonic()
    ((code, output, errors),) = outputs(start("a", hosts["a"], "--limit", "5"))
    assert (code, output) == (
        2,
        "problem  joining: nothing came from ranks 2-3, which never joined, within 5 s: look at its output, and check "
        "that it was started and reaches rank 0\n",
    ), errors
    assert time.monotonic() - started < 300


def test_a_rank_that_does_not_reach_the_first_host_reports_it(hosts: dict[str, str]) -> None:
    ((code, output, errors),) = outputs(start("b", hosts["b"], "--limit", "3"))
    assert (code, output) == (2, "")
    (line, *_) = [line for line in errors.splitlines() if line.startswith("megatron-sfr doctor: error: ")]
    assert "b (rank 2) does not reach rank 0 at 10.77.131.1:29512 within 3 s" in errors
    assert "check that rank 0 runs" in line
