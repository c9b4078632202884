"""Bounds on a chat template: a program that comes with a tokenizer, and may never end or take gigabytes.

- Loop iterations and macro calls are counted by `sys.monitoring`, in the template's code and in jinja2's filters. The
  count is the same on every machine, in any thread or process, and needs no signals.
- CPU time is checked at each of them, for templates whose iterations are slow.
- Single operations that would take minutes are refused before they start: `9 ** (9 ** 9)`, and to compare or hash what
  contains the same list twice, nested many times. What is compared is counted first.
- Memory is bounded by the operating system (RLIMIT_AS): a template can double a list or a string in many ways, and each
  of them allocates.
"""

from __future__ import annotations

import functools
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import jinja2.filters
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_LOOPS = 2_000_000  # iterations and macro calls in one rendering: some three seconds
MOST_SECONDS = 60.0  # of CPU time in one rendering
MOST_CHARACTERS = 100_000_000
MOST_BYTES = 1 << 30  # that one rendering may add to the memory of the process
MOST_BITS = 1 << 16  # of a number that is computed
MOST_PLACES = 1_000  # that `round` is asked for
MOST_COMPARED = 100_000  # elements of what is compared, each as often as it is reached
CONTAINERS: Any = (list, tuple, dict, set, type({}.keys()), type({}.values()), type({}.items()))
COMPARING_FILTERS = ("sort", "unique", "min", "max", "groupby", "dictsort")
COMPARING_TESTS = "in == eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le".split()
_TOOL = 4  # of sys.monitoring's six numbers, one that debuggers, coverage and profilers do not claim
SIZE_RENDERINGS = 100  # reading the size of the process takes longer than a rendering
_turn = threading.Lock()  # limits of memory are the process's: one rendering at a time


class TemplateLimitError(Exception):
    """A template was stopped, with the reason."""


@dataclass
class _Budget:
    """What is left to one rendering."""

    loops: int
    end: float
    """In CPU time of the thread."""

    def spend(self) -> None:
        self.loops -= 1
        if self.loops < 0:
            raise TemplateLimitError(f"it ran {MOST_LOOPS:,} loop iterations and macro calls and had not ended")
        if time.thread_time() > self.end:
            raise TemplateLimitError(f"it ran {MOST_SECONDS:g} seconds and had not ended")


def _comparable(value: Any) -> Any:
    """The value. TemplateLimitError where comparing or hashing it visits more than MOST_COMPARED elements."""
    found, containers = 0, [value] if isinstance(value, CONTAINERS) else []
    while containers:
        container = containers.pop()
        found += len(container)
        if found > MOST_COMPARED:
            raise TemplateLimitError(f"it compares lists of more than {MOST_COMPARED:,} elements")
        elements = (*container, *container.values()) if isinstance(container, dict) else container
        containers += [x for x in elements if isinstance(x, CONTAINERS)]
    return value


def _compares(function: Any) -> Callable[..., Any]:
    """A filter or test whose arguments are compared with each other, or their elements."""

    @functools.wraps(function)
    def bounded(*values: Any, **options: Any) -> Any:
        read = (list(value) if isinstance(value, Iterator) else value for value in values)
        return function(*map(_comparable, read), **options)

    return bounded


