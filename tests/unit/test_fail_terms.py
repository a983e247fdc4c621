"""Fail terms: whole words by default, whatever their case and form; regular expressions where asked for."""

import pytest

from headrift.fail_terms import FailTerms


@pytest.mark.parametrize(
    ("term", "text", "expected"),
    [
        ("lantern", "A Lantern, then.", True),
        ("lantern", "Two lanterns.", False),
        ("lantern", "lan\ntern", False),
        ("lantern", "magic-lantern!", True),
        ("lantern", "lantern_1", False),
        ("red lamp", "the red \n lamp", True),
        ("red lamp", "the red lamps", False),
        ("C++", "written in C++.", True),
        ("C++", "written in C++20", False),
        ("café", "cafe\u0301 noir", True),  # decomposed
        ("lantern", "\uff4c\uff41\uff4e\uff54\uff45\uff52\uff4e", True),  # full width
        ("Straße", "STRASSE", False),
        ("re:[0-9]", "room 7", True),
        ("re:lantern", "Lantern", False),
        ("re:(?i)lantern", "Two LANTERNS", True),
        ("re:^no", "yes\nno", True),
        ("a.c", "abc", False),
        ("日", "毎日", False),
    ],
)
def test_whether_a_term_is_in_a_text(term: str, text: str, expected: bool) -> None:
    assert FailTerms([term]).in_text(text) is expected


def test_any_of_several() -> None:
    terms = FailTerms(["lamp", "lantern"])
    assert terms.in_text("a lantern")
    assert terms.in_text("a lamp")
    assert not terms.in_text("a candle")
    assert not FailTerms([]).in_text("anything")


@pytest.mark.parametrize("term", ["", "  ", "re:"])
def test_an_empty_term_is_refused(term: str) -> None:
    with pytest.raises(ValueError, match="is empty"):
        FailTerms([term])


def test_a_bad_expression_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"re:\(lamp.*not a regular expression"):
        FailTerms(["re:(lamp"])
