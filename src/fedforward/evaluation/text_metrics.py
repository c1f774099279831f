"""How well a text answers: exact match, token F1, ROUGE-L. Pure functions of strings.

A score compares one prediction with one reference and lies between 0 and 1. Nothing here imports
PyTorch.
"""

import re
import string
from collections import Counter
from decimal import Decimal

_ARTICLES = re.compile(r"\b(a|an|the)\b")
#: "10-5" ends in 5: a sign stands at the beginning of a word.
_NUMBER = re.compile(r"(?:(?<![\w.])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
#: What GSM8K writes before the number that a solution ends in.
FINAL = "####"

#: Metrics between 0 and 1, of texts or classes.
SHARES = frozenset({"accuracy", "exact-match", "f1", "rougeL"})
#: Objectives that are losses in nats: lower is better, and the values are continuous.
LOSSES = frozenset({"loss", "choice"})


def exact_match(prediction: str, reference: str) -> float:
    """1.0 or 0.0: equal normalised texts, or equal final numbers.

    Where the reference ends in `#### NUMBER`, as in GSM8K (Cobbe et al., 2021), only the final
    numbers are compared; else the texts as SQuAD normalises them.
    """
    if FINAL in reference:
        wanted = final_number(reference)
        if wanted is not None:
            return float(final_number(prediction) == wanted)
    return float(_normalised(prediction) == _normalised(reference))


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the words that two texts share, as SQuAD counts it (Rajpurkar et al., 2016).

    Case, punctuation and the articles a, an, the do not count. A text without words agrees with
    another such text only.
    """
    found, wanted = _normalised(prediction).split(), _normalised(reference).split()
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return _f_measure(common, len(found), len(wanted))


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F-measure: the longest common subsequence of words (Lin, 2004).

    Words are runs of letters and digits in lower case, without stemming. On ASCII text it agrees
    with Google's `rouge-score`; letters of other scripts count as well here.
    """
    found, wanted = _words(prediction), _words(reference)
    if not found or not wanted:
        return 0.0
    return _f_measure(_longest_common_subsequence(found, wanted), len(found), len(wanted))


def final_number(text: str) -> Decimal | None:
    """The first number after the last `####`, or else the last number of a text; None without one.

    Thousands may be separated by commas: "1,000" is 1000.
    """
    _, mark, after = text.rpartition(FINAL)
    numbers: list[str] = _NUMBER.findall(after)
    if not numbers:
        return None
    return Decimal((numbers[0] if mark else numbers[-1]).replace(",", ""))


def _normalised(text: str) -> str:
    """SQuAD's normal form: lower case, without punctuation and articles, single spaces."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _f_measure(common: int, found: int, wanted: int) -> float:
    """The harmonic mean of common / found and common / wanted."""
    return 2 * common / (found + wanted)


def _longest_common_subsequence(one: list[str], other: list[str]) -> int:
    """Its length, row by row of the usual table."""
    above = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for place, candidate in enumerate(other):
            same = word == candidate
            row.append(above[place] + 1 if same else max(above[place + 1], row[-1]))
        above = row
    return above[-1]
