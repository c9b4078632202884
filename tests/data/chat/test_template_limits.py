"""Chat templates that would never end, or take all memory, are stopped."""

import os

import pytest

from megatron_sfr.data.chat import template_limits
from megatron_sfr.data.chat.chat_template import ChatTemplate
from megatron_sfr.data.chat.template_options import TemplateOptions
from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.storage.jsonl import RecordError
from tests.data.chat.families import runs
from tests.data.records import CHATML, turns

DOUBLING = (
    "{% set n = namespace(x=[1, 1] if true else '') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}"
)


@pytest.mark.parametrize(
    "template", [DOUBLING, DOUBLING.replace("[1, 1] if true else ''", "'ab'")], ids=["list", "text"]
)
def test_a_template_that_doubles_its_data_is_stopped(make_tokenizer, monkeypatch: pytest.MonkeyPatch, template: str):
    """At a sixteenth of the bound, which takes a sixteenth of the time."""
    tokenizer = load_tokenizer(str(make_tokenizer(template + CHATML)))
    monkeypatch.setattr(template_limits, "MOST_BYTES", template_limits.MOST_BYTES >> 4)

    with pytest.raises(
        RecordError, match=r"needs more than 0\.0625 GiB of memory\); change its turns, or correct the template"
    ):
        runs(tokenizer, turns("hi", "yes"))


def test_a_process_that_has_grown_renders_on(monkeypatch: pytest.MonkeyPatch):
    """The size of the process is read once in many renderings: here it has grown by more than the bound since."""
    size = template_limits._Size()
    size.bytes, size.process, size.renderings = -template_limits.MOST_BYTES + (1 << 20), os.getpid(), 1
    monkeypatch.setattr(template_limits, "_size", size)

    block = template_limits._in_bounded_memory(lambda: bytearray(1 << 29))  # more than any allocator keeps
    assert len(block) == 1 << 29
    assert size.bytes > 0


