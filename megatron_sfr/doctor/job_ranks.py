"""The ranks of a job as the doctor sees them: where each is, what it is doing, and a time limit for every step.

All of it goes through a store (TCP, on rank 0's host), which works where collectives do not. Each rank writes a
heartbeat, so that a step that fails or never ends can name the host that is gone.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megatron_sfr.doctor.node_comparison import named_ranks

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BEAT_S = 0.5
SILENT_S = 4.0  # a rank without a heartbeat for so long is gone or unreachable
VERDICT_S = 15.0  # beyond the limit of a step: a failing rank waits so long for rank 0 to report first


@dataclass(frozen=True)
class Place:
    """This process in the job, from the launcher's variables."""

    rank: int
    world: int
    local_rank: int
    host: str
    address: str
    """Of rank 0's host."""
    port: int
    serves: bool
    """Whether this process holds the store; under torchrun its agent does."""


class StepFailed(Exception):
    """A step of the check that could not be finished, in one line."""


def place_of(variables: Mapping[str, str], hostname: str) -> Place:
    """Raises ValueError outside of a job of torchrun or srun."""
    host = variables.get("SLURMD_NODENAME", hostname)
    if "RANK" in variables and "WORLD_SIZE" in variables:
        if "MASTER_ADDR" not in variables:
            raise ValueError("RANK is set, but MASTER_ADDR is not: start doctor --cluster with torchrun or srun")
        rank, world = int(variables["RANK"]), int(variables["WORLD_SIZE"])
        port = int(variables.get("MASTER_PORT", "29500"))
        serves = rank == 0 and variables.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        local = int(variables.get("LOCAL_RANK", "0"))
        return Place(rank, world, local, host, variables["MASTER_ADDR"], port, serves)
    if "SLURM_PROCID" in variables:
        rank = int(variables["SLURM_PROCID"])
        world = int(variables.get("SLURM_STEP_NUM_TASKS", variables.get("SLURM_NTASKS", "1")))
        nodes = variables.get("SLURM_STEP_NODELIST", variables.get("SLURM_JOB_NODELIST", host))
        address = variables.get("MASTER_ADDR") or first_node(nodes)
        port = int(variables.get("MASTER_PORT", 20000 + int(variables.get("SLURM_JOB_ID", "0")) % 10000))
        return Place(rank, world, int(variables.get("SLURM_LOCALID", "0")), host, address, port, rank == 0)
    raise ValueError("--cluster is for every process of a job: start it with torchrun or srun (docs/cluster.md)")


def first_node(nodes: str) -> str:
    """The first host of Slurm's list, such as node[03-07]."""
    if not re.search(r"[\[,]", nodes):
        return nodes
    try:
        shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"scontrol cannot expand {nodes} here: set MASTER_ADDR to the first node") from error
    return shown.stdout.split()[0]


