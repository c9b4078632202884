"""Bounds on a chat template: a program that comes with a tokenizer, and may loop for ever or take gigabytes.

Loops are counted by `sys.monitoring` in the template's own code, so that bound is the same on every machine, in any
thread or process, and needs neither signals nor a clock. Memory is bounded by the operating system (RLIMIT_AS): a
template can double a list or a string in many ways, and each of them allocates.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import CodeType
from typing import Any

MOST_LOOPS = 2_000_000  # iterations in one rendering: some three seconds
MOST_LETTERS = 100_000_000
MOST_BYTES = 1 << 30  # that one rendering may add to the memory of the process
_TOOL = 4  # of sys.monitoring's six numbers, one that debuggers, coverage and profilers do not claim
_turn = threading.Lock()  # the number is the interpreter's: one rendering at a time
SIZE_RENDERINGS = 100  # reading the size of the process takes longer than a rendering


class TemplateLimitError(Exception):
    """A template was stopped, with the reason."""


def render_bounded(template: Any, render: Callable[[], Any]) -> Any:
    """render(), which renders a jinja2 template.

    TemplateLimitError after MOST_LOOPS iterations of its loops, or where it needs more than MOST_BYTES of memory.
    """
    left = MOST_LOOPS

    def count(code: CodeType, offset: int, target: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise TemplateLimitError(f"it ran {MOST_LOOPS:,} loop iterations and had not ended")

    monitoring, codes = sys.monitoring, _codes(template)
    with _turn:
        monitoring.use_tool_id(_TOOL, "chat template")
        try:
            monitoring.register_callback(_TOOL, monitoring.events.JUMP, count)
            for code in codes:
                monitoring.set_local_events(_TOOL, code, monitoring.events.JUMP)
            return _render_in_memory(render)
        except MemoryError:
            pass  # raised below, not as the cause: the machine itself has memory left
        finally:
            for code in codes:
                monitoring.set_local_events(_TOOL, code, 0)
            monitoring.register_callback(_TOOL, monitoring.events.JUMP, None)
            monitoring.free_tool_id(_TOOL)
    raise TemplateLimitError(f"it needs more than {MOST_BYTES >> 30} GiB of memory")


def _render_in_memory(render: Callable[[], Any]) -> Any:
    """render() with bounded memory. A process may have grown since its size was read: if so, it is read again."""
    try:
        with _bounded_memory(_size.known()):
            return render()
    except MemoryError:
        if not _size.is_old():
            raise
    with _bounded_memory(_size.read()):
        return render()


class _Size:
    """The address space of this process in bytes, read from the system once in SIZE_RENDERINGS renderings."""

    def __init__(self) -> None:
        self.bytes, self.process, self.renderings = 0, 0, SIZE_RENDERINGS

    def known(self) -> int:
        if self.renderings >= SIZE_RENDERINGS or self.process != os.getpid():
            return self.read()
        self.renderings += 1
        return self.bytes

    def read(self) -> int:
        with open("/proc/self/statm") as file:
            self.bytes = int(file.read().split()[0]) * resource.getpagesize()
        self.process, self.renderings = os.getpid(), 0
        return self.bytes

    def is_old(self) -> bool:
        return self.renderings > 0


_size = _Size()


@contextmanager
def _bounded_memory(size: int) -> Iterator[None]:
    """Limits the address space of the process to `size` and MOST_BYTES; a larger allocation is a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = size + MOST_BYTES
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check_output(text: str) -> str:
    """The text; an error where it is longer than any conversation, or has half a character."""
    if len(text) > MOST_LETTERS:
        raise TemplateLimitError(f"it wrote {len(text):,} letters")
    text.encode("utf-8")
    return text


@lru_cache(maxsize=16)
def _codes(template: Any) -> tuple[CodeType, ...]:
    """The code of a compiled template: its body, its blocks, and the macros and loops inside them."""
    found = [function.__code__ for function in (template.root_render_func, *template.blocks.values())]
    codes = []
    while found:
        codes.append(code := found.pop())
        found += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return tuple(codes)