ENDLESS = {
    "power": ("{{ 9 ** (9 ** 9) }}", "number of more than"),
    "power that is not written out": ("{% set n = messages|length * 9 %}{{ n ** (n ** n) }}", "number of more than"),
    "product": (
        "{% set n = namespace(x=7) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "number of more than",
    ),
    "quotient": ("{{ ('f' * 9999999)|int(0, 16) // 7 }}", "number of more than"),
    "rest": ("{{ ('f' * 9999999)|int(0, 16) is divisibleby 7 }}", "number of more than"),
    "places": ("{{ 1|round(999999999, 'floor') }}", "rounds to more than"),
    "places before the point": ("{{ 1|round(-999999999) }}", "rounds to more than"),
    "sum of lists": ("{{ range(99999)|batch(1)|sum(start=[]) }}", "not numbers"),
    "recursive macro": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "macro calls",
    ),
    "loop of a filter": ("{{ range(99999)|map('string')|map('center', 100000)|map('length')|sum }}", "loop iterations"),
    "slow iterations": ("{% for i in range(9999) %}{% set x = 'a' * 100000000 %}{% endfor %}", "ran 0.5 seconds"),
    "constant text": ("{{ 'x'|center(9999999999) }}", "more than 1 GiB of memory"),
    "random text": ("{{ lipsum(999999999) }}", "'lipsum' is undefined"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_never_ends_is_stopped(make_tokenizer, monkeypatch: pytest.MonkeyPatch, name: str):
    template, reason = ENDLESS[name]
    folder = str(make_tokenizer(template + CHATML))
    monkeypatch.setattr(template_limits, "MOST_LOOPS", 10_000)
    monkeypatch.setattr(template_limits, "MOST_SECONDS", 0.5)

    with pytest.raises(ValueError, match=reason):  # while it is compiled, or for the first conversation
        runs(load_tokenizer(folder), turns("hi", "yes"))


def test_operators_within_the_bounds_are_computed(make_tokenizer):
    numbers = "{{ 2 ** 10 }} {{ 7 * 6 }} {{ '%02d' % 5 }} {{ 7 // 2 }} {{ 2.567|round(1) }} {{ [1, 2]|sum }} "
    folder = str(make_tokenizer(numbers + "{{ 6 is divisibleby 3 }}{{ '-' * 3 }}{{ 2 ** -1 }}{{ 2 ** 0.5 > 1 }}"))
    assert ChatTemplate(load_tokenizer(folder), TemplateOptions()).text(turns("hi"), None) == (
        "1024 42 05 3 2.6 3 True---0.5True"
    )


# `n.a` and `n.b` are equal and separate, and have 2 ** 40 elements if each is counted as often as it is reached; `n.t`
# and `n.u` are such tuples.
NESTED = (
    "{% set n = namespace(a=[1], b=[1], t=(1,), u=(1,)) %}{% for i in range(40) %}{% set n.a = [n.a, n.a] %}"
    "{% set n.b = [n.b, n.b] %}{% set n.t = (n.t, n.t) %}{% set n.u = (n.u, n.u) %}{% endfor %}"
)
COMPARISONS = [
    "{{ n.a == n.b }}",
    "{{ n.a != n.b }}",
    "{{ n.a < n.b }}",
    "{{ 1 < messages|length <= 3 and [n.a] >= [n.b] }}",
    "{{ n.a == n.b == 1 }}",
    "{{ n.a in [n.b] }}",
    "{{ n.a not in [n.b] }}",
    "{{ {'k': n.a} == {'k': n.b} }}",
    "{{ {'k': n.a}.items() == {'k': n.b}.items() }}",
    "{{ {'k': n.t}.items() - {'k': n.u}.items() }}",
    "{{ [n.b].index(n.a) }}",
    "{{ [n.b].count(n.a) }}",
    "{{ [n.a, n.b]|sort }}",
    "{{ [n.a, n.b]|map('list')|sort }}",
    "{{ [{'k': n.a}, {'k': n.b}]|sort(attribute='k') }}",
    "{{ [{'k': n.a}, {'k': n.b}]|groupby('k') }}",
    "{{ [n.a, n.b]|max }}",
    "{{ [n.a, n.b]|min }}",
    "{{ [n.t, n.u]|unique|list }}",
    "{{ {'a': n.a, 'b': n.b}|dictsort(by='value') }}",
    "{{ n.a is eq n.b }}",
    "{{ [n.a]|select('in', [n.b])|list }}",
    "{{ [{'k': n.a}]|selectattr('k', '==', n.b)|list }}",
    "{% for x in [n.a, n.b] %}{{ loop.changed(x) }}{% endfor %}",
    "{{ {n.t: 1} }}",
    "{{ {}[n.t] }}",
    "{{ {}.get(n.t) }}",
    "{{ dict([[n.t, 1]]) }}",
]


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_comparing_lists_that_are_nested_in_each_other_is_refused(comparison: str):
    template = template_limits.compiled(NESTED + comparison)

    with pytest.raises(template_limits.TemplateLimitError, match="compares lists of more than 100,000 elements"):
        template_limits.render_bounded(lambda: template.render(messages=[1, 2]))


def test_comparisons_of_what_a_conversation_has_are_computed():
    source = (
        "{% set d = {'a': 1, ('b', 2): [3]} %}{{ messages == messages[:] }} {{ messages[0] in messages }} "
        "{{ messages.index(messages[1]) }} {{ d[('b', 2)] == [3] }} {{ 1 < 2 < messages|length }} {{ [3, 1]|sort }} "
        "{{ messages|map(attribute='content')|unique|list }} "
        "{{ messages|selectattr('role', 'equalto', 'user')|list|length }} "
        "{{ [[2], [1]]|min }} {{ messages|groupby('role')|map('first')|join }} {{ 7 - 2 }} {{ nothing == messages }} "
        "{{ ({'a': 1}.items() - {'b': 1}.items())|list }}"
    )
    messages = [{"role": "user", "content": "x", "parts": [{"y": [i]}]} for i in range(3)]
    template = template_limits.compiled(source)

    assert template_limits.render_bounded(lambda: template.render(messages=messages)) == (
        "True True 1 True True [1, 3] ['x'] 3 [1] user 5 False [('a', 1)]"
    )


def test_lists_nested_too_deeply_to_compare_are_a_reason_not_a_crash(make_tokenizer):
    deep = "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(20000) %}{% set n.a = [n.a] %}{% set n.b = [n.b] %}"
    folder = str(make_tokenizer(deep + "{% endfor %}{{ n.a == n.b }}" + CHATML))

    with pytest.raises(ValueError, match="recursion"):
        runs(load_tokenizer(folder), turns("hi", "yes"))
