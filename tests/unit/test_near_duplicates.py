"""Near duplicates: what is made from one template is a group, and what is not stays alone."""

import json
from pathlib import Path

import numpy as np
import pytest

from headrift.near_duplicates import NUMBERS, minhash, near_groups

DATASETS = Path(__file__).resolve().parents[2] / "datasets"
WORDS = [f"word{n}" for n in range(3_000)]


def texts_of_templates(templates: int, each: int, *, fixed: int = 24, free: int = 6) -> tuple[list[str], np.ndarray]:
    """Texts with the words of a template and some of their own, in any order of templates."""
    random = np.random.default_rng(0)
    beginnings = [" ".join(random.choice(WORDS, fixed)) for _ in range(templates)]
    template = random.permutation(np.repeat(np.arange(templates), each))
    return [f"{beginnings[n]} {' '.join(random.choice(WORDS, free))}" for n in template], template


def groups_of(texts: list[str]) -> np.ndarray:
    return near_groups([minhash(text) for text in texts])


def test_texts_of_a_template_are_a_group_and_others_are_not():
    texts, template = texts_of_templates(30, 10)
    random = np.random.default_rng(1)
    alone = [" ".join(random.choice(WORDS, 30)) for _ in range(300)]
    group = groups_of(texts + alone)
    assert len(np.unique(group)) == 30 + 300
    for number in range(30):
        assert len(np.unique(group[: len(texts)][template == number])) == 1


def test_a_minhash_tells_about_how_much_two_texts_share():
    random = np.random.default_rng(2)
    for fixed, free in ((40, 0), (36, 4), (20, 20), (0, 40)):
        beginning = list(random.choice(WORDS, fixed))
        one, other = ([*beginning, *random.choice(WORDS, free)] for _ in range(2))
        runs = [{tuple(words[n : n + 3]) for n in range(len(words) - 2)} for words in (one, other)]
        jaccard = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
        sketches = [minhash(" ".join(words)) for words in (one, other)]
        assert sketches[0].shape == (NUMBERS,)
        # Four standard errors of a mean of 64.
        assert (sketches[0] == sketches[1]).mean() == pytest.approx(jaccard, abs=4 * 0.5 / np.sqrt(NUMBERS))


def test_texts_of_few_words_and_none_are_compared_too():
    group = groups_of(["", "", "hello", "hello", "hello there", "bye"])
    assert group.tolist() == [0, 0, 1, 1, 2, 3]
    assert len(near_groups(np.zeros((0, NUMBERS), np.uint16))) == 0


def test_the_projects_own_prompts_are_no_near_duplicates():
    texts = []
    for path in sorted(DATASETS.glob("*word.jsonl")):
        texts += [json.loads(line)["prompt"].casefold() for line in path.read_text().splitlines()]
    assert len(np.unique(groups_of(texts))) == len(texts) > 300
