"""Compares what the nodes of a job reported and measured, and names the node that differs. Pure functions."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from megatron_sfr.doctor.finding import Finding, Mark
from megatron_sfr.doctor.node_facts import NodeFacts

MOST_PACKAGES = 20  # lines; more differences have one cause
SKEW_NOTE_S, SKEW_PROBLEM_S = 0.1, 5.0
SLOW_NOTE = 0.8
"""Share of the median speed below which a node or link is named as slow."""


@dataclass(frozen=True)
class Clock:
    """A node's clock minus that of rank 0's node, in seconds, and how exactly it could be measured."""

    host: str
    skew_s: float
    error_s: float


@dataclass(frozen=True)
class Speed:
    """A rank's own speed, without the network."""

    rank: int
    matmul: float
    """TFLOP/s of a matrix product."""
    copy: float
    """GB/s of a copy within memory, read and written bytes counted once each."""


@dataclass(frozen=True)
class Link:
    """Between the first ranks of two nodes."""

    first: str
    second: str
    gigabytes: float
    """GB/s of a large message."""
    latency_s: float
    """Half the time of a small message and its answer."""


@dataclass(frozen=True)
class FolderCheck:
    """What one rank found in the shared folder."""

    rank: int
    error: str | None
    """Why it could not write or read there."""
    unseen: tuple[int, ...]
    """Ranks whose file it did not see, or saw with other contents."""


