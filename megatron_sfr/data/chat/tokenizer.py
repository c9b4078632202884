"""Tokenizers of chats and documents: loaded without running their code, and identified by a hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_sfr.data.chat.chat_template import control_tokens, encode_text
from megatron_sfr.data.chat.template_limits import compiled
from megatron_sfr.storage.model_folders import absent
from megatron_sfr.storage.user_files import loading, shown

_HINT = (
    "give a folder with tokenizer.json; it, tokenizer_config.json or config.json may be damaged, or written by another "
    "version of tokenizers"
)
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "tekken.json", "config.json")
"""What transformers may read a tokenizer from; config.json names the class of one without other files."""


def load_tokenizer(tokenizer: str, *, chat: bool = True) -> Any:
    """A fast tokenizer, with a chat template if it is for chats, from a local folder or by name; runs no code of it."""
    _check_place(tokenizer)
    from transformers import AutoTokenizer

    with loading(f"no tokenizer that can be read at {tokenizer}", _HINT):
        loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        if loaded.is_fast:  # some damage shows in use only
            control_tokens(loaded)
            encode_text(loaded, "a")
            tokenizer_sha256(loaded)
            if not isinstance(loaded.model_max_length, int | float):
                raise TypeError(f"model_max_length is {shown(loaded.model_max_length)}; it has to be a number")
    if not loaded.is_fast:
        raise ValueError(f"the tokenizer at {tokenizer} has no fast version; add its tokenizer.json")
    if chat and not loaded.chat_template:
        raise ValueError(f"the tokenizer at {tokenizer} has no chat template; put a chat_template.jinja beside it")
    if chat:
        with loading(f"the chat template of the tokenizer at {tokenizer} cannot be used", "correct the template"):
            compiled(loaded.get_chat_template())
    return loaded


def _check_place(tokenizer: str) -> None:
    """Raises ValueError for a path or name that cannot be a tokenizer, before transformers is imported."""
    folder, why = Path(tokenizer), absent(tokenizer)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        why = "it has no tokenizer.json"
    if why is not None:
        raise ValueError(f"no tokenizer that can be read at {tokenizer} ({why}); {_HINT}")


def tokenizer_sha256(tokenizer: Any) -> str:
    """Of what decides token ids and masks: the tokenizer's own JSON, its special tokens and its chat template."""
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
