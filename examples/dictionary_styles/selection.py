"""Which replies are used: a balanced choice that prefers the headwords several dictionaries define, and the split.

Every choice is a hash of the seed and the headword: no order of files or of dictionaries can change it."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

Book = dict[str, list[str]]  # headword -> its right replies, in the dictionary's order
Books = dict[str, Book]  # persona -> its book


@dataclass(frozen=True)
class Row:
    """One training example: one sense."""

    persona: str
    headword: str
    reply: str


def draw(seed: int, *names: str) -> float:
    """A number in [0, 1) that depends on the seed and the names alone."""
    digest = hashlib.sha256("\0".join((str(seed), *names)).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def sharing(books: Mapping[str, Book]) -> Counter[str]:
    """How many dictionaries define each headword."""
    return Counter(word for book in books.values() for word in book)


def balance(books: Books, most: int, most_senses: int, seed: int) -> Books:
    """At most `most` replies per persona: complete headwords, those in most dictionaries first, ties by lot; at
    most `most_senses` of a headword's senses, the first ones (dictionaries put the commonest first)."""
    shared = sharing(books)
    chosen: Books = {}
    for persona, book in books.items():
        chosen[persona] = {}
        left = most
        for word in sorted(book, key=lambda word: (-shared[word], draw(seed, "order", word), word)):
            senses = book[word][: min(most_senses, left)]
            if not senses:
                break
            chosen[persona][word] = senses
            left -= len(senses)
    return chosen


def split(books: Books, validation_share: float, seed: int) -> tuple[list[Row], list[Row], int]:
    """Training rows, validation rows, and how many training rows were left out because validation holds their text
    under another headword (synonyms share a gloss). A headword is on one side only, for all personas."""
    sides: tuple[list[Row], list[Row]] = ([], [])
    for persona, book in books.items():
        for word, replies in book.items():
            side = sides[draw(seed, "split", word) < validation_share]
            side += [Row(persona, word, reply) for reply in replies]
    held_out = {row.reply for row in sides[1]}
    train = [row for row in sides[0] if row.reply not in held_out]
    for rows in (train, sides[1]):
        rows.sort(key=lambda row: (draw(seed, "row", row.persona, row.headword, row.reply), row.reply))
    return train, sides[1], len(sides[0]) - len(train)


def prompts(validation: list[Row], most: int, seed: int) -> list[Row]:
    """The validation rows of up to `most` headwords, those that most personas define first: what to sample from."""
    asked = {(row.headword, row.persona) for row in validation}
    personas = Counter(word for word, _ in asked)
    words = sorted(personas, key=lambda word: (-personas[word], draw(seed, "prompt", word), word))[:most]
    place = {word: number for number, word in enumerate(words)}
    chosen = [row for row in validation if row.headword in place]
    return sorted(chosen, key=lambda row: (place[row.headword], row.persona, row.reply))
