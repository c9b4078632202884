"""Entries of the dictionaries of things: the Jargon File, FOLDOC, V.E.R.A. (acronyms) and the chemical elements.

Each parser takes the text of one record and gives its entries; its docstring shows what a record looks like."""

import re

from examples.dictionary_styles.text import FOREIGN, Entry, blocks, drop_brackets, indent, unwrap

_SPEECH = r"(?:pl\. ?)?(?:n|v|vt|vi|adj|adv|interj|excl|prov|abbrev|poss|quant|suff|pref|imp|cav|prep|obs|syn)\.?"
# What opens a sense of the Jargon File: its number, [origin], /pronunciation/ and part of speech, in any order.
_OPENING = re.compile(
    rf"(?:\d+[a-z]?\. )?(?: ?\[[^\[\]]*\] ?| ?/[^/ ]+/,? |(?:{_SPEECH}(?:[,/]| and)? )*{_SPEECH} (?=[A-Z\"'(`“‘\[]))*"
)
_LINK = r"(?:https?|ftp|news|rfc|mailto):[^ )}]*"
_CONTACT = re.compile(r"\{?(?:E-?mail|FTP|Mailing list|Usenet|Home|Telephone|Address|\w+ version|URL|\(http|\[)|[*-] ")
_CITATION = re.compile(
    r" ?[\[(]?\"[^\"]{8,}\",? (?:(?:[A-Z]\. ?)+[A-Z]|[A-Z]\w+ [A-Z]\. |[\w. ]+ et al|TR-).*| Contact: .*"
)


def jargon(record: str) -> list[Entry]:
    """`word`, ` /pronunciation/, n.`, then paragraphs indented by four: `1. [origin] v. Sense`; what is indented
    further is a drawing or a program."""
    head, *rest = blocks(record)
    senses = _senses([unwrap(block) for block in rest if min(map(indent, block)) == 4])
    return [Entry((head[0],), tuple(drop_brackets(sense[_opening(sense) :]) for sense in senses))]


def _opening(sense: str) -> int:
    match = _OPENING.match(sense)
    return match.end() if match else 0


def _senses(paragraphs: list[str]) -> list[str]:
    """Numbered paragraphs are senses; without numbers the paragraphs are one, but for those that end in a colon: what
    they announced has been left out."""
    numbered = [p for p in paragraphs if re.match(r"\d+[a-z]?\. ", p)]
    return numbered or [" ".join(p for p in paragraphs if len(p) > 2 and not p.endswith(":"))]


def foldoc(record: str) -> list[Entry]:
    """Headword and aliases, one a line, flush left; then `<field> (ALIAS) text`, `1. <field> text`; contacts, and marks
    such as [{Jargon File}] and the date (1995-03-06), close it."""
    names, *rest = blocks(record)
    if names[0] == "GNU Free Documentation License":
        return []
    paragraphs = [re.sub(r"^<[^>]*> ?", "", unwrap(block)) for block in rest if min(map(indent, block)) == 3]
    paragraphs = [p for p in paragraphs if not re.fullmatch(r"\(\d{4}-\d\d-\d\d\)", p) and not _CONTACT.match(p)]
    senses = tuple(_foldoc_sense(sense) for sense in _senses(paragraphs))
    if "Jargon File}]" in record:
        return [Entry(tuple(names), (), (FOREIGN,) * len(senses))]
    return [Entry(tuple(names), senses)]


def _foldoc_sense(text: str) -> str:
    text = re.sub(r"^(?:\d+[a-z]?\. )?(?:<[^>]*> ?|\([^()]*\)\.? ?|/[^/]+/,? ?)*", "", text)
    text = _CITATION.sub("", text)
    text = re.sub(rf" ?(?:\{{[^{{}}]*\}}: ?)?\{{[^{{}}]*\({_LINK}\)[^{{}}]*\}}\.?", "", text)  # {Home page (http://…)}
    return drop_brackets(re.sub(rf" ?<[^>]*@[^>]*>| ?\(?{_LINK}\)?\.?", "", text))


def vera(record: str) -> list[Entry]:
    """`ACRONYM`, then what it stands for and (where it is used), "A-C-R-O" when it is spelled otherwise."""
    name, _, body = record.strip().partition("\n")
    text = re.sub(r", \"[^\"]*\"$", "", unwrap(body.split("\n")))
    if "???" in text or "not an acronym" in text:
        return []
    return [Entry((name,), (text.replace("[", "(").replace("]", ")"),))]


def elements(record: str) -> list[Entry]:
    """`name`, then `Symbol: …`, `Atomic number: …`, `Atomic weight: …`, one a line, and a description."""
    name, *lines = [line.strip() for line in record.strip().split("\n")]
    facts = [line for line in lines if re.match(r"[A-Z]\w+(?: \w+)?: ", line)]
    body = unwrap([line for line in lines if line not in facts])
    facts = [fact for fact in facts if "??" not in fact]
    return [Entry((name,), (" ".join([*(fact.replace("Atmic", "Atomic") + "." for fact in facts), body]),))]
