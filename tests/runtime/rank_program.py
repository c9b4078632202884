"""A rank for test_lifetime.py: starts a process in each way, prints their pids, then does what its argument says."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_sfr.runtime import lifetime


def sleep_deaf() -> None:
    """As a DataLoader worker under --exit-signal-handler."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    while True:
        time.sleep(1)


def main(argv: Sequence[str]) -> None:
    ending, report = argv
    started = [multiprocessing.get_context(how).Process(target=sleep_deaf, daemon=True) for how in ("fork", "spawn")]
    for process in started:
        process.start()
    manager = multiprocessing.get_context("spawn").Manager()
    command = subprocess.Popen(lifetime.tied(["sleep", "1000"]))
    results = manager.Queue()
    signal.signal(signal.SIGTERM, lambda *_: None)
    lifetime.stop_alike(signal.SIGTERM)
    peers = Path(report).parent
    partial = Path(f"{report}.partial")
    partial.write_text(json.dumps([os.getpid(), command.pid, *(p.pid for p in multiprocessing.active_children())]))
    partial.rename(report)
    match ending:
        case "value":
            raise ValueError("two\nlines")
        case "raise":
            raise IndexError("out of range")
        case "leave":
            sys.exit("no more data")
        case "manager":  # torchrun signals the rank's group, and Slurm each process of a job
            os.killpg(0, signal.SIGTERM)
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGTERM)
            time.sleep(0.5)
            results.put(1)
            command.kill()
        case "wait":
            while len(list(peers.glob("rank-?"))) < int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
                time.sleep(0.01)
            lifetime.end_with_peers()
            (peers / f"watches-{os.getpid()}").touch()
            while True:
                print("waiting", flush=True)
                time.sleep(0.1)


lifetime.tie_rank(__name__)
if __name__ == "__main__":
    lifetime.run(main, sys.argv[1:], "rank: error:")
