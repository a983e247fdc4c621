"""What a prompt becomes before it goes to an engine."""

from dataclasses import replace

import pytest

from headrift.prepare import PrepareConfig, Prepared, Preparer, Prompt, load_tokenizer
from headrift.results import Rejected

CONFIG = PrepareConfig("Be brief.", 4, ("system", "user", "prompt"), 49152, 400, 5)


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return load_tokenizer(str(demo_model), False)


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
def test_the_first_token_is_a_region_if_it_is_recorded_and_nothing_else_changes(tokenizer, prompt, bos):
    without = Preparer(CONFIG, tokenizer).prepare(3, prompt, False)
    with_bos = Preparer(replace(CONFIG, regions=(*CONFIG.regions, "bos")), tokenizer).prepare(3, prompt, False)
    assert isinstance(without, Prepared)
    assert isinstance(with_bos, Prepared)
    assert with_bos.request.regions == {**without.request.regions, "bos": bos}
    assert (with_bos.flags, with_bos.prefix) == (without.flags, without.prefix)
    assert replace(with_bos.request, regions=without.request.regions) == without.request


def test_regions_of_other_names_are_still_unknown(tokenizer):
    given = Prompt(token_ids=[5, 6], regions={"system": (0, 1), "page": (1, 2)})
    rejected = Preparer(CONFIG, tokenizer).prepare(0, given, False)
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "unknown_region"


def test_replay_takes_a_logged_answer_but_for_step_0(tokenizer):
    rejected = Preparer(CONFIG, tokenizer).prepare(0, "Ask", True)
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "no_response"
    step_0 = Preparer(replace(CONFIG, steps=0, answer_tokens=1), tokenizer)
    alone, logged = (step_0.prepare(0, prompt, True) for prompt in ("Ask", Prompt(prompt="Ask", response="Yes.")))
    assert alone.request.answer_ids == []
    assert alone.request.prompt_ids == logged.request.prompt_ids
    assert len(logged.request.answer_ids) > 1