class _Generator(CodeGenerator):
    """jinja2's compiler, but what a template compares, and keys of its dictionaries, pass `_comparable` first."""

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        if len(node.ops) == 1 and nodes.Const in (type(node.expr), type(node.ops[0].expr)):
            super().visit_Compare(node, frame)  # constants are as long as the template at most
            return
        self.write("(")
        self._visit_comparable(node.expr, frame)
        for operand in node.ops:
            self.write(f" {operators[operand.op]} ")
            self._visit_comparable(operand.expr, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("{")
        for pair in node.items:
            self._visit_comparable(pair.key, frame, ": ")
            self.visit(pair.value, frame)
            self.write(", ")
        self.write("}")

    def _visit_comparable(self, node: nodes.Expr, frame: Frame, then: str = "") -> None:
        self.write("environment.comparable(")
        self.visit(node, frame)
        self.write(f"){then}")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that refuses single operations without a bound. jinja2 computes none of them while it compiles."""

    intercepted_binops = frozenset(["**", "*", "//", "%", "-"])
    code_generator_class = _Generator
    comparable = staticmethod(_comparable)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.filters |= {"round": _round, "sum": _sum} | {x: _compares(self.filters[x]) for x in COMPARING_FILTERS}
        self.tests |= {name: _compares(self.tests[name]) for name in COMPARING_TESTS}
        self.tests["divisibleby"] = lambda value, number: self.call_binop(None, "%", value, number) == 0
        del self.globals["lipsum"]  # random text of any length

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The operator's result. TemplateLimitError for whole numbers that are too large."""
        if isinstance(left, int) and isinstance(right, int):
            bits, others = left.bit_length(), right.bit_length()
            if (bits * right if operator == "**" else bits + others) > MOST_BITS:
                raise TemplateLimitError(f"it computes with a number of more than {MOST_BITS:,} bits")
        if operator == "-":  # of the items of dictionaries
            _comparable((left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of a call. All but functions and macros may compare their arguments: `list.index`, `dict`."""
        if args and not isinstance(__obj, FunctionType | jinja2.runtime.Macro):
            _comparable((getattr(__obj, "__self__", None), *args))
        return super().call(__context, __obj, *args, **kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An element or attribute; a tuple is hashed."""
        return super().getitem(obj, _comparable(argument) if isinstance(argument, tuple) else argument)


def _round(value: Any, precision: int = 0, method: Any = "common") -> Any:
    """jinja2's filter, which computes 10**precision."""
    if abs(precision) > MOST_PLACES:
        raise TemplateLimitError(f"it rounds to more than {MOST_PLACES:,} places")
    return jinja2.filters.do_round(value, precision, method)


@jinja2.pass_environment
def _sum(environment: Any, iterable: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    """jinja2's filter, for numbers: a sum of lists copies all that it has for each of them."""
    if not isinstance(start, int | float):
        raise TemplateLimitError("it sums what are not numbers")
    return jinja2.filters.sync_do_sum(environment, iterable, attribute, start)


@lru_cache(maxsize=16)
def compiled(source: str) -> Any:
    """A template as transformers compiles it, but in a BoundedEnvironment. ValueError of jinja2 for a syntax error."""
    from transformers.utils import chat_template_utils

    def compile_bounded() -> Any:
        theirs = chat_template_utils.ImmutableSandboxedEnvironment
        chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment
        try:
            return chat_template_utils._cached_compile_jinja_template(source)
        finally:
            chat_template_utils.ImmutableSandboxedEnvironment = theirs

    with _turn:
        template = _in_bounded_memory(compile_bounded)
    _watch_filters()
    _watch(_codes(template.root_render_func, *template.blocks.values()))
    return template


def render_bounded(render: Callable[[], Any]) -> Any:
    """render(), which renders a template of `compiled`.

    TemplateLimitError after MOST_LOOPS iterations or MOST_SECONDS, or where it needs more than MOST_BYTES of memory.
    """
    budget, thread = _Budget(MOST_LOOPS, time.thread_time() + MOST_SECONDS), threading.get_ident()

    def count(*_: Any) -> None:
        if threading.get_ident() == thread:  # another thread may use jinja2's filters
            budget.spend()

    with _turn:
        _call_at_events(count)
        try:
            return _in_bounded_memory(render)
        finally:
            _call_at_events(None)


@cache
def _watch_filters() -> None:
    """Sets up sys.monitoring, once in a process, and watches the loops of jinja2's filters."""
    sys.monitoring.use_tool_id(_TOOL, "chat template")
    _watch(_codes(*_functions(jinja2.filters)))


def _watch(codes: Iterator[CodeType]) -> None:
    for code in codes:
        sys.monitoring.set_local_events(_TOOL, code, sys.monitoring.events.JUMP | sys.monitoring.events.PY_START)


def _call_at_events(count: Callable[..., None] | None) -> None:
    for event in (sys.monitoring.events.JUMP, sys.monitoring.events.PY_START):
        sys.monitoring.register_callback(_TOOL, event, count)


def _in_bounded_memory(work: Callable[[], Any]) -> Any:
    """work(); TemplateLimitError where it needs more than MOST_BYTES.

    A process may have grown since its size was read: if so, it is read again.
    """
    try:
        try:
            with _bounded_memory(_size.known()):
                return work()
        except MemoryError:
            if not _size.is_old():
                raise
        with _bounded_memory(_size.read()):
            return work()
    except MemoryError:
        pass  # raised below, not as the cause: the machine itself has memory left
    raise TemplateLimitError(f"it needs more than {MOST_BYTES / (1 << 30):g} GiB of memory")


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
    if len(text) > MOST_CHARACTERS:
        raise TemplateLimitError(f"it wrote {len(text):,} characters")
    text.encode("utf-8")
    return text


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    return (value for value in vars(module).values() if isinstance(value, FunctionType))


def _codes(*functions: Any) -> Iterator[CodeType]:
    """The code of functions, and of the functions inside them: a template's body, blocks, macros and loops."""
    found = [function.__code__ for function in functions]
    while found:
        yield (code := found.pop())
        found += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
