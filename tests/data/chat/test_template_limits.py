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
def test_a_template_that_doubles_its_data_is_stopped(make_tokenizer, template: str):
    tokenizer = load_tokenizer(str(make_tokenizer(template + CHATML)))

    with pytest.raises(
        RecordError, match=r"needs more than 1 GiB of memory\); change its turns, or correct the template"
    ):
        runs(tokenizer, turns("hi", "yes"))


def test_a_process_that_has_grown_renders_on(make_tokenizer, monkeypatch: pytest.MonkeyPatch):
    """The size of the process is read once in many renderings: here it has grown by more than the bound since."""
    size = template_limits._Size()
    size.bytes, size.process, size.renderings = -template_limits.MOST_BYTES + (1 << 20), os.getpid(), 1
    monkeypatch.setattr(template_limits, "_size", size)
    long = "{% set n = namespace(x='ab') %}{% for i in range(25) %}{% set n.x = n.x + n.x %}{% endfor %}"

    assert runs(load_tokenizer(str(make_tokenizer(long + CHATML))), turns("hi", "yes"))
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
