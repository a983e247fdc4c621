"""`ProbedEngine.run`: requests taken as slots free up, results as they are done."""

import itertools

import numpy as np
import pytest

from headrift.probed_engine import ProbedEngine
from headrift.requests import ProbeRequest

STEPS = 3


@pytest.fixture(scope="module")
def engine(tiny_model, settings_of_tests):
    settings = {**settings_of_tests, "skip_tokenizer_init": True, "max_num_seqs": 4, "max_model_len": 256}
    with ProbedEngine(tiny_model("llama-3to1"), steps=STEPS, slots=6, engine_args=settings) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _all_slots_are_free_afterwards(engine):
    yield
    assert engine.running == 0
    assert engine.free_slots == engine.slots


def request(n: int, steps: int = STEPS, **options) -> ProbeRequest:
    ids = np.random.default_rng(n).integers(3, 200, n).tolist()
    return ProbeRequest(ids, {"system": (0, n // 2)}, steps, ignore_eos=True, **options)


def test_requests_are_taken_as_slots_free_up(engine):
    taken = 0

    def requests():
        nonlocal taken
        for i in range(40):
            taken += 1
            yield i, request(10 + i, steps=i % (STEPS + 1), probed=i % 5 > 0)

    for n, (key, done, recording) in enumerate(engine.run(requests()), 1):
        assert done.request.prompt_ids == request(10 + key).prompt_ids
        assert (recording is not None) == (key % 5 > 0)
        assert recording is None or (len(recording.share) == done.n_steps + 1 and recording.mass is None)
        # Finished requests are drained eight at a time, so as many results may be under way to the caller.
        assert taken <= n + engine.slots + 8
    assert (n, taken) == (40, 40)


def test_a_request_may_depend_on_an_earlier_result(engine):
    answers = {}

    def requests():
        for i in range(3):
            yield i, request(20 + i)
        for i in range(3):
            while i not in answers:
                yield None
            yield i + 3, request(20 + i, answer_ids=answers[i])

    shares = {}
    for key, done, recording in engine.run(requests()):
        answers[key] = done.answer_ids
        shares[key] = recording.share
    for i in range(3):  # also those of steps that a cached prefix covered at first
        np.testing.assert_allclose(shares[i + 3], shares[i], rtol=0, atol=2e-5)


def test_waiting_for_a_result_that_cannot_come_is_an_error(engine):
    with pytest.raises(RuntimeError, match="no request is in flight"):
        list(engine.run(iter([(0, request(10)), None, None, None, *[None] * 50])))


def test_stop_if_ends_answers_where_the_steps_are_recorded(engine):
    requests = [(i, request(12 + i, answer_tokens=STEPS + 1 + i)) for i in range(8)]
    results = {key: done for key, done, _ in engine.run(requests, stop_if=lambda key, done, recording: key % 2)}
    assert set(results) == set(range(8))
    for key, done in results.items():
        assert len(done.answer_ids) == STEPS + 1 + (0 if key % 2 else key)
        assert done.answering == bool(key % 2)
    never = {key: done for key, done, _ in engine.run(requests)}
    assert [len(never[i].answer_ids) for i in range(8)] == [STEPS + 1 + i for i in range(8)]


def test_at_once(engine, monkeypatch):
    most, step = 0, engine.step

    def counting():
        nonlocal most
        most = max(most, engine.running)
        return step()

    monkeypatch.setattr(engine, "step", counting)
    assert len(list(engine.run([(i, request(10 + i)) for i in range(7)], at_once=2))) == 7
    assert most == 2


def test_left_early(engine):
    results = engine.run((i, request(10 + i % 50)) for i in itertools.count())
    assert len(list(itertools.islice(results, 5))) == 5
    results.close()
