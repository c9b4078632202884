"""Reads the dictionaries as Debian ships them: dictd databases (`NAME.index` + `NAME.dict.dz`) and one fortune file.

Which package carries which dictionary is the table SOURCES; a missing one is named with the command that gets it.
"""

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_DIGITS = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


@dataclass(frozen=True)
class Source:
    """One dictionary, hence one persona; `file` is relative to the folder the packages were unpacked into."""

    persona: str
    package: str
    file: str


SOURCES = (
    Source("webster", "dict-gcide", "usr/share/dictd/gcide.index"),
    Source("wordnet", "dict-wn", "usr/share/dictd/wn.index"),
    Source("bierce", "dict-devil", "usr/share/dictd/devil.index"),
    Source("jargon", "dict-jargon", "usr/share/dictd/jargon.index"),
    Source("foldoc", "dict-foldoc", "usr/share/dictd/foldoc.index"),
    Source("vera", "dict-vera", "usr/share/dictd/vera.index"),
    Source("elements", "dict-elements", "usr/share/dictd/elements.index"),
    Source("fortunes", "fortunes", "usr/share/games/fortunes/definitions"),
)


@dataclass(frozen=True)
class Raw:
    """The text of one entry, and how many index keys lead to it (its own headword, inflections, phrases, aliases)."""

    text: str
    keys: int


def check_sources(folder: Path) -> None:
    """All packages that are missing are named at once, so that one command repairs it."""
    missing = [source.package for source in SOURCES if not all(path.is_file() for path in _files(folder, source))]
    if missing:
        names = " ".join(missing)
        raise ValueError(
            f"{folder} lacks the files of Debian's {names}: get them with "
            f"'apt-get download {names} && for p in *.deb; do dpkg -x $p {folder}; done' (no root needed)"
        )


def read_source(folder: Path, source: Source) -> Iterator[Raw]:
    if source.file.endswith(".index"):
        return read_dictd(*_files(folder, source))
    return read_fortunes(*_files(folder, source))


def read_dictd(index: Path, dictionary: Path) -> Iterator[Raw]:
    """Each distinct entry once, in the order of the file. An index line is `key TAB offset TAB size`, the numbers in
    base 64 (most significant digit first); the dictzip file is gzip with a table that plain reading needs not."""
    try:
        data = gzip.decompress(dictionary.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"{dictionary} is not a whole dictzip file ({error}): unpack its package again") from error
    keys: dict[tuple[int, int], int] = {}
    for line, text in enumerate(index.read_text(encoding="utf-8").splitlines(), 1):
        key, *fields = text.split("\t")
        try:
            place = (_number(fields[0]), _number(fields[1]))
        except (IndexError, KeyError) as error:
            raise ValueError(f"{index}:{line}: not 'key TAB offset TAB size': unpack its package again") from error
        if sum(place) > len(data):
            raise ValueError(f"{index}:{line}: points past the end of {dictionary.name}: unpack its package again")
        if not re.match(r"00-?database|00-?(gcide|web1913)", key):
            keys[place] = keys.get(place, 0) + 1
    for offset, size in sorted(keys):
        yield Raw(_decode(data[offset : offset + size]), keys[offset, size])


def _decode(text: bytes) -> str:
    """UTF-8, or Latin-1 as a few old entries are."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1")


def read_fortunes(path: Path) -> Iterator[Raw]:
    """A fortune file: texts between lines that hold only `%`; overstruck letters (`x BACKSPACE y`) become one."""
    text = re.sub(".\b", "", path.read_text(encoding="utf-8", errors="replace"))
    for record in re.split(r"^%\n", text, flags=re.MULTILINE):
        if record.strip():
            yield Raw(record, 1)


def _files(folder: Path, source: Source) -> list[Path]:
    path = folder / source.file
    return [path, path.with_suffix(".dict.dz")] if path.suffix == ".index" else [path]


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS[digit]
    return value
