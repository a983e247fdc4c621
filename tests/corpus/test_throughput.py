"""What makes scoring fast: it changes no number beyond rounding, and each part of it does what it is for."""

import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrift import prepare
from headrift.errors import EngineError
from headrift.prepare import SKIP, PrepareConfig, Preparer, StreamPreparer
from headrift.prompts import RenderedPrompt
from headrift.results import Rejected, ScoreResult
from headrift.scheduling import PromptQueue, ResultCache
from headrift.scorer import Prompt, Scorer

# ------------------------------------------------------------------------------------------------------ the queue


def prepared(index: int, prefix: str, key: str = "", ids: Sequence[int] = (1, 2)) -> SimpleNamespace:
    request = SimpleNamespace(prompt_ids=list(ids))
    return SimpleNamespace(index=index, prefix=prefix.encode(), key=key.encode(), request=request)


def order(queue: PromptQueue) -> list[int]:
    return [queue.pop().index for _ in range(len(queue))]


def filled(prefixes: str, **options) -> PromptQueue:
    queue = PromptQueue(**options)
    for index, prefix in enumerate(prefixes):
        queue.add(prepared(index, prefix))
    return queue


def test_prompts_with_one_system_prompt_go_together_the_oldest_first():
    assert order(filled("abcabca")) == [0, 3, 6, 1, 4, 2, 5]
    assert order(filled("abcabca", group=False)) == list(range(7))


def test_a_system_prompt_that_keeps_coming_does_not_keep_others_out():
    queue, taken = filled("ab"), []
    for index in range(2, 50):
        queue.add(prepared(index, "a"))
        taken.append(queue.pop().index)
    assert 1 in taken[:5]


def test_a_prefix_is_primed_once_and_where_another_waits_with_it():
    queue = filled("aabaa")
    primed = []
    while len(queue):
        one = queue.pop()
        primed += [one.index] if queue.to_prime(one) else []
    assert primed == [0]
    never = filled("aa", prime=False)
    assert not never.to_prime(never.pop())


def test_what_is_primed_is_what_all_that_wait_with_a_system_prompt_begin_with():
    queue = PromptQueue()
    prompts = {
        "a": ([7, 8, 9, 1, 1], [7, 8, 9, 1, 2], [7, 8, 9, 3]),
        "b": ([7, 5],),
        "c": ([4, 4, 4], [4, 4, 4], [4, 4]),
    }
    for prefix, some in prompts.items():
        for ids in some:
            queue.add(prepared(len(queue), prefix, ids=ids))
    assert [queue.to_prime(queue.pop()) for _ in range(7)] == [3, 0, 0, 0, 2, 0, 0]


def test_repeats_are_forgotten_when_they_take_too_much():
    def result(n: int) -> SimpleNamespace:
        arrays = dict.fromkeys(("shares", "focus_heads", "logit_stats", "mass", "attention_entropy"))
        return SimpleNamespace(instability=np.zeros(1000), answer_ids=[], n=n, **arrays)

    cache = ResultCache(5 * 9500)
    for n in range(8):
        cache.add(bytes([n]), result(n))
        assert cache.get(b"\0").n == 0  # wanted often, and so kept
    assert [n for n in range(8) if cache.get(bytes([n])) is not None] == [0, 4, 5, 6, 7]
    tiny = ResultCache(10)
    tiny.add(b"x", result(1))
    assert tiny.get(b"x") is None


# ----------------------------------------------------------------------------------------------------- the engine


def prompts(n: int = 90) -> Iterator[dict]:
    """Five system prompts by turns, one of them long; a third are repeats; some cannot be scored."""
    systems = [f"You are assistant {i}. Speak only of topic {i}, and never of the others." for i in range(4)]
    systems.append("Here are the rules. " + " ".join(f"Rule {i} forbids number {i}." for i in range(30)))
    for n_th in range(n):
        number = n_th if n_th % 3 else n_th // 6
        row = {
            "id": f"r{n_th}",
            "prompt": f"Tell me of {number}. {'Please. ' * (number % 11)}",
            "system": systems[n_th % 5],
        }
        yield {"id": row["id"], "prompt": "no system prompt"} if n_th % 31 == 7 else row


FAST, SLOW = {"prepare_workers": 1}, {"group": False, "prime": False, "repeat_bytes": 0}


