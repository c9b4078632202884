"""Hosts for tests: network namespaces of this machine, each with an address, and links between them. Needs root."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

ADDRESS = {"a": "10.77.131.1", "b": "10.77.131.2"}


def ip(*arguments: str, check: bool = True) -> str:
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True).stdout


def has_namespaces() -> bool:
    try:
        ip("netns", "add", "sfr-try")
        ip("netns", "delete", "sfr-try")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@contextmanager
def host(name: str) -> Iterator[str]:
    """A network namespace. What still runs in it at the end is killed."""
    namespace = f"sfr-{name}-{os.getpid()}"
    ip("netns", "add", namespace)
    try:
        ip("-netns", namespace, "link", "set", "lo", "up")
        yield namespace
    finally:
        kill_all(namespace)
        ip("netns", "delete", namespace)


def kill_all(namespace: str) -> None:
    while pids := ip("netns", "pids", namespace).split():
        for pid in pids:
            subprocess.run(["kill", "-KILL", pid], check=False, capture_output=True)
        time.sleep(0.1)


def connect(a: str, b: str) -> None:
    ip("link", "add", "eth-a", "netns", a, "type", "veth", "peer", "name", "eth-b", "netns", b)
    for name, namespace in (("a", a), ("b", b)):
        ip("-netns", namespace, "address", "add", f"{ADDRESS[name]}/24", "dev", f"eth-{name}")
        ip("-netns", namespace, "link", "set", f"eth-{name}", "up")
