"""A warning for models that would not stop: their chat template ends replies on a token that is not an end token."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sfr.data.chat.loss_mask import reply_end_token
from megatron_sfr.data.chat.template_options import AS_AT_INFERENCE, TemplateOptions


def unknown_end(tokenizer: Any, end_tokens: Sequence[int], template: TemplateOptions = AS_AT_INFERENCE) -> str | None:
    """The problem in one line; None if the chat template ends replies on an end token, or its end is unknown."""
    end = reply_end_token(tokenizer, template)
    if end is None or end in end_tokens:
        return None
    name, *others = tokenizer.convert_ids_to_tokens([end, *end_tokens])
    return (
        f"the chat template ends replies on {name}, which is not among the model's end tokens ({', '.join(others)}): "
        f"replies run on to --max-new-tokens; add {end} to eos_token_id in generation_config.json"
    )


def warn_of_unknown_end(
    folder: Path, tokenizer: Any, end_tokens: Sequence[int], template: TemplateOptions = AS_AT_INFERENCE
) -> None:
    if warning := unknown_end(tokenizer, end_tokens, template):
        print(f"warning: {folder}: {warning}", file=sys.stderr, flush=True)
