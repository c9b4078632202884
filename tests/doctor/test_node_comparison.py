"""Comparison of nodes: the odd one is named, with the mark that decides the exit code."""

from dataclasses import replace

import pytest

from megatron_sfr.doctor.cluster_probes import bandwidths, edges
from megatron_sfr.doctor.job_ranks import Place, first_node, place_of
from megatron_sfr.doctor.node_comparison import (
    Clock,
    FolderCheck,
    Link,
    Speed,
    clock_findings,
    folder_findings,
    link_findings,
    named_ranks,
    odd_ones,
    software_findings,
    speed_findings,
)
from megatron_sfr.doctor.node_facts import NodeFacts

NODE = NodeFacts(
    "a", ("10.0.0.1",), {"Python": "3.12.1", "torch": "2.13.0"}, {"numpy": "2.1", "tiny": "1"}, ("numpy",), {}
)
THREE = [replace(NODE, host=host) for host in "abc"]


def texts(findings) -> list[str]:
    return [str(finding) for finding in findings]


@pytest.mark.parametrize(
    ("numbers", "text"), [([0, 1, 2, 3, 8], "ranks 0-3, 8"), ([5], "rank 5"), ([2, 0, 4, 5], "ranks 0, 2, 4-5")]
)
def test_ranks_are_shortened(numbers: list[int], text: str) -> None:
    assert named_ranks(numbers) == text


def test_the_odd_value_is_named_with_its_host() -> None:
    assert odd_ones(dict.fromkeys("abc", "1")) is None
    assert odd_ones({"a": "1", "b": "2", "c": "1"}) == "1 on 2 hosts, 2 on b"
    assert odd_ones({"a": "1", "b": "2"}) == "1 on a, 2 on b"


def test_equal_nodes_have_no_difference() -> None:
    same, packages = texts(software_findings(THREE))
    assert same == "ok       the same on all hosts: Python 3.12.1, torch 2.13.0"
    assert packages == "ok       2 packages have the same versions on all hosts"


def test_each_difference_is_found_and_marked_by_what_training_needs() -> None:
    odd = replace(
        THREE[1],
        software={"Python": "3.12.1", "torch": "2.12.0"},
        packages={"numpy": "2.0", "tiny": "1", "extra": "3"},
        variables={"NCCL_DEBUG": "INFO"},
    )
    assert texts(software_findings([THREE[0], odd, THREE[2]])) == [
        "problem  torch differs: 2.13.0 on 2 hosts, 2.12.0 on b; install the same on all hosts",
        "problem  package numpy differs: 2.1 on 2 hosts, 2.0 on b; install the same on all hosts",
        "note     package extra differs: (absent) on 2 hosts, 3 on b; install the same on all hosts",
        "note     NCCL_DEBUG differs: (not set) on 2 hosts, INFO on b; set it in the job script",
    ]


def test_many_differing_packages_are_cut_but_counted() -> None:
    other = replace(THREE[1], packages={f"p{i}": "1" for i in range(30)})
    *_, last = texts(software_findings([THREE[0], other]))
    assert last == "note     12 more packages differ; --json lists all of them"


@pytest.mark.parametrize(
    ("skew", "error", "text"),
    [
        (0.001, 0.0002, "ok       clocks agree with a's within 1.00 ms (measured to 0.20 ms)"),
        (-0.7, 0.01, "note     the clock of b is 0.700 s behind that of a; start its time service (chrony, ntpd)"),
        (60.0, 0.01, "problem  the clock of b is 60.000 s ahead of that of a; start its time service (chrony, ntpd)"),
        (0.3, 0.4, "ok       clocks agree with a's within 300.00 ms (measured to 400.00 ms)"),
    ],
)
def test_a_clock_is_judged_beyond_its_error(skew: float, error: float, text: str) -> None:
    assert texts(clock_findings([Clock("b", skew, error)], "a")) == [text]