def test_nothing_that_makes_it_fast_changes_a_number(tiny_model, monkeypatch):
    """Other prompts beside a prompt round its numbers in another way: 1e-5 of scores from 0 to 0.5."""
    monkeypatch.setattr(prepare, "_BEFORE_WORKERS", 10)
    args = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "kv_cache_memory_bytes": 64 << 20}
    runs = {}
    for name, options in {"fast": FAST, "slow": SLOW}.items():
        with Scorer(tiny_model, steps=4, engine_args=args, **options) as scorer:
            results = list(scorer.score(prompts()))
            again = list(scorer.score(prompts()))
            replayed = list(
                scorer.score([{**row, "response": "Yes, number 7 it is."} for row in prompts()], replay=True)
            )
            runs[name] = SimpleNamespace(results=results, replayed=replayed, again=again, n=scorer.engine._submitted)
            assert [r.index for r in results] == list(range(90))
            assert [r.id for r in results] == [row["id"] for row in prompts()]
            assert scorer.seconds_waited > 0
            assert scorer.engine.steps_run > 3 * 5
    scored = 0
    for kind in ("results", "again", "replayed"):
        for one, other in zip(getattr(runs["fast"], kind), getattr(runs["slow"], kind), strict=True):
            assert type(one) is type(other)
            if isinstance(one, Rejected):
                assert one == other
                continue
            assert isinstance(one, ScoreResult)
            assert (one.prompt_tokens, one.system_tokens, one.flags) == (
                other.prompt_tokens,
                other.system_tokens,
                other.flags,
            )
            if one.answer_ids == other.answer_ids:  # where two tokens are all but tied, rounding may choose
                assert one.score == other.score or one.score == pytest.approx(other.score, abs=1e-5)
                np.testing.assert_allclose(one.shares, other.shares, atol=1e-4)
                scored += 1
    assert scored > 3 * 80
    # 90 rows, 3 of them rejected, in 3 passes: without repeats each is a request (and one more where it is read again).
    distinct = len({(row["prompt"], row.get("system")) for row in prompts() if "system" in row})
    assert runs["slow"].n >= 3 * 87
    assert 2 * distinct <= runs["fast"].n < 3 * distinct


