"""Renderings of a question, the tokens they have in common, and neutral text of exactly so many tokens."""

from __future__ import annotations

import pytest

from headrift.internals.cases import (
    CHECK,
    Case,
    NeutralText,
    Renderer,
    SystemPrompt,
    align,
    make_cases,
    read_questions,
    read_system_prompts,
    split_sentences,
)
from headrift.internals.sentences import DroppedSentence, drop_sentences, sentence_spans, without
from headrift.prompts import PromptError

SYSTEM = "You are a pirate. Never say 'ship'. You are a pirate who likes tea."
QUESTION = "What is a lighthouse for?"
# As SmolLM2's, but with no system prompt of its own.
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Takes no system message at all.
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


@pytest.fixture
def renderer_of(tokenizer):
    from copy import deepcopy

    def make(template: str | None) -> Renderer:
        own = deepcopy(tokenizer)
        if template is not None:
            own.chat_template = template
        return Renderer(own)

    return make


def text_of(tokenizer, rendered, span=None) -> str:
    return tokenizer.decode(rendered.token_ids[slice(*span)] if span else rendered.token_ids)


def test_a_templates_own_system_prompt_is_not_the_baseline(tokenizer, renderer_of):
    renderer = renderer_of(None)
    assert renderer.default is not None
    assert renderer.default.startswith("You are a helpful AI assistant named SmolLM")
    alone = renderer.alone(QUESTION)
    assert text_of(tokenizer, alone) == (
        f"<|im_start|>system\n<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text_of(tokenizer, alone, alone.question).strip() == QUESTION


@pytest.mark.parametrize("template", [PLAIN, NO_SYSTEM])
def test_without_a_default_the_baseline_is_the_question_alone(tokenizer, renderer_of, template):
    renderer = renderer_of(template)
    assert renderer.default is None
    assert text_of(tokenizer, renderer.alone(QUESTION)) == (
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("template", [None, PLAIN, NO_SYSTEM])
def test_questions_are_lined_up_by_token_id(tokenizer, renderer_of, template):
    renderer = renderer_of(template)
    base = renderer.alone(QUESTION)
    ways = (renderer.with_system, renderer.in_user_turn, lambda q, system: renderer.in_user_turn(q, after=system))
    for way in ways:
        other = way(QUESTION, SYSTEM)
        alignment = align(base, other)
        shared = base.token_ids[alignment.base : alignment.base + alignment.length]
        assert shared == other.token_ids[alignment.other : alignment.other + alignment.length]
        # At most the first token comes out otherwise, where something else stands before it.
        assert alignment.length >= base.question[1] - base.question[0] - 1
        assert SYSTEM in text_of(tokenizer, other)


def test_a_question_that_is_quoted_in_the_system_prompt_is_found_in_the_users_turn(renderer_of):
    renderer = renderer_of(None)
    system = f"If somebody asks '{QUESTION}', say that you are {QUESTION}"
    rendered = renderer.with_system(QUESTION, system)
    assert rendered.system is not None
    alignment = align(renderer.alone(QUESTION), rendered)
    assert alignment.other >= rendered.system[1]


def test_neutral_text_has_exactly_as_many_tokens(tokenizer, renderer_of):
    renderer, neutral = renderer_of(None), NeutralText(tokenizer)
    rendered = renderer.with_system(QUESTION, SYSTEM)
    assert rendered.system is not None
    n = rendered.system[1] - rendered.system[0]
    other = rendered.with_tokens(rendered.system, neutral.excerpt(n, 5))
    assert len(other.token_ids) == len(rendered.token_ids)
    assert other.token_ids[: rendered.system[0]] == rendered.token_ids[: rendered.system[0]]
    assert other.token_ids[rendered.system[1] :] == rendered.token_ids[rendered.system[1] :]
    assert not set(text_of(tokenizer, other, other.system).split()) & {"pirate", "pirate."}


def test_excerpts_start_at_sentences_and_go_round(tokenizer):
    neutral = NeutralText(tokenizer)
    for n in (1, 7, 400, 3000):
        for start in (0, 3, neutral.starts + 3):
            assert len(neutral.excerpt(n, start)) == n
    assert neutral.excerpt(30, 3) == neutral.excerpt(30, neutral.starts + 3)
    assert len({tuple(neutral.excerpt(20, i)) for i in range(neutral.starts)}) == neutral.starts
    assert tokenizer.decode(neutral.excerpt(12, 0)).startswith("Tea is made")
    assert tokenizer.decode(neutral.excerpt(12, 0, inner=True)).startswith(" Tea is made")


def test_sentences_are_cut_and_dropped_whole():
    text = "One thing. Another thing!\nA third? Yes."
    parts = sentence_spans(text)
    assert (
        [text[a:b] for a, b in parts] == split_sentences(text) == ["One thing.", "Another thing!", "A third?", "Yes."]
    )
    assert [without(text, part) for part in parts] == [
        "Another thing!\nA third? Yes.",
        "One thing. A third? Yes.",
        "One thing. Another thing! Yes.",
        "One thing. Another thing!\nA third?",
    ]


def test_a_drop_replaces_the_sentences_own_tokens(tokenizer, renderer_of, tmp_path):
    """Two sentences that begin alike: what is replaced is the one that is meant, whatever the tokens around it."""
    renderer, neutral = renderer_of(None), NeutralText(tokenizer)
    file = tmp_path / "q.txt"
    file.write_text(f"{QUESTION}\n")
    questions, _ = read_questions((str(file),), renderer)
    drops = list(drop_sentences(questions, SystemPrompt("pirate", SYSTEM), renderer, neutral))
    assert len(drops) == 3
    for drop, left in zip(
        drops, ("Never say 'ship'. You are a pirate who", "You are a pirate. You are", "'ship'.<|im_end|>")
    ):
        assert isinstance(drop, DroppedSentence)
        assert left in tokenizer.decode(drop.dropped.token_ids)
        assert drop.text not in tokenizer.decode(drop.neutral.token_ids)
        assert len(drop.neutral.token_ids) == len(drop.whole.token_ids)
        others = [other for other in split_sentences(SYSTEM) if other != drop.text]
        assert all(other in tokenizer.decode(drop.neutral.token_ids) for other in others)


def test_prompts_that_cannot_be_used_are_rejected_with_their_reason(renderer_of, tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = ['{"id": "a", "prompt": "Hello there"}', "{broken", '{"id": "a", "prompt": "again"}', '{"prompt": "  "}']
    rows += ['{"messages": [{"role": "user", "content": "hi"}]}', '{"id": "b", "prompt": "Good morning"}']
    file.write_text("\n".join(rows) + "\n")
    questions, rejected = read_questions((str(file),), renderer_of(None))
    assert [question.id for question in questions] == ["a", "b"]
    assert [reject.reason for reject in rejected] == ["bad_json", "duplicate_id", "no_user_message", "no_prompt"]
    assert [reject.row for reject in rejected] == [2, 3, 4, 5]


def test_a_long_prompt_is_rejected_under_a_long_system_prompt_only(tokenizer, tmp_path):
    file = tmp_path / "q.txt"
    file.write_text(f"{QUESTION}\n")
    renderer, neutral = Renderer(tokenizer, 60), NeutralText(tokenizer)
    questions, rejected = read_questions((str(file),), renderer)
    assert not rejected
    (short,) = make_cases(questions, SystemPrompt("short", "Be kind."), 0, renderer, neutral)
    (long,) = make_cases(questions, SystemPrompt("long", "Be kind. " * 40), 1, renderer, neutral)
    assert isinstance(short, Case)
    assert (long.reason, long.system) == ("prompt_too_long", "long")


def test_the_checks_two_neutral_texts_differ(tokenizer, tmp_path):
    file = tmp_path / "q.txt"
    file.write_text("\n".join(f"{QUESTION} {i}" for i in range(40)) + "\n")
    renderer, neutral = Renderer(tokenizer), NeutralText(tokenizer)
    questions, _ = read_questions((str(file),), renderer)
    for case in make_cases(questions, None, 16, renderer, neutral):
        assert isinstance(case, Case), CHECK
        assert case.system.token_ids != case.neutral.token_ids
        assert len(case.system.token_ids) == len(case.neutral.token_ids)


def test_the_projects_own_system_prompts_and_questions():
    import json
    from collections import Counter
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    from headrift.internals.sentences import find_features, read_rules

    systems, rules = read_system_prompts(root / "system_prompts/internals"), read_rules()
    assert len(systems) >= 16
    for feature in rules:
        assert sum(feature in find_features(system.text, rules) for system in systems) >= 3, feature
    rows = [json.loads(line) for line in (root / "datasets/internals_prompts.jsonl").read_text().splitlines()]
    assert Counter(row["category"] for row in rows) == dict.fromkeys(
        ("fact", "explanation", "writing", "reasoning", "advice"), 8
    )
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == 40


def test_an_empty_prompt_is_refused(renderer_of):
    with pytest.raises(PromptError, match="nothing to answer"):
        renderer_of(None).alone("  ")