def named_ranks(numbers: Sequence[int]) -> str:
    """`ranks 0-3, 8` for 0, 1, 2, 3, 8; `rank 8` for one."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][-1] + 1:
            parts[-1][-1:] = [n] if len(parts[-1]) > 1 else [parts[-1][0], n]
        else:
            parts.append([n])
    return f"rank{'s' if len(numbers) > 1 else ''} " + ", ".join("-".join(map(str, part)) for part in parts)


def odd_ones(values: Mapping[str, str]) -> str | None:
    """`2.13.0 on 7 hosts, 2.12.0 on node5` from values by host; None if all are equal."""
    counts = Counter(values.values()).most_common()
    if len(counts) < 2:
        return None
    usual, number = counts[0]
    others: dict[str, list[str]] = {}
    for host, value in values.items():
        if value != usual:
            others.setdefault(value, []).append(host)
    hosts = next(host for host, value in values.items() if value == usual) if number == 1 else f"{number} hosts"
    return ", ".join([f"{usual} on {hosts}", *(f"{value} on {', '.join(where)}" for value, where in others.items())])


def software_findings(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """Differences of Python, torch, drivers, packages and variables. nodes: one for each host."""
    first, differs = nodes[0], False
    for name in first.software:
        if odd := odd_ones({node.host: node.software.get(name, "unknown") for node in nodes}):
            differs = True
            yield Finding("problem", f"{name} differs: {odd}; install the same on all hosts")
    if not differs:
        shown = ", ".join(f"{name} {value}" for name, value in first.software.items())
        yield Finding("ok", f"the same on all hosts: {shown}")
    yield from package_findings(nodes)
    for name in sorted({name for node in nodes for name in node.variables}):
        if odd := odd_ones({node.host: node.variables.get(name, "(not set)") for node in nodes}):
            yield Finding("note", f"{name} differs: {odd}; set it in the job script")


def package_findings(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """One finding for each package that differs: a problem if training needs it, else a note."""
    required = {name for node in nodes for name in node.required}
    differing: list[Finding] = []
    names = sorted({name for node in nodes for name in node.packages}, key=lambda name: (name not in required, name))
    for name in names:
        if odd := odd_ones({node.host: node.packages.get(name, "(absent)") for node in nodes}):
            mark: Mark = "problem" if name in required else "note"
            differing.append(Finding(mark, f"package {name} differs: {odd}; install the same on all hosts"))
    yield from differing[:MOST_PACKAGES]
    if len(differing) > MOST_PACKAGES:
        rest = differing[MOST_PACKAGES:]
        mark = "problem" if any(finding.mark == "problem" for finding in rest) else "note"
        yield Finding(mark, f"{len(rest)} more packages differ; --json lists all of them")
    if not differing:
        yield Finding("ok", f"{len(names)} packages have the same versions on all hosts")


def clock_findings(clocks: Sequence[Clock], reference: str) -> Iterator[Finding]:
    """reference: the host of rank 0."""
    if not clocks:
        return
    worst = max(clocks, key=lambda clock: abs(clock.skew_s))
    late = [clock for clock in clocks if abs(clock.skew_s) - clock.error_s > SKEW_NOTE_S]
    for clock in late:
        ahead = "ahead of" if clock.skew_s > 0 else "behind"
        mark: Mark = "problem" if abs(clock.skew_s) > SKEW_PROBLEM_S else "note"
        text = f"the clock of {clock.host} is {abs(clock.skew_s):.3f} s {ahead} that of {reference}"
        yield Finding(mark, f"{text}; start its time service (chrony, ntpd)")
    if not late:
        text = f"clocks agree with {reference}'s within {abs(worst.skew_s) * 1e3:.2f} ms"
        yield Finding("ok", f"{text} (measured to {worst.error_s * 1e3:.2f} ms)")


def folder_findings(checks: Sequence[FolderCheck], hosts: Sequence[str], folder: str) -> Iterator[Finding]:
    """hosts: the host of each rank."""
    broken: dict[str, str] = {}
    for check in checks:
        if check.error:
            broken.setdefault(hosts[check.rank], check.error)
    for host, error in broken.items():
        yield Finding("problem", f"{host}: --shared {folder}: {error}; mount the file system there")
    unseen: dict[str, set[str]] = {}
    for check in checks:
        if hosts[check.rank] not in broken and (by := {hosts[rank] for rank in check.unseen} - broken.keys()):
            unseen.setdefault(hosts[check.rank], set()).update(by)
    for host, others in unseen.items():
        text = f"{host} does not see what {', '.join(sorted(others))} wrote to {folder}"
        yield Finding("problem", f"{text}: it is another file system there; mount the shared one")
    if not broken and not unseen:
        yield Finding("ok", f"{folder}: {len(checks)} processes wrote to it, and each read the files of all")


def speed_findings(speeds: Sequence[Speed], hosts: Sequence[str], slow: float) -> Iterator[Finding]:
    """Names the slowest host by the slowest of its ranks. slow: share of the median below which it is a problem."""
    worst: tuple[float, Speed, str] | None = None
    for kind in ("matmul", "copy"):
        usual = median(getattr(speed, kind) for speed in speeds)
        for speed in speeds:
            share = getattr(speed, kind) / usual
            if worst is None or share < worst[0]:
                worst = share, speed, kind
    assert worst is not None, "there is at least one rank"
    share, speed, kind = worst
    mark: Mark = "problem" if share < slow else "note" if share < SLOW_NOTE else "ok"
    what = "matrix products" if kind == "matmul" else "memory copies"
    usual_text = (
        f"median {median(s.matmul for s in speeds):.3g} TFLOP/s, copies {median(s.copy for s in speeds):.3g} GB/s"
    )
    text = f"slowest host: {hosts[speed.rank]} (rank {speed.rank}), {what} at {share:.0%} of the median; {usual_text}"
    remedy = "; look for other processes, throttling and ECC errors there, or leave it out" if mark != "ok" else ""
    yield Finding(mark, text + remedy)


def link_findings(links: Sequence[Link], slow: float) -> Iterator[Finding]:
    """Names the slowest link, and the host whose links are all slow. slow: share of the median below which to warn."""
    if not links:
        return
    usual = median(link.gigabytes for link in links)
    worst = min(links, key=lambda link: link.gigabytes)
    text = f"slowest link: {worst.first} - {worst.second}, {worst.gigabytes:.3g} GB/s, {worst.latency_s * 1e3:.3g} ms"
    if worst.gigabytes >= SLOW_NOTE * usual:
        yield Finding("ok", f"{text} (median {usual:.3g} GB/s)")
        return
    mark: Mark = "problem" if worst.gigabytes < slow * usual else "note"
    culprit = slow_host(links, usual)
    cause = f"all links of {culprit} are slow" if culprit else "only this link is slow"
    yield Finding(mark, f"{text} (median {usual:.3g} GB/s): {cause}; check its network card, cable and switch port")


def slow_host(links: Sequence[Link], usual: float) -> str | None:
    """The host of the slowest link whose every link is slow, if it is only one of its two hosts."""
    worst = min(links, key=lambda link: link.gigabytes)
    slow = []
    for host in (worst.first, worst.second):
        own = [link for link in links if host in (link.first, link.second)]
        if len(own) > 1 and all(link.gigabytes < SLOW_NOTE * usual for link in own):
            slow.append(host)
    return slow[0] if len(slow) == 1 else None
