"""Bounds on a chat template: a program that comes with a tokenizer, and may loop for ever or take gigabytes.

Loops are counted by `sys.monitoring` in the template's own code, so that bound is the same on every machine, in any
thread or process, and needs neither signals nor a clock. Memory is bounded by the operating system (RLIMIT_AS): a
template can double a list or a string in many ways, and each of them allocates.
"""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

MOST_LOOPS = 2_000_000  # iterations in one rendering: some three seconds
MOST_LETTERS = 100_000_000
MOST_BYTES = 1 << 30  # that one rendering may add to the memory of the process
_TOOL = 4  # of sys.monitoring's six numbers, one that debuggers, coverage and profilers do not claim
_turn = threading.Lock()  # the number is the interpreter's: one rendering at a time


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

    monitoring = sys.monitoring
    with _turn:
        monitoring.use_tool_id(_TOOL, "chat template")
        try:
            monitoring.register_callback(_TOOL, monitoring.events.JUMP, count)
            for code in _codes(template):
                monitoring.set_local_events(_TOOL, code, monitoring.events.JUMP)
            with _bounded_memory():
                return render()
        except MemoryError:
            pass  # raised below, not as the cause: the machine itself has memory left
        finally:
            for code in _codes(template):
                monitoring.set_local_events(_TOOL, code, 0)
            monitoring.register_callback(_TOOL, monitoring.events.JUMP, None)
            monitoring.free_tool_id(_TOOL)
    raise TemplateLimitError(f"it needs more than {MOST_BYTES >> 30} GiB of memory")


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Limits the address space of the process to what it has and MOST_BYTES; a larger allocation is a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + MOST_BYTES
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


def _codes(template: Any) -> Iterator[CodeType]:
    """The code of a compiled template: its body, its blocks, and the macros and loops inside them."""
    found = [function.__code__ for function in (template.root_render_func, *template.blocks.values())]
    while found:
        yield (code := found.pop())
        found += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
