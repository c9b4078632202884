"""The dictionary example's reader, parsers and cleaning, on made-up records in each dictionary's real format."""

from pathlib import Path

import pytest

from examples.dictionary_styles import computing_books, word_books
from examples.dictionary_styles.dictd import read_dictd, read_fortunes
from examples.dictionary_styles.text import FOREIGN, REFERENCE, TOO_LONG, TOO_SHORT, UNREADABLE, Entry, Unusable, reply
from tests.examples.made_up_dictionaries import (
    BIERCE_TUB,
    ELEMENT,
    FOLDOC_TUB,
    FORTUNES,
    JARGON_TUB,
    VERA_TUB,
    WEBSTER_TUB,
    WORDNET_TUB,
    write_dictd,
)


def replies(entries: list[Entry]) -> dict[str, list[str]]:
    """Headword -> replies, with the reason in the place of a sense that cannot be one."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        for sense in entry.senses:
            try:
                text = reply(sense, 300)
            except Unusable as reason:
                text = f"[{reason}]"
            found.setdefault(entry.names[0], []).append(text)
    return found


def test_dictd_reads_each_entry_once_and_counts_its_keys(tmp_path: Path) -> None:
    entries = [(["b"], "x" * 70000), (["a", "as", "aed"], "straße\n"), (["00-database-short"], "made up")]
    write_dictd(tmp_path / "d.index", entries)
    raws = list(read_dictd(tmp_path / "d.index", tmp_path / "d.dict.dz"))
    assert [(raw.text, raw.keys) for raw in raws] == [("x" * 70000, 1), ("straße\n", 3)]


@pytest.mark.parametrize(("line", "message"), [("word A", "not 'key TAB"), ("word\tA\t//", "past the end")])
def test_dictd_names_a_damaged_line(tmp_path: Path, line: str, message: str) -> None:
    write_dictd(tmp_path / "d.index", [(["a"], "text")])
    (tmp_path / "d.index").write_text(f"a\tA\tE\n{line}\n")
    with pytest.raises(ValueError, match=rf"d\.index:2: .*{message}"):
        list(read_dictd(tmp_path / "d.index", tmp_path / "d.dict.dz"))


def test_dictd_refuses_half_a_file(tmp_path: Path) -> None:
    write_dictd(tmp_path / "d.index", [(["a"], "text" * 1000)])
    half = tmp_path / "d.dict.dz"
    half.write_bytes(half.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a whole dictzip file"):
        list(read_dictd(tmp_path / "d.index", half))


def test_webster_keeps_the_senses_of_1913_alone() -> None:
    (entry,) = word_books.webster(WEBSTER_TUB)
    assert replies([entry]) == {
        "Tub": [
            "A wooden vessel, open at the top; as, a wash tub.",
            "(Naut.) Any boat; -- so called in jest.",
            "A clumsy boat of naïve design.",
            f"[{REFERENCE}]",
        ]
    }
    assert entry.dropped == (FOREIGN,)


def test_webster_head_ends_where_the_definition_begins() -> None:
    record = r"""Tubby \Tub"by\ (t[u^]b"b[y^]), Tubbish \Tub"bish\ (tubbish), a.
   [Compar. {Tubbier} (t[u^]b"b[i^]*[~e]r); superl. {Tubbiest}.]
   [From {Tub}.] (Colloq.)
   Shaped like a tub.
   [1913 Webster]
"""
    assert replies(word_books.webster(record)) == {"Tubby": ["(Colloq.) Shaped like a tub."]}


def test_wordnet_bierce_and_fortunes() -> None:
    assert replies(word_books.wordnet(WORDNET_TUB)) == {
        "tub": [
            'A large open vessel that holds water or something low-priced; "fill the tub"',
            "The amount a tub holds",
        ]
    }
    assert replies(word_books.bierce(BIERCE_TUB)) == {"TUB": ["A vessel in which a citizen keeps his dignity afloat."]}


def test_fortunes_are_definitions_without_their_authors(tmp_path: Path) -> None:
    (tmp_path / "definitions").write_text(FORTUNES)
    entries = [e for raw in read_fortunes(tmp_path / "definitions") for e in word_books.fortunes(raw.text)]
    assert replies(entries) == {
        "Tub": ["A bathroom's only argument for sitting down."],
        "Tubber's Law": ["No tub is deep enough."],
        "Sink": ["A small tub.", "A place for dishes."],
    }
    assert [entry.dropped for entry in entries if entry.dropped] == [(FOREIGN,)]


def test_jargon_foldoc_vera_and_elements() -> None:
    assert replies(computing_books.jargon(JARGON_TUB)) == {
        "tub": ['To frob a machine with "great force".', "A slow disk, widely-feared."]
    }
    (entry,) = computing_books.foldoc(FOLDOC_TUB)
    assert entry.names == ("Totally Unified Backplane", "TUB")
    assert replies([entry]) == {"Totally Unified Backplane": ["A bus for 32- and 64-bit boards. It was slow."]}
    assert replies(computing_books.vera(VERA_TUB)) == {"TUB": ["Technical University of Brigadoon (Scotland) (org.)"]}
    assert replies(computing_books.elements(ELEMENT)) == {"tubium": ["Symbol: Tb. A soft metal found in bath water."]}


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("See {Tub}, and {Vat}.", REFERENCE),
        ("{Totally Unified Backplane}.", REFERENCE),
        ("p. p. of {Tub}.", REFERENCE),
        ("Plural of {Tub}.", REFERENCE),
        ("A vat.", TOO_SHORT),
        ("Tubbishness.", TOO_SHORT),
        ("To f?ll a tub with water.", UNREADABLE),
        ('The so-called "tub of old.', UNREADABLE),
        ("A tub of h[oomac]t water.", UNREADABLE),
        ("A tub " + "and a tub " * 40, TOO_LONG),
    ],
)
def test_a_sense_that_is_not_a_reply_is_refused(raw: str, reason: str) -> None:
    with pytest.raises(Unusable, match=f"^{reason}$"):
        reply(raw, 300)


def test_a_long_sense_ends_with_a_sentence() -> None:
    assert (
        reply("A tub, e.g. of J. Tubber. It holds water. It leaks.", 45) == "A tub, e.g. of J. Tubber. It holds water."
    )
