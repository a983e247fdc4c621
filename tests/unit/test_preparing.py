"""What a prompt becomes before it goes to an engine."""

from dataclasses import replace

import pytest

from headrift.preparing import Prepared, Preparer, Prompt, Rules, load_tokenizer
from headrift.results import Rejected


@pytest.fixture(scope="module")
def rules(demo_model) -> Rules:
    names = ("system", "user", "prompt")
    return Rules(str(demo_model), False, "Be brief.", 4, names, 49152, 400, 5)


@pytest.fixture(scope="module")
def tokenizer(rules):
    return load_tokenizer(rules.tokenizer, False)


TOOL = [
    {"role": "user", "content": "Look."},
    {"role": "assistant", "content": "I will."},
    {"role": "tool", "content": "It rains."},
]


@pytest.mark.parametrize(
    ("prompt", "bos"),
    [
        (Prompt(prompt="Ask"), (0, 1)),
        (Prompt(messages=TOOL), (0, 1)),
        (Prompt(token_ids=[5, 6, 7, 8], regions={"system": (0, 2)}), (0, 1)),
        (Prompt(token_ids=[5, 6, 7, 8], regions={"system": (0, 2), "bos": (1, 2)}), (1, 2)),
    ],
)
def test_the_first_token_is_a_region_where_it_is_recorded_and_nothing_else_changes(rules, tokenizer, prompt, bos):
    without = Preparer(rules, tokenizer).prepare(3, prompt, False)
    with_bos = Preparer(replace(rules, regions=(*rules.regions, "bos")), tokenizer).prepare(3, prompt, False)
    assert isinstance(without, Prepared)
    assert isinstance(with_bos, Prepared)
    assert with_bos.rendered.regions == without.rendered.regions | {"bos": bos}
    assert with_bos.request.regions == with_bos.rendered.regions
    same = replace(with_bos.rendered, regions=without.rendered.regions)
    assert (same, with_bos.prefix) == (without.rendered, without.prefix)
    assert replace(with_bos.request, regions=without.request.regions) == without.request


def test_regions_of_other_names_are_still_unknown(rules, tokenizer):
    given = Prompt(token_ids=[5, 6], regions={"system": (0, 1), "page": (1, 2)})
    found = Preparer(rules, tokenizer).prepare(0, given, False)
    assert isinstance(found, Rejected)
    assert found.reason == "unknown_region"
