"""Sentence boundaries in any script: the rules of Unicode (UAX #29, SB1-SB11) as one pattern, with some departures.

`regex` knows the Sentence_Break class of each character; what follows a full stop decides whether a sentence ends.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

ABBREVIATIONS = "Mr Mrs Ms Dr Prof Sr Jr St Gen Col Capt Lt Rev Hon Fig Figs Eq Eqs p pp vs cf al e\\.g i\\.e".split()


def sentence_starts(text: str) -> list[int]:
    """The index of the first character of each sentence, from 0, ascending.

    Unicode's rules, with these departures for text as models write it:

    - blanks between two sentences of a line belong to the second, as in the tokens of most tokenizers; line ends, and
      blank lines, belong to the sentence before them, and those that begin the text to the first
    - a full stop after the number or letter of a list item ("2. "), after a lone capital ("J. Bach") or one of
      ABBREVIATIONS does not end a sentence
    - Markdown's marks of emphasis and code (* _ ~ `) after a full stop belong to the sentence, as quotes do
    - an opening quote or bracket right before a word opens the next sentence, in scripts without blanks too

    Each line end ends a sentence, so items of lists and lines of code are sentences. In scripts without full stops,
    such as Thai, sentences are lines.
    """
    blank = len(text) - len(text.lstrip())
    ends = [found.end() for found in _sentence_end().finditer(text, blank)]
    return [0, *ends]


@lru_cache(maxsize=1)
def _sentence_end() -> Any:
    """Matches from a sentence's last mark (or line end) to where the next sentence starts."""
    import regex  # here, since windows do not need it

    line_end, aterm = r"[\p{SB=SE}\p{SB=CR}\p{SB=LF}]", r"\p{SB=AT}"
    close = r"(?! [\p{Ps}\p{Pi}]++ \w ) [\p{SB=CL}*_~`]"
    ignored = r"[\p{SB=EX}\p{SB=FO}]*"  # SB5: combining marks are skipped
    item = r"^[ \t]*(?:\d{1,3}(?:\.\d{1,3})*|\p{Ll})"
    pattern = rf"""
        (?:
            \p{{SB=ST}} {ignored}+
          | {aterm} {ignored}+
            (?! \p{{SB=NU}} )                                                               # SB6: 3.14
            (?! (?<= [\p{{SB=UP}}\p{{SB=LO}}] {ignored} {aterm} {ignored} ) \p{{SB=UP}} )   # SB7: U.S
            (?! [^\p{{SB=LE}}\p{{SB=UP}}\p{{SB=LO}}\p{{SB=SE}}\p{{SB=CR}}\p{{SB=LF}}\p{{SB=ST}}\p{{SB=AT}}]*+
                \p{{SB=LO}} )                                                               # SB8: etc. and so on
            (?<! (?: {item} | \b\p{{Lu}} | \b(?:{"|".join(ABBREVIATIONS)}) ) {aterm} {ignored} )
        )
        (?: {close} {ignored}+ )*+
        (?! (?:\p{{SB=SP}} {ignored}+)*+ [\p{{SB=SC}}\p{{SB=ST}}\p{{SB=AT}}] )              # SB8a: ?!
        (?: \p{{SB=SP}}*+ {line_end} (?:\p{{SB=SP}}*+ {line_end})*+ )?+
        (?= \s*+ \S )
      | {line_end} (?:\p{{SB=SP}}*+ {line_end})*+ (?= \s*+ \S )
    """
    return regex.compile(pattern, regex.VERBOSE | regex.MULTILINE)
