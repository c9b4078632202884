"""Which replies are used: a balanced choice that prefers the headwords several dictionaries define, and the split.

Every choice is a hash of the seed and the headword: no order of files or of dictionaries can change it."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

Book = dict[str, list[str]]  # headword -> its right replies, in the dictionary's order
Books = dict[str, Book]  # persona -> its book


@dataclass(frozen=True)
class Record:
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


def split(books: Books, validation_share: float, seed: int) -> tuple[list[Record], list[Record], int]:
    """Training records, validation records, and how many training records were left out.

    A training record is left out if validation holds its text under another headword (synonyms share a gloss). A
    headword is on one side only, for all personas.
    """
    sides: tuple[list[Record], list[Record]] = ([], [])
    for persona, book in books.items():
        for word, replies in book.items():
            side = sides[draw(seed, "split", word) < validation_share]
            side += [Record(persona, word, reply) for reply in replies]
    held_out = {record.reply for record in sides[1]}
    train = [record for record in sides[0] if record.reply not in held_out]
    for records in (train, sides[1]):
        records.sort(
            key=lambda record: (draw(seed, "row", record.persona, record.headword, record.reply), record.reply)
        )
    return train, sides[1], len(sides[0]) - len(train)


def prompts(validation: list[Record], most: int, seed: int) -> list[Record]:
    """The validation records of up to `most` headwords, those that most personas define first: what to sample from."""
    asked = {(record.headword, record.persona) for record in validation}
    personas = Counter(word for word, _ in asked)
    words = sorted(personas, key=lambda word: (-personas[word], draw(seed, "prompt", word), word))[:most]
    place = {word: number for number, word in enumerate(words)}
    chosen = [record for record in validation if record.headword in place]
    return sorted(chosen, key=lambda record: (place[record.headword], record.persona, record.reply))
