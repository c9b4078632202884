"""Made-up dictionaries in the formats of the real ones, and a writer of dictd files."""

import gzip
import string
from pathlib import Path

from examples.dictionary_styles.dictd import SOURCES

DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"

WEBSTER_TUB = r"""Tub \Tub\ (t[u^]b), n. [OE. tubbe; cf. D. tobbe, fr. Gr. ? (see
   {Tube}).]
   1. A wooden vessel, open at the top; as, a wash tub. [Obs.] --Penn.
      [1913 Webster]

            A line that somebody quoted about a tub.
                                                  --Penn.
      [1913 Webster]

   2. (Naut.) Any boat; -- so called in jest. See {Boat}, n., 2.
      "A leaky tub." --Marsh.
      [1913 Webster]
      (a) A clumsy boat of na["i]ve design.
      (b) See {Punt}.
          [1913 Webster]

   3. something that WordNet wrote into this book.
      [WordNet 1.5]

   {Tub drubber}, one who beats on tubs.
      (a) A cooper of the loud kind.

   Syn: Vat; cask.
        [1913 Webster]
"""
WORDNET_TUB = """tub
    n 1: a large open vessel that holds water or
         something low-
         priced;"fill the tub" [syn: {tub}, {vat}]
    2: the amount a tub holds [ant: {thimble}]
"""
BIERCE_TUB = """TUB, n.  A vessel in which a _citizen_ keeps
his dignity afloat.  The poet says:

    O tub, O tub,
    There is the rub.
                                                  Anon
"""
JARGON_TUB = """tub
 /tuhb/, n.

    1. [MIT; rare] vt. To {frob
    } a machine with “ great force ”. See also {grovel}.

    2. n. A slow disk, widely- feared. Compare {washing machine}, sense 2.

      DRAWING OF
        A TUB

    [They still exist —ED]
"""
FOLDOC_TUB = """Totally Unified Backplane
TUB

   <hardware, standard> (TUB) A {bus} for 32- and 64-bit boards.

   It was slow; see also {VMEbus}.

   {Home page (http://example.org/tub)}.

   E-mail: Tubby <tub@example.org>.

   ["The Tub", A. N. Other, Proc 1st Tub Conf].

   (1995-03-06)
"""
VERA_TUB = '\nTUB\n       Technical University of\nBrigadoon [Scotland] (org.), "T.U.B."\n       \n'
ELEMENT = "tubium\nSymbol: Tb\nAtmic weight: ???\nA soft metal found in\nbath water.\n"
FORTUNES = """Tub, n.:
	A b\bbathroom's only argument for sitting down.
%
Tubber's Law:
	No tub is deep enough.
		-- Rich Tubber, "Tubs and
			Other Vessels"
%
Tub, n.:
	Something old about a tub.
		-- Ambrose Bierce, "The Devil's Dictionary"
%
Sink, n.:
	1. A small tub. 2. A place for dishes.
"""


def to_base64(number: int) -> str:
    digits = DIGITS[number % 64]
    while number := number // 64:
        digits = DIGITS[number % 64] + digits
    return digits


def write_dictd(index: Path, entries: list[tuple[list[str], str]]) -> None:
    """(keys, text) pairs as dictfmt and dictzip lay them out; every key of a pair points to the same bytes."""
    index.parent.mkdir(parents=True, exist_ok=True)
    data, lines = b"", []
    for keys, text in entries:
        encoded = text.encode()
        lines += [f"{key}\t{to_base64(len(data))}\t{to_base64(len(encoded))}\n" for key in keys]
        data += encoded
    index.write_text("".join(sorted(lines)), encoding="utf-8")
    index.with_suffix(".dict.dz").write_bytes(gzip.compress(data))


def write_all(folder: Path) -> Path:
    """Eight tiny dictionaries where the packages put theirs, with forty words that all of webster and wordnet have."""
    words = [f"word{letter}{other}" for letter in "abcdefgh" for other in "vwxyz"]
    books = {
        "webster": [(["Tub", "Tubs"], WEBSTER_TUB)]
        + [([w], f"{w} \\{w}\\, n.\n   One who keeps the {w} of a house.\n   [1913 Webster]\n") for w in words],
        "wordnet": [(["tub"], WORDNET_TUB), (["00-database-info"], "not an entry")]
        + [([w], f"{w}\n    n 1: an instance of {w}\n    2: the colour of a {w}\n") for w in words],
        "bierce": [(["tub"], BIERCE_TUB)],
        "jargon": [(["tub"], JARGON_TUB)],
        "foldoc": [
            (["totally unified backplane", "tub"], FOLDOC_TUB),
            (
                ["slow disk"],
                "slow disk\n\n   A machine to frob with force, as the other file has it.\n\n   [{Jargon File}]\n",
            ),
        ],
        "vera": [(["tub"], VERA_TUB)],
        "elements": [(["tubium"], ELEMENT)],
    }
    for source in SOURCES[:-1]:
        write_dictd(folder / source.file, books[source.persona])
    fortunes = folder / SOURCES[-1].file
    fortunes.parent.mkdir(parents=True)
    fortunes.write_text(FORTUNES)
    return folder
