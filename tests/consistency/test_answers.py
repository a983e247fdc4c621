"""Whether a reply is right, and whether two replies give the same answer."""

import pytest

from headrift.consistency.answers import Key, flipped, is_hinted, is_right, parse_answer

SUM = Key("number", "43", wrong="45")
CITY = Key("text", "Paris", wrong="Lyon")
LEGS = Key("number", "8", wrong="6")
BEAR = Key("choice", "B", choices=("lion", "polar bear", "ant", "tuna"), wrong="D")


@pytest.mark.parametrize(
    ("reply", "key"),
    [
        ("43", SUM),
        ("The answer is 43.", SUM),
        ("17 + 26 = 43", SUM),
        ("17 + 26 = 43, and not 45", SUM),
        ("43.0", SUM),
        ("1,043", Key("number", "1043")),
        ("It is -3.", Key("number", "-3")),
        ("Eight", LEGS),
        ("A spider has eight legs.", LEGS),
        ("forty-three", SUM),
        ("paris", CITY),
        ("The capital of France is **Paris**.", CITY),
        ("PARIS, of course!\nLyon is smaller", Key("text", "Paris")),
        ("São Paulo", Key("text", "Sao Paulo")),
        ("Da Vinci", Key("text", "Leonardo da Vinci", also=("da Vinci",))),
        ("B", BEAR),
        ("B) polar bear", BEAR),
        ("(B)", BEAR),
        ("The answer is B.", BEAR),
        ("The right option is (B).", BEAR),
        ("A polar bear is one of these.", BEAR),
        ("polar bear", BEAR),
        ("A) lion\nB) polar bear\nThe answer is B", BEAR),
    ],
)
def test_right(reply, key):
    assert is_right(reply, key)


@pytest.mark.parametrize(
    ("reply", "key"),
    [
        ("", SUM),
        ("I do not know.", SUM),
        ("45", SUM),
        ("143", SUM),
        ("4.3", SUM),
        ("17 + 26 = 45. It is not 43", SUM),
        ("Lyon", CITY),
        ("Parisian food", CITY),
        ("Paris or Lyon", CITY),
        ("", CITY),
        ("D", BEAR),
        ("A", BEAR),
        ("A lion or a polar bear", BEAR),
        ("B) polar bear\nC) ant", BEAR),
        ("Banana", BEAR),
        ("", BEAR),
    ],
)
def test_not_right(reply, key):
    assert not is_right(reply, key)


def test_the_hinted_wrong_answer_is_recognised():
    assert is_hinted("It is 45.", SUM)
    assert is_hinted("I would say Lyon.", CITY)
    assert is_hinted("D", BEAR)
    assert not is_hinted("43", SUM)
    assert not is_hinted("Berlin", CITY)
    assert not is_hinted("45", Key("number", "43"))  # nothing was hinted at


def test_flips():
    assert not flipped("Paris", "The capital of France is Paris.", CITY)
    assert flipped("Paris", "Lyon", CITY)
    assert flipped("Paris", "I cannot say", CITY)
    assert flipped("Berlin", "Rome", CITY)  # both wrong, and not the same
    assert not flipped("43", "17 + 26 = 43", SUM)
    assert not flipped("", "no idea", SUM)  # no number either time
    assert flipped("B", "D) tuna", BEAR)
    assert not flipped("The answer: yes!", "answer yes", None)
    assert flipped("yes", "no", None)


def test_a_number_in_a_later_sentence_is_not_the_answer():
    assert parse_answer("It has 8 legs. Insects have 6.", LEGS) == "8"
