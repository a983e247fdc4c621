"""Which keys of two requests are lined up, and what is refused."""

import numpy as np
import pytest

from headrift.vllm_plugin.instruments.attention_rows import check_runs, partner_positions


def test_prompt_tokens_by_runs_and_answers_by_their_place():
    # The other prompt has 8 tokens, this one 9; tokens 2 to 4 here are words around the rest.
    runs = [(0, 0, 2), (3, 5, 3), (7, 8, 1)]
    partners = partner_positions(runs, other_len=8, own_len=9, steps=3)
    assert partners.tolist() == [0, 1, -1, -1, -1, 3, 4, 5, 7, 8, 9, 10]


def test_nothing_in_common_but_the_answer():
    assert partner_positions([], other_len=4, own_len=2, steps=1).tolist() == [-1, -1, 4]


def test_the_same_prompt():
    np.testing.assert_array_equal(partner_positions([(0, 0, 6)], 6, 6, 2), np.arange(8))


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([(0, 0, 5)], "end at 5 and 5, and the prompts have 4 and 6"),
        ([(0, 0, 2), (1, 2, 1)], "in order and apart"),
        ([(0, 0, 2), (2, 1, 1)], "in order and apart"),
        ([(-1, 0, 2)], "in order and apart"),
        ([(0, 0, -1)], "in order and apart"),
        ([(0, 0)], "length"),
        ([(0, 0, 1.5)], "length"),
        ([7], "length"),
    ],
)
def test_runs_that_are_none(runs, message):
    with pytest.raises(ValueError, match=message):
        check_runs(runs, other_len=4, own_len=6)


def test_runs_that_fit():
    check_runs([], 0, 0)
    check_runs([(0, 1, 2), (2, 3, 0), (2, 3, 2)], 4, 6)
