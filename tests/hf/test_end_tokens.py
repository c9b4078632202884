"""End tokens of a Hugging Face folder that are not ids are refused, by file."""

import json

import pytest

from megatron_sfr.hf.end_tokens import GENERATION, add_end_tokens
from megatron_sfr.hf.hf_folder import CONFIG


@pytest.mark.parametrize("ids", [{}, [[1]], "2", -1, [True], 0.5])
def test_end_tokens_that_are_not_ids_are_refused(tmp_path, ids):
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / GENERATION).write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(ValueError, match=f"{GENERATION}: eos_token_id is .*; give the id of a token, or a list of"):
        add_end_tokens(tmp_path, [7])
