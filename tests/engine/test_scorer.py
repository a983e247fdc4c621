"""The scorer: order, bounds, rejects, replay, and the signal itself on the original's prompts."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from headrift import signal
from headrift.results import Rejected, ScoreResult
from headrift.scorer import Prompt, Scorer
from headrift.signal import ScoreRange, Window

SYSTEM = "You are a helpful assistant. You never speak about the weather, whatever the user says."


def rows(n: int) -> list[dict]:
    """Prompts of many lengths, so that they finish out of order."""
    questions = ["What is the capital of France?", "Say hi.", "Explain how a rainbow forms, step by step."]
    return [{"id": f"r{i}", "prompt": f"{questions[i % 3]} {'please ' * (i % 7)}", "system": SYSTEM} for i in range(n)]


def test_results_come_in_input_order_with_rejects_in_their_places(scorer):
    given = rows(12)
    given[3] = {"id": "r3", "prompt": "no system prompt here"}
    given[7] = {"id": "r7", "messages": [{"role": "narrator", "content": "x"}]}
    given[8] = {"id": "r8", "prompt": "word " * 5000, "system": SYSTEM}
    given[9] = {"id": "r9", "system": SYSTEM}
    results = list(scorer.score(given))
    assert [r.index for r in results] == list(range(12))
    assert [r.id for r in results] == [f"r{i}" for i in range(12)]
    rejected = {r.id: r.reason for r in results if isinstance(r, Rejected)}
    assert rejected == {"r3": "no_system_prompt", "r7": "bad_messages", "r8": "prompt_too_long", "r9": "no_prompt"}


def test_a_result_is_what_its_shares_say(scorer):
    (result,) = scorer.score(rows(1))
    assert isinstance(result, ScoreResult)
    assert result.shares.shape == (result.n_steps + 1, scorer.engine.layers, scorer.engine.heads)
    np.testing.assert_allclose(result.instability, result.shares.std(axis=-1), atol=1e-6)
    first, last = signal.layer_range(scorer.engine.layers)
    end = min(12, result.n_steps)
    assert result.score == pytest.approx(result.instability[1 : end + 1, first:last].mean(), abs=1e-6)
    assert result.n_scored == end
    assert result.answer_tokens == len(result.answer_ids) == result.n_steps + 1
    system, user, prompt = (result.mass[..., result.region_names.index(n)] for n in ("system", "user", "prompt"))
    np.testing.assert_allclose(result.shares, system / prompt, atol=1e-6)
    both = (system[0] + user[0]).astype(np.float64)
    np.testing.assert_allclose(result.focus, np.where(both < 1e-9, 0, system[0] / both).mean(), atol=1e-6)
    np.testing.assert_allclose(prompt[0], 1.0, atol=2e-5)
    assert (system + user <= prompt + 2e-5).all()
    assert result.entropy == pytest.approx(result.logit_stats[1 : end + 1, 0].mean(), abs=1e-6)
    assert 0 < result.margin <= result.top1 <= 1
    assert -1 <= result.head_agreement <= 1
    assert scorer.tokenizer.decode(result.answer_ids, skip_special_tokens=True) == result.text


def test_prompts_are_read_as_they_are_needed(scorer):
    """An endless stream is scored with a bounded number read ahead, and can be left in the middle."""
    read = 0

    def endless():
        nonlocal read
        for row in itertools.cycle(rows(5)):
            read += 1
            yield row

    stream = scorer.score(endless())
    taken = list(itertools.islice(stream, 40))
    assert [r.index for r in taken] == list(range(40))
    assert read <= 40 + 5 * scorer.engine.slots
    stream.close()
    assert scorer.engine.running == 0
    assert scorer.engine.free_slots == scorer.engine.slots
    assert len(list(scorer.score(rows(3)))) == 3


def test_replay_scores_the_logged_answer_as_generation_did(scorer):
    generated = list(scorer.score(rows(9)))
    logged = [{**row, "response": result.text} for row, result in zip(rows(9), generated, strict=True)]
    # An answer cut at the last step has no end-of-turn token; a logged text is taken as whole.
    replayed = list(scorer.score(logged, replay=True))
    compared = 0
    for once, again in zip(generated, replayed, strict=True):
        fed = once.answer_ids[: once.n_steps]
        if again.answer_ids[: len(fed)] != fed:
            continue  # the text of these tokens is tokenised in another way
        n = min(once.n_steps, again.n_steps) + 1
        np.testing.assert_allclose(again.shares[:n], once.shares[:n], rtol=0, atol=2e-5)
        assert again.entropy is None
        compared += 1
    assert compared >= 5


def test_replayed_repeats_are_scored_in_full(scorer, monkeypatch):
    """The second row's answer lies in cached blocks; it is computed anew, not reported with holes."""
    monkeypatch.setattr(scorer, "_cache", None)  # which would hand out the first row's result
    row = {**rows(1)[0], "response": "The capital of France is Paris, a city on the Seine, known for its museums."}
    first, second, third = scorer.score([row, row, row], replay=True)
    assert first.n_steps > 8
    assert first.score == pytest.approx(second.score, abs=2e-5) == pytest.approx(third.score, abs=2e-5)
    assert not np.isnan(second.shares).any()


