"""`doctor --cluster`: every process of a job runs it, and rank 0 prints what differs, is missing or is slow."""

import json
import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_sfr.doctor.finding import Finding
from megatron_sfr.doctor.job_ranks import Job, StepFailed, place_of
from megatron_sfr.doctor.node_comparison import (
    Clock,
    FolderCheck,
    Link,
    Speed,
    clock_findings,
    folder_findings,
    link_findings,
    named_ranks,
    software_findings,
    speed_findings,
)
from megatron_sfr.doctor.node_facts import NodeFacts, read_node_facts


@dataclass(frozen=True)
class ClusterOptions:
    shared: Path | None = None
    """A folder that all hosts should share; None: not checked."""
    limit_s: float = 60.0
    """Seconds that each step may take."""
    slow: float = 0.5
    """Share of the median below which a host or link is a problem."""
    as_json: bool = False
    """Print one JSON object at the end instead of lines."""


@dataclass
class Report:
    """What rank 0 collects; printed line by line, or as JSON."""

    as_json: bool
    findings: list[Finding] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, *findings: Finding) -> None:
        self.findings += findings
        if not self.as_json:
            print(*findings, sep="\n", end="\n" if findings else "", flush=True)

    def measured(self, name: str, values: Sequence[Any]) -> None:
        """Adds dataclasses to the JSON object."""
        self.details[name] = [asdict(value) for value in values]

    def close(self, hosts: int) -> int:
        problems = sum(finding.mark == "problem" for finding in self.findings)
        if self.as_json:
            found = [asdict(finding) for finding in self.findings]
            print(json.dumps({"ok": not problems, "findings": found, **self.details}, indent=1), flush=True)
        elif problems:
            print(f"these hosts should not train together yet: problems: {problems}", flush=True)
        else:
            print(f"{_count(hosts, 'host')} can train together", flush=True)
        return 2 if problems else 0


def check_cluster(options: ClusterOptions) -> int:
    """Runs all steps on this rank. Returns the exit code, which is the same on all ranks."""
    job = Job(place_of(os.environ, socket.gethostname()), options.limit_s)
    report = Report(options.as_json)
    try:
        _run(job, options, report)
    except StepFailed as failed:
        code = job.end_failed(str(failed))
        os._exit(code)  # a process group with a lost rank may wait at exit
    code = report.close(len(set(job.hosts))) if job.place.rank == 0 else 0
    return job.end(code)


def _run(job: Job, options: ClusterOptions, report: Report) -> None:
    with job.step("joining"):
        _join(job, report)
    with job.step("the process group"):
        device, group = _start_groups(job)
    import torch.distributed as dist

    from megatron_sfr.doctor import cluster_probes as probes

    def wait_for_all() -> None:
        dist.barrier()

    rank, world, hosts = job.place.rank, job.place.world, job.hosts
    leaders = [hosts.index(host) for host in dict.fromkeys(hosts)]  # the first rank of each host
    with job.step("clocks"):
        mine = probes.measure_clock(rank, leaders[1:], hosts)
        clocks = [Clock(**clock) for clock in job.gather(mine and asdict(mine)) if clock]
    if rank == 0:
        report.add(*clock_findings(clocks, hosts[0]))
    if options.shared is not None:
        with job.step(f"the shared folder {options.shared}"):
            token = job.share(secrets.token_hex(8) if rank == 0 else None)
            check = probes.check_folder(options.shared, token, rank, world, wait_for_all)
            checks = [FolderCheck(**one) for one in job.gather(asdict(check))]
        if rank == 0:
            report.add(*folder_findings(checks, hosts, str(options.shared)))
    with job.step("the speed of each rank"):
        wait_for_all()
        speeds = [Speed(**speed) for speed in job.gather(asdict(probes.measure_speed(rank, device)))]
    if rank == 0:
        report.add(*speed_findings(speeds, hosts, options.slow))
    with job.step("all-reduce"):
        sizes = probes.ALL_REDUCE[device.type] if world > 1 else ()
        reduced = list(probes.measure_all_reduce(group, device, wait_for_all, sizes))
    if rank == 0:
        report.add(*_all_reduce_findings(reduced, "NCCL" if device.type == "cuda" else "gloo"))
    with job.step("links between hosts"):
        found = probes.measure_links(leaders, hosts, group, device, wait_for_all)
        gathered = job.gather([asdict(link) for link in found])
        links = [Link(**link) for of_rank in gathered for link in of_rank]
    if rank == 0:
        report.add(*link_findings(links, options.slow))
        report.measured("clocks", clocks)
        report.measured("speeds", speeds)
        report.measured("all_reduce", reduced)
        report.measured("links", links)
    dist.destroy_process_group()


def _join(job: Job, report: Report) -> None:
    """Collects what each node reports; afterwards all ranks know the host of each."""
    nodes = [_node(facts) for facts in job.gather(asdict(read_node_facts(job.place.host)))]
    job.hosts = job.share([node.host for node in nodes])
    job.addresses = {address: node.host for node in nodes for address in node.addresses}
    if job.place.rank:
        return
    one_each = list({node.host: node for node in reversed(nodes)}.values())[::-1]
    where = [f"{node.host} ({named_ranks(_ranks(job.hosts, node.host))})" for node in one_each]
    report.add(
        Finding("ok", f"{_count(len(nodes), 'process', 'es')} on {_count(len(one_each), 'host')}: {', '.join(where)}")
    )
    report.add(*software_findings(one_each))
    report.details["hosts"] = [asdict(node) | {"ranks": _ranks(job.hosts, node.host)} for node in one_each]


def _count(n: int, what: str, plural: str = "s") -> str:
    return f"{n} {what}{plural if n != 1 else ''}"


def _node(facts: dict[str, Any]) -> NodeFacts:
    return NodeFacts(**facts | {name: tuple(facts[name]) for name in ("addresses", "required")})


def _ranks(hosts: Sequence[str], host: str) -> list[int]:
    return [rank for rank, other in enumerate(hosts) if other == host]


def _start_groups(job: Job) -> tuple[Any, Any]:
    """gloo as the default group, and the group whose speed counts: NCCL's where there are GPUs. Both are tried."""
    import torch
    import torch.distributed as dist

    place, limit = job.place, timedelta(seconds=job.limit_s)
    store = dist.PrefixStore("groups", job.store)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world, timeout=limit)
    dist.barrier()
    if not torch.accelerator.is_available():
        return torch.device("cpu"), dist.group.WORLD
    device = torch.device("cuda", place.local_rank % torch.accelerator.device_count())
    torch.accelerator.set_device_index(device.index)
    group = dist.new_group(backend="nccl", timeout=limit, device_id=device)
    dist.all_reduce(torch.ones(1, device=device), group=group)
    torch.accelerator.synchronize()
    return device, group


def _all_reduce_findings(reduced: Sequence[Any], library: str) -> Iterator[Finding]:
    for one in reduced:
        speed = f"{one.seconds * 1e3:.3g} ms, algbw {one.algbw:.3g} GB/s, busbw {one.busbw:.3g} GB/s"
        yield Finding("ok", f"{library} all-reduce of {one.bytes / 2**20:g} MiB: {speed}")
