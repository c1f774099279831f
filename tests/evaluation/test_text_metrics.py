"""Scores of texts on known answers."""

from decimal import Decimal

import pytest

from fedforward.evaluation.text_metrics import exact_match, final_number, rouge_l, token_f1


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The Cat!", "cat", 1.0),
        ("cats", "cat", 0.0),
        ("", "", 1.0),
        ("an", "the", 1.0),
        ("6 + 12 = 18\n#### 18", "so\n#### 18", 1.0),
        ("it is 18.0 in all", "#### 18", 1.0),
        ("#### 1,018", "#### 1018", 1.0),
        ("#### 18 and then 20", "#### 18", 1.0),
        ("18 and then 20", "#### 18", 0.0),
        ("nothing", "#### 18", 0.0),
        ("#### none", "#### None", 1.0),
    ],
)
def test_exact_match(prediction: str, reference: str, expected: float) -> None:
    assert exact_match(prediction, reference) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### -7.50", Decimal("-7.5")),
        ("from 10-5", Decimal(5)),
        ("$1,234,567.", Decimal(1234567)),
        ("first #### 3, then #### 4", Decimal(4)),
        ("4 ####", None),
        ("a .5 share", Decimal("0.5")),
        ("", None),
    ],
)
def test_final_number(text: str, number: Decimal | None) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Denver Broncos", "the Denver Broncos!", 1.0),
        ("Broncos of Denver", "Denver Broncos", 0.8),
        ("Santa Clara Santa", "Santa", 0.5),
        ("Denver", "Carolina", 0.0),
        ("", "Denver", 0.0),
        ("the", "a", 1.0),
    ],
)
def test_token_f1(prediction: str, reference: str, expected: float) -> None:
    assert token_f1(prediction, reference) == pytest.approx(expected)


# The first six as `rouge-score` 0.1.2 has them (rougeL, without stemming).
@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the cat sat on the mat", "the cat is on the mat", 5 / 6),
        ("police killed the gunman", "police kill the gunman", 0.75),
        ("the gunman kill police", "police kill the gunman", 0.5),
        ("It's a well-known fact, isn't it?", "it is a well known fact", 2 / 3),
        ("a b c d e", "e d c b a", 0.2),
        ("", "", 0.0),
        ("größer als", "Größer", 2 / 3),
    ],
)
def test_rouge_l(prediction: str, reference: str, expected: float) -> None:
    assert rouge_l(prediction, reference) == pytest.approx(expected)
    assert rouge_l(reference, prediction) == pytest.approx(expected)