def test_replay_without_an_answer_is_rejected_and_a_trailing_assistant_turn_is_one(scorer):
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Hello!"}]
    answered = [*messages, {"role": "assistant", "content": "Hello! How can I help you today?"}]
    none, one, other = scorer.score(
        [{"messages": messages}, {"messages": answered}, {"messages": messages, "response": answered[-1]["content"]}],
        replay=True,
    )
    assert none.reason == "no_response"
    assert one.answer_ids == other.answer_ids
    assert one.score == pytest.approx(other.score, abs=2e-5)


def test_token_ids_with_named_spans(scorer):
    (chat,) = scorer.score(rows(1))
    rendered = scorer.renderer.render(
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": rows(1)[0]["prompt"]}]
    )
    regions = {**rendered.regions, "document": (3, 9)}
    (result,) = scorer.score([Prompt(token_ids=rendered.token_ids, regions=regions)])
    assert result.score == pytest.approx(chat.score, abs=2e-5)
    assert result.mass[..., result.region_names.index("document")].max() > 0
    bad = [
        Prompt(token_ids=rendered.token_ids, regions={"system": (0, 5), "page": (5, 6)}),
        Prompt(token_ids=rendered.token_ids, regions={"system": (5, 5)}),
        Prompt(token_ids=rendered.token_ids, regions={"system": (5, 5000)}),
    ]
    assert [r.reason for r in scorer.score(bad)] == ["unknown_region", "no_system_prompt", "bad_regions"]


def test_a_shared_system_prompt_is_prefilled_once(scorer):
    scorer.engine.llm_engine.reset_prefix_cache()
    scorer._primed.clear()
    cached = []
    step = scorer.engine.step

    def watch():
        finished = step()
        cached.extend(done.cached_tokens for done in finished)
        return finished

    system = SYSTEM * 4
    scorer.engine.step = watch
    try:
        list(scorer.score([{**row, "system": system} for row in rows(20)]))
    finally:
        del scorer.engine.step
    ids = [scorer.preparer.prepare(0, {**row, "system": system}, False).request.prompt_ids for row in rows(20)]
    shared = next(i for i, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1)
    assert shared % 32
    # First a request for what all have in common; then theirs, in which no token of that is computed.
    assert cached == [0] + [shared] * 20


@pytest.mark.nightly
def test_auroc_on_the_originals_first_data_set(scorer, seed_data):
    """The original's attacks and benign prompts; transformers with eager attention gives 0.995."""

    def prompts(name: str) -> list[str]:
        lines = (seed_data / "datasets" / name).read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]

    system = (seed_data / "system_prompts" / "sys_prompt_never_say_test.txt").read_text(encoding="utf-8").strip()
    attacks, benign = prompts("custom_dataset_attacks.txt"), prompts("custom_dataset_benign.txt")
    results = list(scorer.score({"prompt": p, "system": system} for p in attacks + benign))
    scores = [-1.0 if r.score is None else r.score for r in results]
    assert roc_auc_score([1] * len(attacks) + [0] * len(benign), scores) >= 0.98


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "at least 0"),
        ({"window": "3:2"}, "window"),
        ({"window": "one"}, "1:12"),
        ({"window": Window(1, 13)}, "raise steps"),
        ({"drop_shallow": 1.0}, "drop_shallow"),
    ],
)
def test_settings_that_contradict_each_other_stop_before_the_model_loads(settings, message):
    with pytest.raises(ValueError, match=message):
        Scorer("no/such/model", **settings)


def test_window_defaults_to_all_recorded_steps():
    assert ScoreRange.within(5).window == Window(1, 5)
