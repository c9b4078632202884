r"""Questions with an exact answer, such as GSM8K's: the final answer of a reply, and whether two answers are equal.

The final answer is what the reply marks: after the last `####`, in the last \boxed{}, after the last "answer is" or
"Answer:"; without a mark, the last number. Answers are compared as numbers (1,200.0 is 1200, 1/2 is 0.5), other answers
as text without case.
"""

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from megatron_sfr.evaluation.generate.thinking import without_thoughts

HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
PHRASE = re.compile(r"\banswer(?: is\b:?|:)[ \t]*([^\s:][^\n]*?)(?=\.?(?:\s*\n|\s*\Z|\.\s))", re.IGNORECASE)
NUMBER = re.compile(r"(?<![\w.,/])[-−+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?(?![\w/]|[.,]\d)")
FRACTION = re.compile(r"\\[dt]?frac\s*\{(-?\d+)\}\s*\{(\d+)\}")
NOISE = re.compile(r"\\[!,;: ]|\\\(|\\\)|\\left|\\right|[$*`]|\\%|%")
MOST_DIGITS = 1000


def final_answer(reply: str) -> str | None:
    """The final answer in canonical form; None if the reply has none."""
    text = without_thoughts(reply)
    for marked in (HASHES.findall(text)[-1:], _boxed(text)[-1:], PHRASE.findall(text)[-1:]):
        if marked and (answer := canonical(marked[0])):
            return answer
    numbers = NUMBER.findall(FRACTION.sub(r"\1/\2", text))
    return canonical(numbers[-1]) if numbers else None


def reference_answer(text: str) -> str:
    """The canonical form of a task's answer, which may be GSM8K's solution with the answer after `####`.

    Raises:
        ValueError: there is no answer.
    """
    answer = canonical((HASHES.findall(text) or [text])[-1])
    if not answer:
        raise ValueError("the answer is blank")
    return answer


def canonical(answer: str) -> str:
    """Equal for equal answers: a number as a fraction in lowest terms, another text in lower case without markup."""
    text = " ".join(NOISE.sub("", FRACTION.sub(r"\1/\2", answer)).split()).strip(" .")
    numbers = NUMBER.findall(text)
    if len(numbers) == 1:  # with a unit, or alone
        number = _number(numbers[0])
        return text.casefold() if number is None else str(number)
    return text.casefold()


def _number(text: str) -> Fraction | None:
    over, slash, under = text.replace(",", "").replace("$", "").replace("−", "-").partition("/")
    if len(over) + len(under) > MOST_DIGITS or (slash and not int(under)):
        return None
    try:
        return Fraction(Decimal(over)) / (int(under) if slash else 1)
    except InvalidOperation:
        return None


def _boxed(text: str) -> list[str]:
    r"""What stands in each \boxed{...}, whose braces may be nested."""
    found = []
    for start in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        depth, at = 1, start.end()
        while at < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        if not depth:
            found.append(text[start.end() : at - 1])
    return found
