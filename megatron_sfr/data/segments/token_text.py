"""The exact text of tokens and of any slice of them. Decoding a slice by itself loses blanks and cuts characters.

A tokenizer's decoder depends on neighbouring tokens: it drops the blank before the first one, and replaces incomplete
characters by U+FFFD. Here each token has its own bytes, found once for a tokenizer, and the bytes of a text are those
of its tokens, concatenated. A character belongs to the token with its first byte, so the texts of consecutive slices,
concatenated, are the text, in any script. Code points are never cut; a letter and its combining mark, or an emoji of
several code points, may be.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

import numpy as np
from tokenizers.decoders import ByteLevel

from megatron_sfr.storage.jsonl import RecordError

REPLACEMENT = "\ufffd"  # what decoders write for incomplete characters
FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # the token of one byte, in tokenizers that fall back to bytes


@dataclass(frozen=True)
class TokenText:
    """The text of tokens [n]. begins [n + 1]: the number of characters that begin before the first byte of token i."""

    text: str
    begins: np.ndarray

    def between(self, start: int, end: int) -> str:
        """The characters that begin in tokens start ... end - 1."""
        return self.text[self.begins[start] : self.begins[end]]

    def tokens_at(self, characters: Sequence[int]) -> np.ndarray:
        """For each character, the first token that starts at or after its first byte; n at the end of the text."""
        holder = np.searchsorted(self.begins[:-1], characters, side="right") - 1
        at_or_after = holder + (self.begins[holder] < characters)
        return np.where(np.less(characters, len(self.text)), at_or_after, len(self.begins) - 1)


def token_text(ids: np.ndarray, tokenizer: Any) -> TokenText:
    """The text of ids [n], n >= 1, as the tokenizer decodes them without its special tokens.

    If the ids begin or end inside a character, the text is the complete characters: decoders have no exact answer
    there.

    Raises:
        RecordError: the bytes are not what the tokenizer decodes.
        ValueError: the tokens have no bytes (`token_bytes`).
    """
    table = token_bytes(tokenizer)
    data = b"".join([table[id] for id in ids.tolist()])
    ends = np.cumsum(_token_sizes(tokenizer)[ids])
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text, first = _whole_characters(data)
    else:
        if dropped := _dropped_at_start(data, ids, tokenizer):
            data, text, ends = data[dropped:], text[dropped:], np.maximum(ends - dropped, 0)  # blanks, a byte each
        if len(text) == len(data):  # ASCII: a character is a byte
            return TokenText(text, np.concatenate([[0], ends]))
        first = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
    characters = np.concatenate([[0], np.cumsum(first)])
    return TokenText(text, characters[np.concatenate([[0], ends])])


@lru_cache(maxsize=8)
def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes of each token inside a text, by id; special tokens have none.

    A token's text is what the decoder writes for it after a letter. If that is an incomplete character, its name spells
    its bytes: in the alphabet of byte-level BPE, or as <0xE4>.

    Raises:
        ValueError: a token has no separate bytes.
    """
    backend = tokenizer.backend_tokenizer
    vocabulary = backend.get_vocab(with_added_tokens=True)
    names = dict(zip(vocabulary.values(), vocabulary, strict=True))
    ids = range(max(names, default=-1) + 1)
    alone = backend.decode_batch([[id] for id in ids], skip_special_tokens=True)
    letter = next((id for id, text in enumerate(alone) if text.isascii() and text.isalnum()), None)
    if letter is None:
        raise ValueError("the tokenizer has no token of Latin letters or digits, which its bytes are found with")
    after = backend.decode_batch([[letter, id] for id in ids], skip_special_tokens=True)
    alphabet = _byte_level_alphabet()
    table = []
    for id, text in enumerate(after):
        name = names.get(id, "")
        if REPLACEMENT in text and (byte := FALLBACK.fullmatch(name)):
            table.append(bytes.fromhex(byte[1]))
        elif REPLACEMENT in text and all(character in alphabet for character in name):
            table.append(bytes(alphabet[character] for character in name))
        elif text.startswith(alone[letter]):
            table.append(text.removeprefix(alone[letter]).encode("utf-8"))
        else:
            raise ValueError(
                f"the tokenizer writes token {name!r} over the one before it, so tokens have no separate texts; "
                "take a tokenizer that keeps its text, such as byte-level BPE"
            )
    return table


@lru_cache(maxsize=8)
def _token_sizes(tokenizer: Any) -> np.ndarray:
    """Bytes of each token by id, int64."""
    return np.array([len(piece) for piece in token_bytes(tokenizer)], np.int64)


def _dropped_at_start(data: bytes, ids: np.ndarray, tokenizer: Any) -> int:
    """The number of blanks that the decoder drops before the first token. RecordError for any other difference."""
    if _decodes_bytes(tokenizer):
        return 0
    decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).encode("utf-8")
    dropped = len(data) - len(decoded)
    if dropped < 0 or data != b" " * dropped + decoded:
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(data, decoded, strict=False)))
        raise RecordError(
            f"the tokenizer decodes {decoded[alike:][:40]!r} where its tokens spell {data[alike:][:40]!r}, so segments "
            "have no exact text; take a tokenizer that decodes what it has encoded, such as byte-level BPE"
        )
    return dropped


@lru_cache(maxsize=8)
def _decodes_bytes(tokenizer: Any) -> bool:
    """Whether the decoder only concatenates the bytes of tokens, as that of byte-level BPE does."""
    return isinstance(tokenizer.backend_tokenizer.decoder, ByteLevel)


def _whole_characters(data: bytes) -> tuple[str, np.ndarray]:
    """The complete characters of truncated UTF-8, and for each byte whether one of them begins there."""
    escaped = data.decode("utf-8", errors="surrogateescape")  # a byte outside a character: U+DC80 ... U+DCFF
    points = np.frombuffer(escaped.encode("utf-32-le", errors="surrogatepass"), "<u4")
    whole = (points < 0xDC80) | (points > 0xDCFF)
    sizes = np.where(whole, 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000), 1)
    first = np.zeros(len(data), bool)
    first[(np.cumsum(sizes) - sizes)[whole]] = True
    return data.decode("utf-8", errors="ignore"), first


def _byte_level_alphabet() -> dict[str, int]:
    """The byte of each character in the alphabet of byte-level BPE (GPT-2). Printable bytes stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
