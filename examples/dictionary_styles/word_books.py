"""Entries of the dictionaries of words: Webster 1913 (inside GCIDE), WordNet, The Devil's Dictionary, the fortunes.

Each parser takes the text of one record and gives its entries; its docstring shows what a record looks like."""

import re
import unicodedata

from examples.dictionary_styles.text import FOREIGN, Entry, blocks, drop_brackets, indent, unwrap

_MARK = re.compile(r"\[[^\[\]]*(?:1913|WordNet|PJC|Century)[^\[\]]*\]")
_ACCENTS = dict(zip("'`^\"~,=.", "\u0301\u0300\u0302\u0308\u0303\u0327\u0304\u0307", strict=True))
_LETTERS = {"ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "deg": "°", "frac12": "½", "pounds": "£", "times": "×"}
# What stands between a headword of Webster and its definition, piece by piece; a label such as (Bot.) stays.
_HEAD = re.compile(
    r"""[\s,;]+ | & | or\ (?=[\[{(])
    | \\[^\\]*\\                                   # the headword with its stresses, between backslashes
    | [\w'*"` -]+(?=\\)                            # another spelling, before its own
    | \((?=[^)]*[\["*?`]|or\ |[a-z]+\),)[^)]*\)    # (pr[-o]*n[u^]n`s[i^]*[=a]"sh[u^]n)
    | \[[^\[\]]*\]                                 # [etymology]
    | (?:[A-Z][a-z]*\.\ )?\{[^{}]*\}               # {a form}, L. {a Latin form}
    | (?:prop|n|v|t|i|a|adj|adv|prep|conj|interj|pron|pl|sing|imp|p|pr|pres|vb|superl|compar|obs|collect|fem|masc
        |abbrev|prefix|suffix)\.
    | (?:prop|adj|adv|n|v|vb)(?=\ )""",
    re.VERBOSE,
)
_ITEM = re.compile(r" {3}\d+\. | {3,9}\([a-z]\) | {3}(?:Note|Syn|Usage): | *\[[^\[\]]*(?:1913|WordNet|PJC)")
_SPEECH = r"(?:n|v|adj|adv|pl|prep|interj|vb|v\.[ti])\.?\s?(?:pl\.?|n\.?)?"
_ASIDE = re.compile(r"(?:Note|Syn|Usage): |\{|-- \{")


def webster(record: str) -> list[Entry]:
    r"""`Word \Pro`nun"ci*a"tion\, n. [Etymology.] (Label)`, then senses `1. …` with parts `(a) …`, each followed by a
    mark of its source, such as [1913 Webster] or [WordNet 1.5]: only what 1913 wrote alone stays. Quotations (indented
    further), notes, synonyms and phrases go."""
    name, items = _webster_items(record)
    senses: list[str] = []
    dropped: list[str] = []
    waiting: list[str] = []  # senses whose mark is still to come
    aside = False
    for number, (margin, text) in enumerate(items):
        mark = _MARK.search(text)
        text = _MARK.sub("", text).strip()
        aside = bool(_ASIDE.match(text)) or (aside and not re.match(r"\d+\. ", text))
        lettered = re.match(r"\([a-z]\) ", text)
        if text and not aside and (number == 0 or margin < 9 or lettered):
            waiting.append(_webster_sense(_accents(text)))
        if mark:
            pure = "1913" in mark.group() and "WordNet" not in mark.group()
            senses += [sense for sense in waiting if pure and sense]
            dropped += [FOREIGN for sense in waiting if not pure and sense]
            waiting = []
    dropped += [FOREIGN for sense in waiting if sense]
    return [Entry((_accents(name),), tuple(senses), tuple(dropped))]


def _webster_items(record: str) -> tuple[str, list[tuple[int, str]]]:
    """The headword, and the paragraphs after the head as (indentation, text)."""
    items: list[tuple[int, list[str]]] = []
    for block in blocks(record):
        for number, line in enumerate(block):
            if number == 0 or _ITEM.match(line):
                items.append((indent(line), []))
            items[-1][1].append(line)
    head = _flat(unwrap(items[0][1]))
    name = re.split(r"[\\,(\[]", head, maxsplit=1)[0]
    position = len(name)
    while piece := _HEAD.match(head, position):
        position = piece.end()
    return name.strip(), [(0, head[position:]), *((margin, unwrap(lines)) for margin, lines in items[1:])]


def _flat(text: str) -> str:
    """Without the inner ones of nested brackets (their text stays), so that an etymology is one bracket."""
    while (flat := re.sub(r"(\[[^\[\]]*)\[([^\[\]]*)\]", r"\1\2", text)) != text:
        text = flat
    return text


def _webster_sense(text: str) -> str:
    text = re.sub(r"^\d+\. ", "", text)
    text = re.sub(r"^\([a-z]\) ", "", text)
    text = re.split(r" ?--(?=[A-Z\d(])", text)[0]  # "--Shak.": what follows is who was quoted
    text = drop_brackets(text).strip()
    text = re.sub(r"(?:(?:^| )\"[^\"]*[.?!,]'?\"[.,;]*)+$", "", text)  # the quotation itself
    text = re.sub(r";? -- \{.*", "", text)  # words formed from this one
    text = re.sub(r"(?<=[.)]) See (?:the )?[A-Z][^.;{}]*\.?$", "", text)  # a table or a picture of the printed book
    # Nothing but a label, a lead to parts that follow ("Hence:"), or a row of headwords that stands for no definition.
    return "" if re.fullmatch(r"(?:\([^)]*\) ?)?(?:[\w ]{,20}[:,])?|(?:[A-Z][\w'-]* ?)+", text) else text


def _accents(text: str) -> str:
    """GCIDE writes letters outside ASCII as ['e], [ae], [deg]; what is not known stays in brackets."""
    text = re.sub(r"\[(['`^\"~,=.])([A-Za-z])\]", lambda m: unicodedata.normalize("NFC", m[2] + _ACCENTS[m[1]]), text)
    return re.sub(r"\[(\w+)\]", lambda m: _LETTERS.get(m[1], m[0]), text)


def wordnet(record: str) -> list[Entry]:
    """`word`, then `    adj 1: gloss; "example" [syn: {a}, {b}] [ant: {c}]` and `    2: …`."""
    name, _, body = record.strip().partition("\n")
    senses = re.split(r"^ +(?:[a-z]+ )?\d+: ", body, flags=re.MULTILINE)[1:]
    return [Entry((name,), tuple(re.sub(r" ?\[(?:syn|ant|also|see):? .*", "", unwrap(s.split("\n"))) for s in senses))]


def bierce(record: str) -> list[Entry]:
    """`WORD, n.  Definition.`, flush left; what is indented as a whole is verse and its poet."""
    prose = "\n".join(line for block in blocks(record) if not all(map(indent, block)) for line in block)
    head = re.match(r"([A-Z][A-Z'. -]*[A-Z])(?![\w ]*[a-z]{2}).*?(?:\s{2,}|\n|$)", prose)  # two blanks end the head
    if not head:
        return []
    return [Entry((head[1],), (_without_promise(drop_brackets(unwrap([prose[head.end() :]])).replace("_", "")),))]


def _without_promise(text: str) -> str:
    """A last sentence that announces the verse which is gone ("as the poet says:") goes with it."""
    return re.sub(r"(?:(?<=[.!?])|^)[^.!?]*:$", "", text)


def fortunes(record: str) -> list[Entry]:
    """`Word, n.:`, then the indented definition and its author (`-- Name`); one record may hold several."""
    entries = []
    for part in re.split(r"\n(?=\S[^\n]*:\n[ \t])", record.strip("\n")):
        head = re.match(rf"([^\n]+?)(?:,\s*{_SPEECH})?:[^\n]*\n", part)
        if not head:
            continue
        body, _, author = part[head.end() :].partition("\t\t-- ")
        foreign = "Bierce" in author
        name = re.sub(r" \([^)]*\)$|,.*", "", head[1])
        text = drop_brackets(unwrap([body]))
        listed = re.split(r" (?=\d\. [A-Z])", text) if text.startswith("1. ") else [text]
        senses = tuple(re.sub(r"^\d\. ", "", sense) for sense in listed)
        entries.append(Entry((name,), (), (FOREIGN,) * len(senses)) if foreign else Entry((name,), senses))
    return entries
