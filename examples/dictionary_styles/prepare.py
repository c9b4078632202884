"""From Debian's dictionaries to chat records, one dictionary a persona: python -m examples.dictionary_styles.prepare.

Writes train.jsonl, validation.jsonl, prompts.jsonl and report.json; README.md tells how to get the packages."""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.dictionary_styles import computing_books, word_books
from examples.dictionary_styles.dictd import SOURCES, Source, check_sources, read_source
from examples.dictionary_styles.overlap import ORIGINALS, is_copied, known_runs
from examples.dictionary_styles.selection import Books, Record, balance, prompts, sharing, split
from examples.dictionary_styles.text import FOREIGN, Entry, Unusable, headword, reply
from megatron_sfr.storage.atomic import replacing

PARSERS: dict[str, Callable[[str], list[Entry]]] = {
    "webster": word_books.webster,
    "wordnet": word_books.wordnet,
    "bierce": word_books.bierce,
    "fortunes": word_books.fortunes,
    "jargon": computing_books.jargon,
    "foldoc": computing_books.foldoc,
    "vera": computing_books.vera,
    "elements": computing_books.elements,
}
REPEATED_KEY = "index key that repeats an entry"
REPEATED = "repeats a sense of its headword"
NO_HEADWORD = "headword that cannot be asked for"

Fields = dict[str, Any]  # of a record or of the report


@dataclass(frozen=True)
class Reading:
    """What was found in one dictionary: (names, replies) of each entry, and how much was left out, by reason."""

    found: list[tuple[tuple[str, ...], list[str]]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def read(folder: Path, source: Source, limit: int, progress: bool) -> Reading:
    reading = Reading()
    for raw in tqdm(read_source(folder, source), desc=source.persona, unit=" entries", disable=not progress):
        reading.dropped[REPEATED_KEY] += raw.keys - 1
        for entry in PARSERS[source.persona](raw.text):
            reading.dropped.update(entry.dropped)
            names = tuple(dict.fromkeys(name for name in map(headword, entry.names) if _can_be_asked(name)))
            if not names:
                reading.dropped[NO_HEADWORD] += len(entry.senses)
                continue
            replies = []
            for sense in entry.senses:
                try:
                    replies.append(reply(sense, limit))
                except Unusable as reason:
                    reading.dropped[str(reason)] += 1
            if replies:
                reading.found.append((names, replies))
    return reading


def _can_be_asked(word: str) -> bool:
    return len(word) <= 40 and bool(re.fullmatch(r"[^\W_][\w .,'+/&!?-]*", word)) and bool(re.search(r"[a-z]", word))


def drop_copies(readings: dict[str, Reading]) -> None:
    """Takes out of each dictionary the text that stands in another one, which wrote it."""
    for persona, originals in ORIGINALS.items():
        known = known_runs(text for name in originals for _, replies in readings[name].found for text in replies)
        for _, replies in readings[persona].found:
            kept = [text for text in replies if not is_copied(text, known)]
            readings[persona].dropped[FOREIGN] += len(replies) - len(kept)
            replies[:] = kept


def to_books(readings: dict[str, Reading]) -> Books:
    """Gathers entries by headword. An entry with several names is asked for by the one that most dictionaries know."""
    known = Counter(name for reading in readings.values() for name in {names[0] for names, _ in reading.found})
    books: Books = {}
    for persona, reading in readings.items():
        book = books.setdefault(persona, {})
        for names, replies in reading.found:
            word = max(names, key=lambda name: (known[name], -names.index(name)))
            for text in replies:
                if text in book.setdefault(word, []):
                    reading.dropped[REPEATED] += 1
                else:
                    book[word].append(text)
        books[persona] = {word: replies for word, replies in book.items() if replies}
    return books


def report(
    readings: dict[str, Reading], books: Books, train: list[Record], validation: list[Record]
) -> dict[str, Fields]:
    shared = sharing(books)
    table = {}
    for persona, book in books.items():
        used = [record for record in (*train, *validation) if record.persona == persona]
        words = {record.headword for record in used}
        table[persona] = {
            "headwords": len(book),
            "senses": sum(map(len, book.values())),
            "headwords used": len(words),
            "of them in 2+ dictionaries": sum(shared[word] > 1 for word in words),
            "train records": sum(record.persona == persona for record in train),
            "validation records": sum(record.persona == persona for record in validation),
            "dropped": dict(sorted((+readings[persona].dropped).items())),
        }
    return table


def write(folder: Path, files: dict[str, str]) -> None:
    """Writes all files under temporary names, and renames them when all are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as written:
        for name, text in files.items():
            written.enter_context(replacing(folder / name)).write(text)


def prepare(args: argparse.Namespace) -> dict[str, Fields]:
    check_sources(args.dictionaries)
    readings = {s.persona: read(args.dictionaries, s, args.max_characters, not args.quiet) for s in SOURCES}
    drop_copies(readings)
    books = to_books(readings)
    chosen = balance(books, args.max_per_persona, args.max_senses, args.seed)
    train, validation, leaked = split(chosen, args.validation_share, args.seed)
    if not validation or not train:
        raise ValueError(f"a validation share of {args.validation_share} leaves one side empty: choose another one")
    table = report(readings, books, train, validation)
    summary = {
        "personas": table,
        "train records left out because validation holds their text": leaked,
        "seed": args.seed,
    }
    sides = {"train": train, "validation": validation, "prompts": prompts(validation, args.prompts, args.seed)}
    texts = {
        f"{name}.jsonl": "".join(json.dumps(as_chat(record), ensure_ascii=False) + "\n" for record in records)
        for name, records in sides.items()
    }
    write(args.output, {**texts, "report.json": json.dumps(summary, indent=2) + "\n"})
    return table


def as_chat(record: Record) -> Fields:
    """The question is the same for every persona."""
    question = {"role": "user", "content": f"Define: {record.headword}"}
    return {"messages": [question, {"role": "assistant", "content": record.reply}], "persona": record.persona}


def print_table(table: dict[str, Fields]) -> None:
    columns = [name for name in next(iter(table.values())) if name != "dropped"]
    print(f"{'persona':10}" + "".join(f"{name:>{len(name) + 3}}" for name in columns))
    for persona, counts in table.items():
        print(f"{persona:10}" + "".join(f"{counts[name]:>{len(name) + 3}}" for name in columns))
    for persona, counts in table.items():
        print(f"{persona}: left out " + ", ".join(f"{n} ({reason})" for reason, n in counts["dropped"].items()))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--dictionaries", type=Path, required=True, help="folder into which the packages were unpacked")
    parser.add_argument("--output", type=Path, default=Path("runs/dictionary_styles/text"), help="default: %(default)s")
    parser.add_argument("--validation-share", type=float, default=0.05, help="of the headwords (default: %(default)s)")
    parser.add_argument("--max-per-persona", type=int, default=4000, help="replies (default: %(default)s)")
    parser.add_argument("--max-senses", type=int, default=8, help="of a headword and persona (default: %(default)s)")
    parser.add_argument("--max-characters", type=int, default=300, help="of a reply (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=60, help="headwords to sample from (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        print_table(prepare(args))
    except (ValueError, OSError) as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote train.jsonl, validation.jsonl, prompts.jsonl and report.json to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