class Job:
    """This rank's connection to the store, and the steps of all ranks."""

    def __init__(self, place: Place, limit_s: float) -> None:
        self.place = place
        self.limit_s = limit_s
        self.hosts: list[str] = []
        """The host of each rank, once all have joined."""
        self.addresses: dict[str, str] = {}
        """Network address -> host, once the nodes have reported."""
        self._steps: list[str] = []
        self.store = self._connect(place.serves)
        self._watching = self._connect(False)  # the other connection may be inside of a call that waits
        self._set("host", place.host)
        self._ending = threading.Event()
        self._heart = threading.Thread(target=self._beat, args=(self._connect(False),), name="heartbeat", daemon=True)
        self._heart.start()

    def _connect(self, serves: bool) -> "Store":
        from torch._C._distributed_c10d import PrefixStore, TCPStore  # torch.distributed exports them without types

        place, limit = self.place, timedelta(seconds=self.limit_s)
        try:
            store = TCPStore(place.address, place.port, None, serves, limit, wait_for_workers=False)
        except RuntimeError as error:
            where = f"{place.host} (rank {place.rank}) does not reach rank 0 at {place.address}:{place.port}"
            remedy = "check that rank 0 runs, that the name resolves there and that no firewall closes the port"
            raise ValueError(f"{where} within {self.limit_s:g} s: {remedy} ({_first_line(error)})") from error
        return PrefixStore(f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def _set(self, what: str, value: str) -> None:
        self.store.set(f"{what}/{self.place.rank}", value)

    def _beat(self, store: "Store") -> None:
        with suppress(RuntimeError):  # the store is gone, and with it the reader of heartbeats
            for count in itertools.count():
                store.set(f"beat/{self.place.rank}", str(count))
                if self._ending.wait(BEAT_S):
                    return

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on rank 0; an empty list on the others. Names the ranks that are missing."""
        what = f"value of {self._steps[-1]}"
        self._set(what, json.dumps(value))
        if self.place.rank:
            return []
        end, missing = time.monotonic() + self.limit_s, list(range(self.place.world))
        while missing and time.monotonic() < end:
            missing = [rank for rank in missing if not self._watching.check([f"{what}/{rank}"])]
            self._raise_if_failed(missing)
            time.sleep(0.05 if missing else 0)
        if missing:
            remedy = "look at its output, and check that it was started and reaches rank 0"
            raise StepFailed(f"nothing came from {self._named(missing)} within {self.limit_s:g} s: {remedy}")
        return [json.loads(self.store.get(f"{what}/{rank}")) for rank in range(self.place.world)]

    def _raise_if_failed(self, ranks: Sequence[int]) -> None:
        if failed := [rank for rank in ranks if self._watching.check([f"failed/{rank}"])]:
            reason = self._watching.get(f"failed/{failed[0]}").decode()
            raise StepFailed(f"{self._named(failed)} failed: {reason}")

    def share(self, value: Any = None) -> Any:
        """Rank 0's value, on all ranks."""
        what = f"from 0 of {self._steps[-1]}"
        if self.place.rank == 0:
            self.store.set(what, json.dumps(value))
        return json.loads(self.store.get(what))

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A step of all ranks. Raises StepFailed with the host to look at; ends the process if it never ends."""
        self._steps.append(name)
        self._set("step", str(len(self._steps)))
        patience = self.limit_s + (5.0 if self.place.rank == 0 else 10.0)  # after the limits of the calls inside
        timer = threading.Timer(patience, self._expire, (name, patience))
        timer.daemon = True
        timer.start()
        try:
            yield
        except StepFailed as error:
            raise StepFailed(f"{name}: {error}") from error
        except (RuntimeError, OSError) as error:
            raise StepFailed(self._explain(name, _first_line(error))) from error
        finally:
            timer.cancel()

    def _expire(self, name: str, patience: float) -> None:
        reason = f"no answer within {patience:g} s"
        self.end_failed(self._explain(name, reason) if self.place.rank == 0 else f"{name}: {reason}")
        os._exit(2)

    def end_failed(self, reason: str) -> int:
        """Reports a failed step once: rank 0 prints it; another rank only if rank 0 stays silent. The exit code, 2."""
        line = f"problem  {reason}"
        with suppress(RuntimeError):
            if self.place.rank == 0:
                print(line, flush=True)
                self._watching.set("verdict", "2")
                time.sleep(2 * BEAT_S)  # the store ends with this process
                return 2
            self._watching.set(f"failed/{self.place.rank}", reason)
            self._watching.wait(["verdict"], timedelta(seconds=self.limit_s + VERDICT_S))
            return 2
        print(f"{line} (seen by {self.place.host}, rank {self.place.rank}; rank 0 is gone)", file=sys.stderr)
        return 2

    def end(self, code: int = 0) -> int:
        """Rank 0's exit code, on all ranks."""
        self._ending.set()  # a thread that uses the store while Python ends would abort the process
        self._heart.join(self.limit_s)
        if self.place.rank:
            code = int(self.store.get("verdict"))
            self._set("left", "1")
            return code
        self.store.set("verdict", str(code))
        with suppress(RuntimeError):  # the store ends with this process
            self.store.wait([f"left/{rank}" for rank in range(1, self.place.world)], timedelta(seconds=self.limit_s))
        return code

    def _explain(self, name: str, reason: str) -> str:
        """A failed step and the host to look at, as far as heartbeats, steps and addresses show it."""
        if self.place.rank:
            return f"{name}: {reason}"
        before = self._read("beat")
        time.sleep(SILENT_S)
        silent = [rank for rank, beat in enumerate(self._read("beat")) if beat == before[rank]]
        if silent:
            return f"{name}: {self._named(silent)} no longer answers: its process ended or its link is down ({reason})"
        steps = [int(step or 0) for step in self._read("step")]
        behind = [rank for rank, step in enumerate(steps) if step < len(self._steps)]
        if behind:
            return f"{name}: {self._named(behind)} did not get there: look at its output ({reason})"
        for address, host in self.addresses.items():
            if re.search(rf"(?<![\d.]){re.escape(address)}(?![\d.])", reason) and not address.startswith("127."):
                return f"{name}: the connection to {host} failed: check its network and firewall ({reason})"
        failures = self._read("failed")
        if failed := [rank for rank, failure in enumerate(failures) if failure]:
            return f"{name}: {self._named(failed)} failed: {failures[failed[0]]}"
        remedy = "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that joins the hosts"
        return f"{name}: all hosts answer, but not through the process group: {remedy} ({reason})"

    def _read(self, what: str) -> list[str | None]:
        keys = [f"{what}/{rank}" for rank in range(self.place.world)]
        return [self._watching.get(key).decode() if self._watching.check([key]) else None for key in keys]

    def _named(self, ranks: Sequence[int]) -> str:
        """`node3 (ranks 8-15)` for ranks, or their numbers where the host is not known."""
        hosts = self._read("host")
        parts = []
        for host in dict.fromkeys(hosts[rank] for rank in ranks):
            which = named_ranks([rank for rank in ranks if hosts[rank] == host])
            parts.append(f"{host} ({which})" if host else f"{which}, which never joined,")
        return ", ".join(parts)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300]
