"""sacrebleu's tokenizers for BLEU and distinct-n, and the choice among them by the script of the text."""

import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any, Literal, get_args

Tokenizer = Literal["13a", "intl", "zh", "char", "ja-mecab", "ko-mecab"]
Choice = Tokenizer | Literal["auto"]
CHOICES = ("auto", *get_args(Tokenizer))
HAN, KANA = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff", r"\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f"
OTHERS = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u0f00-\u0fff"  # Thai, Lao, Burmese, Khmer, Tibetan
SHARE = 0.1  # share of letters in scripts without spaces from which 13a tokens are too often entire sentences
KANA_SHARE = 0.02  # of letters; Chinese text has hardly any kana, Japanese text has about half


def choose_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """`13a` for text with spaces between words, `zh` for Chinese, `char` for other scripts without spaces."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts["letters"] += sum(map(str.isalpha, text))
        for name, ranges in (("han", HAN), ("kana", KANA), ("others", OTHERS)):
            counts[name] += len(re.findall(f"[{ranges}]", text))
    letters = max(counts["letters"], 1)
    if counts["han"] + counts["kana"] + counts["others"] < SHARE * letters:
        return "13a"
    return "char" if counts["kana"] >= KANA_SHARE * letters or counts["others"] > counts["han"] else "zh"


def resolved(tokenizer: Choice, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer itself; for `auto`, the choice for these texts."""
    return choose_tokenizer(texts) if tokenizer == "auto" else tokenizer


def words(text: str, tokenizer: Tokenizer) -> list[str]:
    """The words of distinct-n: between spaces, or BLEU's tokens where words are not written with spaces."""
    return text.split() if tokenizer in ("13a", "intl") else bleu_metric(1, tokenizer).tokenizer(text.rstrip()).split()


@cache
def bleu_metric(n: int, tokenizer: Tokenizer) -> Any:
    """sacrebleu's sentence BLEU-n: exponential smoothing, effective order for short texts. ValueError without MeCab."""
    from sacrebleu.metrics.bleu import BLEU

    try:
        return BLEU(max_ngram_order=n, effective_order=True, tokenize=tokenizer)
    except RuntimeError as error:
        package = f"sacrebleu[{tokenizer[:2]}]"
        raise ValueError(f"--bleu-tokenize {tokenizer} needs {package}; install it or choose char") from error
