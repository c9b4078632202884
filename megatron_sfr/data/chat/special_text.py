"""Text that looks like a control token, encoded as plain text (`--special-text literal`).

A control token in a record is replaced by a placeholder before the template sees it. For encoding, a copy of the
tokenizer is used in which the control tokens have other names: those that the template wrote are renamed too, and the
placeholders become the text that they stand for, which is plain text to the copy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from megatron_sfr.storage.jsonl import RecordError

# Unicode noncharacters, which no text contains.
TEXT_OPEN, TEXT_CLOSE, TOKEN_OPEN, TOKEN_CLOSE = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
PLACEHOLDER = re.compile(f"{TEXT_OPEN}(\\d+){TEXT_CLOSE}")
THOUGHT_MARKS = ("<think>", "</think>")
"""Marks that a reply may have in its text, and that some tokenizers list as special tokens."""


def with_placeholders(value: Any, control: re.Pattern[str], ids: Mapping[str, int]) -> Any:
    """A JSON value in whose strings each control token is a placeholder; names of fields are left as they are."""
    if isinstance(value, str):
        if any(mark in value for mark in (TEXT_OPEN, TEXT_CLOSE, TOKEN_OPEN, TOKEN_CLOSE)):
            raise RecordError("the text has a Unicode noncharacter (U+FDD0 to U+FDD3); remove it")
        return control.sub(lambda found: f"{TEXT_OPEN}{ids[found[0]]}{TEXT_CLOSE}", value)
    if isinstance(value, dict):
        return {name: with_placeholders(inner, control, ids) for name, inner in value.items()}
    if isinstance(value, list):
        return [with_placeholders(inner, control, ids) for inner in value]
    return value


def encode_literally(text: str, tokenizer: Any, control: re.Pattern[str], ids: Mapping[str, int]) -> list[int]:
    """Token ids of rendered text with placeholders. RecordError where the tokenizer has no plain form of one."""
    copy, original = _renamed(tokenizer, tuple(ids.items()))
    tokens = {str(id): token for token, id in ids.items()}
    written = control.findall(text)
    renamed = control.sub(lambda found: f"{TOKEN_OPEN}{ids[found[0]]}{TOKEN_CLOSE}", text)
    plain = PLACEHOLDER.sub(lambda found: tokens[found[1]], renamed)
    encoded = [original.get(id, id) for id in copy.encode(plain, add_special_tokens=False).ids]
    known = frozenset(ids.values())
    if [id for id in encoded if id in known] != [ids[token] for token in written]:
        found = {tokens[name] for name in PLACEHOLDER.findall(text)}
        raise RecordError(
            f"the tokenizer cannot write {', '.join(sorted(found))} as plain text; remove it from the record's text"
        )
    return encoded


@lru_cache(maxsize=2)
def _renamed(tokenizer: Any, control: tuple[tuple[str, int], ...]) -> tuple[Any, dict[int, int]]:
    """The tokenizer with other names for its control tokens, and the original id of each id that the renaming moved."""
    from tokenizers import Tokenizer

    names = {token: f"{TOKEN_OPEN}{id}{TOKEN_CLOSE}" for token, id in control}
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec |= {"truncation": None, "padding": None}
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = spec["model"]
    if isinstance(vocabulary := model.get("vocab"), dict):
        model["vocab"] = {names.get(token, token): id for token, id in vocabulary.items()}
    elif isinstance(vocabulary, list):  # Unigram: pieces and their scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    copy = Tokenizer.from_str(json.dumps(spec))
    moved = {copy.token_to_id(names[token]): id for token, id in control}
    return copy, {new: id for new, id in moved.items() if new is not None}