def test_a_prompt_as_messages_and_as_token_ids_are_no_repeats(tiny_model):
    """The same tokens, other regions: the result is not the same."""
    args = {"max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20}
    with Scorer(tiny_model, steps=4, engine_args=args, keep_mass=True) as scorer:
        chat = Prompt(prompt="Hello!", system="Be brief, and be kind.")
        rendered = scorer.renderer.render(
            [{"role": "system", "content": chat.system}, {"role": "user", "content": "Hello!"}]
        )
        assert isinstance(rendered, RenderedPrompt)
        other = {**rendered.regions, "system": (0, 3)}
        results = list(scorer.score([chat, Prompt(token_ids=rendered.token_ids, regions=other), chat]))
    assert results[0].system_tokens == results[2].system_tokens != results[1].system_tokens
    assert results[0].score == results[2].score
    assert json.dumps(results[0].answer_ids) == json.dumps(results[1].answer_ids)


# -------------------------------------------------------------------------------------------------------- preparation


CONFIG = PrepareConfig("Be brief.", 4, ("system", "user"), vocabulary=10**6, max_model_len=200, answer_tokens=5)


@pytest.mark.parametrize("replay", [False, True])
def test_workers_prepare_what_this_process_does(tokenizer, replay, monkeypatch):
    """Before they have started, and then instead of it, in order: a stream that ends when they have done some."""
    preparer = Preparer(CONFIG, tokenizer)
    here, given = [], []
    monkeypatch.setattr(preparer, "prepare", lambda *args: here.append(args[0]) or Preparer.prepare(preparer, *args))

    def endless() -> Iterator[dict | None]:
        for row in itertools.cycle([*prompts(), {"prompt": "word " * 300}, None]):
            if len(given) - len(here) >= 500:
                return
            time.sleep(0.002)  # not too many of them before the workers have started
            given.append(row and {**row, "response": f"It is {len(given)}."})
            yield given[-1]

    ahead = StreamPreparer(preparer, 2)
    with closing(ahead):
        results = list(ahead.stream(endless(), lambda row: SKIP if row is None else row, replay))
    assert 256 * 91 // 92 <= len(here) < len(given) - 100
    assert [row for row, _ in results] == given
    expected = [None if row is None else Preparer.prepare(preparer, i, row, replay) for i, row in enumerate(given)]
    assert [prepared for _, prepared in results] == expected
    assert {"prompt_too_long"} == {prepared.reason for prepared in expected if isinstance(prepared, Rejected)}


def test_a_few_huge_prompts_are_in_flight_however_many_fit(tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "_BEFORE_WORKERS", 0)
    monkeypatch.setattr(prepare, "_MOST_BYTES", 100_000)
    preparer, read = Preparer(CONFIG, tokenizer), 0

    def huge() -> Iterator[str]:
        nonlocal read
        while read < 400:
            read += 1
            yield "x" * 10_000

    ahead = StreamPreparer(preparer, 1)
    with closing(ahead):
        ahead._submit(b"", False).result()  # the worker has started
        for n, (_, prepared) in enumerate(ahead.stream(huge(), lambda prompt: prompt, False)):
            assert prepared.reason == "prompt_too_long"
            assert read - n <= 3 * 16


class Unreadable:
    """Arrives nowhere."""

    def __reduce__(self) -> tuple:
        return json.loads, ("{",)


def test_where_no_worker_can_be_had_this_process_prepares(tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "_BEFORE_WORKERS", 0)
    preparer = Preparer(CONFIG, tokenizer)
    ahead = StreamPreparer(preparer, 1, load=Unreadable())
    with closing(ahead):
        stream = ahead.stream(prompts(), lambda row: row, False)
        results = [next(stream)]
        while multiprocessing.active_children():
            time.sleep(0.02)
        results += stream
    assert [prepared for _, prepared in results] == [preparer.prepare(i, row, False) for i, row in enumerate(prompts())]


class Deadly:
    """A prompt that ends the process it arrives in."""

    id = "deadly"

    def __reduce__(self) -> tuple:
        return os._exit, (1,)


def slowly(items: Sequence) -> Iterator:
    """So that a worker that has started is seen to before this process has prepared them all."""
    for item in items:
        time.sleep(0.005)
        yield item


def test_a_prompt_that_kills_workers_is_rejected_and_the_others_are_prepared(tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "_BEFORE_WORKERS", 0)
    monkeypatch.setattr(prepare, "_MOST_IN_A_ROW", 2)
    preparer = Preparer(CONFIG, tokenizer)
    given: list = list(itertools.islice(itertools.cycle(prompts()), 120))
    given[50] = Deadly()
    with closing(StreamPreparer(preparer, 1)) as ahead:
        ahead._submit(b"", False).result()  # the worker has started
        results = [prepared for _, prepared in ahead.stream(slowly(given), lambda row: row, False)]
    assert (results[50].reason, results[50].id, results[50].index) == ("not_rendered", "deadly", 50)
    others = [i for i in range(120) if i != 50]
    assert [results[i] for i in others] == [preparer.prepare(i, given[i], False) for i in others]


def test_workers_that_always_die_end_the_stream(tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "_BEFORE_WORKERS", 0)
    monkeypatch.setattr(prepare, "_MOST_IN_A_ROW", 2)
    with closing(StreamPreparer(Preparer(CONFIG, tokenizer), 1)) as ahead:
        ahead._submit(b"", False).result()
        with pytest.raises(EngineError, match="die again and again"):
            list(ahead.stream(slowly([Deadly()] * 60), lambda row: row, False))


def test_a_prompt_that_cannot_be_rendered_is_rejected_whatever_its_rendering_raises(tokenizer, monkeypatch):
    preparer = Preparer(CONFIG, tokenizer)
    monkeypatch.setattr(preparer, "_render", lambda prompt, replay: {}["missing"])
    rejected = preparer.prepare(3, {"prompt": "Hello", "id": "a"}, False)
    assert (rejected.index, rejected.id, rejected.reason) == (3, "a", "not_rendered")
    assert "KeyError" in rejected.detail


# ------------------------------------------------------------------------------------------------------- tokenising


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model)


TEXT = st.text(st.sampled_from("ab é😀\n<|im_end|>") | st.characters(exclude_categories=["Cs"]), max_size=20)
CONTROL = st.sampled_from(["", "<|im_end|>", "<|im_start|>system\n", "<|endoftext|>", "<|im_", "end|>"])


@given(TEXT, CONTROL, st.lists(st.tuples(CONTROL, TEXT, CONTROL), min_size=2, max_size=3))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_system_prompts_tokens_worked_out_once_are_those_of_the_whole(tokenizer, system, control, users):
    """The second prompt with a system prompt takes its first tokens from the first."""
    from headrift.prompts import ChatRenderer, PromptError, chat_messages

    renderer = ChatRenderer(tokenizer)
    for before, text, after in users:
        try:
            rendered = renderer.render(chat_messages(before + text + after, f"Be {system}{control} kind."))
        except PromptError:
            continue
        encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
        assert rendered.token_ids == encoded["input_ids"]
        fresh = ChatRenderer(tokenizer).render(chat_messages(before + text + after, f"Be {system}{control} kind."))
        assert rendered == fresh
    assert len(renderer._known_heads) <= 1
