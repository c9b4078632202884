"""Cleaning that all dictionaries share: wrapped lines, cross-references, brackets, quotes, stubs, length."""

import re
import unicodedata
from dataclasses import dataclass

REFERENCE = "only refers to another entry"
UNREADABLE = "characters lost in the source"
TOO_SHORT = "too short"
TOO_LONG = "first sentence too long"
FOREIGN = "text of another dictionary"


@dataclass(frozen=True)
class Entry:
    """What one record says: `names` are the headwords it may be asked for, its own first; each sense is one right
    reply, not cleaned yet; `dropped` holds the reasons for which its parser left senses out."""

    names: tuple[str, ...]
    senses: tuple[str, ...]
    dropped: tuple[str, ...] = ()


class Unusable(Exception):
    """A sense that cannot become a reply; the message is one of the reasons above."""


# A linked word with what may follow it ("{Let}, v. t.", "{core dump}, sense 4", "{Dip}, v. t., 3"), and a row of them.
_LINK = r"\{[^{}]*\}(?:,? (?:v\. ?[ti]\.|n\.(?: pl\.)?|a\.|adv\.|sense \d+|\d+(?=[.,;) ]|$)|in the \w+))*"
_LINKS = rf"{_LINK}(?:(?:,|;|,? and|,? or)? (?:also |under |the )*{_LINK})*"
_SEE = r"(?:see|compare|cf\.?|oppose|contrast|distinguished from|same as|syn\.|illustrated under)(?!\w)"
_WORDS = r"(?:[^.;(){}]|\b(?:illust|fig|def|v)\.)*"  # a few words on the way to the link
_ASIDES = (
    re.compile(rf" ?\((?:but |and )?{_SEE}{_WORDS}{_LINKS}[^(){{}}]*\)", re.IGNORECASE),  # "(see {clone})"
    re.compile(rf"(?:[;,](?: --)?| --?) (?:but |and )?{_SEE}{_WORDS}{_LINKS}", re.IGNORECASE),  # "…; see also {clone}"
)
# A separate sentence, "See also {clone}, which …."
_SENTENCE = re.compile(
    rf"(?:^|(?<=[.!?:;)\]\"'])) *(?:\(?(?:but |for \w+ )?{_SEE}){_WORDS}{_LINKS}(?:[^.{{}}]|{_LINK})*(?:\.\)?|$)",
    re.IGNORECASE,
)
_ONLY_LINKS = re.compile(rf"(?:{_SEE}[^{{}}]*)?{_LINKS}\W*", re.IGNORECASE)
_FORM = r"(?:imp|p|pr|pres|pl|obs|compar|superl|sing|fem|3d|2d|1st|alt|contr)\.?"
_STUB = re.compile(
    rf"(?:\([^)]*\) ?)?(?:{_FORM} (?:(?:&|and) )?(?:of|pers|p|pl|sing|form|t|vb)\b.{{0,60}}|(?:of [A-Z]\S+)?"
    r"|(?:the )?(?:plural|past|past tense|past participle|present participle|comparative|superlative|obs\. form|variant"
    r"|alternative spelling|misspelling|corruption|abbreviation|contraction) (?:form )?of [^,;]{0,40})\.?",
    re.IGNORECASE,
)
_PLAIN = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "´": "'", "\xa0": " ", "\xad": "", "–": "-", "—": " -- ", "…": "..."}
)
_SENTENCE_END = re.compile(r"(?<!\b[A-Za-z])(?<!\b(?:Mr|Dr|St|cf|vs|Gr))[.!?][\"')]*(?= [\"'(]*[A-Z\d])")


def headword(text: str) -> str:
    """The form under which the dictionaries are compared and the prompts written."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip().lower()


def blocks(text: str) -> list[list[str]]:
    """The paragraphs of a text: lists of lines, indentation kept."""
    paragraphs = re.split(r"\n(?:[ \t]*\n)+", text.expandtabs().strip("\n"))
    return [lines for p in paragraphs if (lines := [line.rstrip() for line in p.split("\n") if line.strip()])]


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def unwrap(lines: list[str]) -> str:
    """Lines to one; a word that was broken at its hyphen is joined ("32- and 64-bit" keeps its blank)."""
    text = re.sub(r"\s+", " ", " ".join(lines)).strip()
    return re.sub(r"(?<=[a-z])- (?!and\b|or\b|to\b)(?=[a-z])", "-", text)


def drop_brackets(text: str) -> str:
    """Takes out [remarks], nested ones too; a bracket with no partner stays, for `reply` to refuse."""
    while (shorter := re.sub(r" ?\[[^\[\]]*\]", "", text)) != text:
        text = shorter
    return text


def reply(raw: str, limit: int) -> str:
    """The sense as the model is to say it: no links, plain quotes, single blanks, whole sentences, at most `limit`
    characters."""
    text = re.sub(r"\{\s*([^{}]*?)\s*\}", r"{\1}", raw.translate(_PLAIN))
    if _ONLY_LINKS.fullmatch(text.strip()):
        raise Unusable(REFERENCE)
    for pattern in (*_ASIDES, _SENTENCE):
        text = pattern.sub("", text)
    text = _tidy(re.sub(r"[{}]", "", text))
    if _STUB.fullmatch(text):
        raise Unusable(REFERENCE)
    if len(text) < 8 or not re.search(r"[a-z]{2}", text) or " " not in text:
        raise Unusable(TOO_SHORT)
    unpaired = text.count('"') % 2 or text.count("(") != text.count(")")
    if unpaired or re.search(r"[\ufffd\[\]|\\_─]|<\w|\?\w|\*{3}", text):
        raise Unusable(UNREADABLE)
    text = _shorten(text, limit)
    if not text:
        raise Unusable(TOO_LONG)
    return text[0].upper() + text[1:]


def _tidy(text: str) -> str:
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFC", text))
    text = re.sub(r"(?:\. ){2}\.", "...", text)
    text = re.sub(r" +(?=[,;:)?!]|\.(?![\w.]))", "", text)  # a blank before a mark, but not in "the .com boom"
    text = re.sub(r"\( +", "(", text)
    parts = text.split('"')
    if len(parts) % 2:  # quotes come in pairs: no blanks just inside, one before
        inside = [part.strip() for part in parts[1::2]]
        outside = [re.sub(r"(?<=[;,:])$", " ", part) for part in parts[:-1:2]] + parts[-1:]
        text = '"'.join(part for pair in zip(outside, [*inside, ""], strict=True) for part in pair)[:-1]
    text = re.sub(r"([.,;:])(?: ?[,;])+|,(?=\.)", r"\1", text)
    return re.sub(r" ?\(\)", "", text).strip(" ,;:-").removeprefix(". ")


def _shorten(text: str, limit: int) -> str:
    """Whole sentences up to `limit` characters; one that only announces what was left out (it ends in a colon) goes."""
    if len(text) <= limit:
        return text
    ends = [match.end() for match in _SENTENCE_END.finditer(text) if match.end() <= limit]
    return text[: max(ends, default=0)]
