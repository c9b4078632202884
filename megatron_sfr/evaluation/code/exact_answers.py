r"""Questions with an exact answer, such as GSM8K's: the final answer of a reply, and whether two answers are equal.

The final answer is what the reply marks: after the last `####`, in the last \boxed{}, after the last "answer is" or
"Answer:"; a number or a letter may stand below such a mark. Without a mark it is the last number. Answers are
compared as numbers (1,200.0 is 1200, 1/2 is 0.5), other answers as text without case.
"""

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from megatron_sfr.evaluation.code.code_blocks import CONTROL
from megatron_sfr.evaluation.generate.thinking import without_thoughts

_ANSWER = r"(?P<gap>(?:[\s*_:`>$]|\\[\[(])*+)(?P<answer>\S[^\n]*?(?<!\s))"
HASHES = re.compile(
    rf"####(?:[ \t*_]*(?:(?:the|final) )*answer\b(?: is\b)?)?{_ANSWER}[ \t]*$", re.IGNORECASE | re.MULTILINE
)
PHRASE = re.compile(
    rf"(?:\banswer(?: is\b|[ *_]*[:=])|^[#*_ \t]*(?:(?:the|final) )*answer[*_ \t]*$){_ANSWER}"
    r"(?=\.?(?:\s*\n|\s*\Z|\.\s))",
    re.IGNORECASE | re.MULTILINE,
)
STEP = re.compile(r"\d+[.)][ \t]+\S")
"""The beginning of a step in a list, not an answer."""
CHOICE = re.compile(r"\(?[A-J]\)?\.?", re.IGNORECASE)
MOST_WORDS = 3
"""Of a number's unit below a mark. A longer line is a sentence of the explanation."""
TRUTH = ("yes", "no", "true", "false")
WORD = re.compile(r"[^\W\d_]{2,}")
NUMBER = re.compile(r"(?<![\w.,/])[-−+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?(?![\w/]|[.,]\d)")
FRACTION = re.compile(r"\\[dt]?frac\s*\{(-?\d+)\}\s*\{(\d+)\}")
NOISE = re.compile(r"\\[!,;: ]|\\\(|\\\)|\\left|\\right|[$*`]|\\%|%")
MOST_DIGITS = 1000


def final_answer(reply: str) -> str | None:
    """The final answer in canonical form; None if the reply has none."""
    text = without_thoughts(reply)
    for answers in (_marked(text, HASHES), _boxed(text), _marked(text, PHRASE)):
        if answers and (answer := canonical(answers[-1])):
            return answer
    numbers = NUMBER.findall(FRACTION.sub(r"\1/\2", text))
    return canonical(numbers[-1]) if numbers else None


def reference_answer(text: str) -> str:
    """The canonical form of a task's answer, which may be GSM8K's solution with the answer after `####`.

    Raises:
        ValueError: there is no answer.
    """
    answer = canonical((_marked(text, HASHES) or [text])[-1])
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


def _marked(text: str, mark: re.Pattern[str]) -> list[str]:
    """What follows each mark, if it is an answer: not the title of a section, nor the beginning of an explanation."""
    found = []
    for match in mark.finditer(text):
        answer, is_step = match["answer"], STEP.match(text, match.start("answer")) is not None
        if "\n" in match["gap"]:
            is_answer = _is_alone(answer) and not is_step
        else:
            is_title = mark is HASHES and (is_step or _may_be_title(answer))
            is_answer = not (is_title and CONTROL.sub("", text[match.end() :]).strip())
        if is_answer:
            found.append(answer)
    return found


def _is_alone(line: str) -> bool:
    """Whether a line holds one number, perhaps with a unit, or the letter of a choice."""
    plain = FRACTION.sub(r"\1/\2", line)
    is_number = len(NUMBER.findall(plain)) == 1 and "=" not in plain and not plain[0].isalpha()
    return CHOICE.fullmatch(line) is not None or (is_number and len(WORD.findall(plain)) <= MOST_WORDS)


def _may_be_title(line: str) -> bool:
    return len(line) > 1 and line[0].isalpha() and "=" not in line and line.strip(" .").casefold() not in TRUTH


def _boxed(text: str) -> list[str]:
    r"""What stands in each \boxed{...}, whose braces may be nested."""
    opened, found = list[tuple[int, bool]](), list[str]()  # where the text in open braces begins; whether it is boxed
    for brace in re.finditer(r"\\(?:boxed|fbox)\s*\{|[{}]", text):
        if brace[0] != "}":
            opened.append((brace.end(), brace[0] != "{"))
        elif opened and opened[-1][1]:
            found.append(text[opened.pop()[0] : brace.start()])
        elif opened:
            opened.pop()
    return found