def test_a_folder_that_is_not_shared_is_named_once_per_host() -> None:
    hosts = ["a", "a", "b", "b"]
    seen = [FolderCheck(rank, None, ()) for rank in range(4)]
    assert texts(folder_findings(seen, hosts, "/d")) == [
        "ok       /d: 4 processes wrote to it, and each read the files of all"
    ]
    apart = [FolderCheck(r, None, (2, 3) if r < 2 else (0, 1)) for r in range(4)]
    found = texts(folder_findings(apart, hosts, "/d"))
    assert [text.partition(":")[0] for text in found] == [
        "problem  a does not see what b wrote to /d",
        "problem  b does not see what a wrote to /d",
    ]
    missing = [FolderCheck(r, None, (2, 3)) if r < 2 else FolderCheck(r, "does not exist there", ()) for r in range(4)]
    assert texts(folder_findings(missing, hosts, "/d")) == [
        "problem  b: --shared /d: does not exist there; mount the file system there"
    ]


@pytest.mark.parametrize(("share", "mark"), [(0.95, "ok"), (0.7, "note"), (0.3, "problem")])
@pytest.mark.parametrize("kind", ["matmul", "copy"])
def test_the_slowest_host_is_named(kind: str, share: float, mark: str) -> None:
    speeds = [Speed(rank, 10.0, 20.0) for rank in range(4)]
    speeds[2] = replace(speeds[2], **{kind: getattr(speeds[2], kind) * share})
    (finding,) = speed_findings(speeds, ["a", "a", "b", "b"], 0.5)
    assert finding.mark == mark
    assert f"slowest host: b (rank 2), {'matrix products' if kind == 'matmul' else 'memory copies'}" in finding.text
    assert f"at {share:.0%} of the median" in finding.text


def test_a_host_whose_links_are_both_slow_is_named_and_a_single_slow_link_is_not_blamed_on_a_host() -> None:
    ring = [("a", "b"), ("b", "c"), ("c", "d"), ("d", "e"), ("e", "a")]
    card = [Link(*pair, 0.3 if "c" in pair else 2.0, 1e-4) for pair in ring]
    (finding,) = link_findings(card, 0.5)
    assert (finding.mark, "all links of c are slow" in finding.text) == ("problem", True)
    cable = [Link(*pair, 1.2 if pair == ("b", "c") else 2.0, 1e-4) for pair in ring]
    (finding,) = link_findings(cable, 0.5)
    assert (finding.mark, "only this link is slow" in finding.text) == ("note", True)
    assert [finding.mark for finding in link_findings(cable[:1], 0.5)] == ["ok"]
    assert list(link_findings([], 0.5)) == []


@pytest.mark.parametrize("count", range(1, 9))
def test_each_link_of_a_ring_is_measured_once_and_none_beside_another_of_its_host(count: int) -> None:
    rounds = edges(count)
    found = [frozenset(edge) for edges_of_round in rounds for edge in edges_of_round]
    expected = {frozenset((i, (i + 1) % count)) for i in range(count)} if count > 1 else set()
    assert set(found) == expected
    assert len(found) == len(expected)
    for edges_of_round in rounds:
        ends = [host for edge in edges_of_round for host in edge]
        assert len(ends) == len(set(ends))


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    found = bandwidths(8_000_000, 0.001, 8)
    assert (found.algbw, found.busbw) == pytest.approx((8.0, 14.0))
    assert bandwidths(8_000_000, 0.001, 2).busbw == pytest.approx(8.0)


def test_a_rank_finds_its_place_under_torchrun_and_srun() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "7"}
    assert place_of(torchrun, "b") == Place(3, 4, 1, "b", "h", 7, False)
    first = torchrun | {"RANK": "0"}
    assert place_of(first, "b").serves
    assert not place_of(first | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, "b").serves
    srun = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n1", "SLURM_JOB_ID": "12345"}
    assert place_of(srun | {"SLURMD_NODENAME": "n1"}, "x") == Place(0, 2, 0, "n1", "n1", 22345, True)
    with pytest.raises(ValueError, match="start it with torchrun or srun"):
        place_of({}, "x")
    with pytest.raises(ValueError, match="MASTER_ADDR is not"):
        place_of({"RANK": "0", "WORLD_SIZE": "1"}, "x")


def test_a_list_of_nodes_needs_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_node("node7") == "node7"
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"scontrol cannot expand n\[1-2\] here: set MASTER_ADDR"):
        first_node("n[1-2]")
