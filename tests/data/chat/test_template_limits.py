"""Chat templates that would take all memory are stopped."""

import pytest

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
