"""Chat templates that would take all memory are stopped."""

import os

import pytest

from megatron_sfr.data.chat import template_limits
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
