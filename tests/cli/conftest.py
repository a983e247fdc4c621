"""An engine of straw behind the real scorer: real chat rendering and bookkeeping, random numbers, no vLLM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import headrift.corpus.job
import headrift.scorer
from headrift.requests import Finished, ProbeRequest, Recording, Ticket
from headrift.scorer import Scorer

MODEL = Path(__file__).resolve().parents[2] / "models" / "smollm2-135m-instruct"
ANSWER = [504, 3575, 282, 4649, 314, 7042]  # "The capital of France is Paris"


class StubEngine:
    """Answers every request at once with the same tokens; answers of every third prompt end before the window."""

    layers, heads, slots, max_model_len, vocabulary = 6, 3, 4, 400, 49152
    dtype, recorder_bytes = "float32", 1_000_000
    windows = (None,) * layers

    def __init__(self, model: object, *, steps: int, regions: tuple[str, ...], **others: object) -> None:
        self.steps, self.regions = steps, tuple(regions)
        self.free_slots, self._queue, self._tenants = self.slots, [], 0

    @property
    def running(self) -> int:
        return len(self._queue)

    def most_prompt_tokens(self, steps: int) -> int:
        return self.max_model_len - steps - 1

    def submit(self, request: ProbeRequest) -> int:
        assert all(0 <= token < self.vocabulary for token in request.prompt_ids)
        assert len(request.prompt_ids) <= self.most_prompt_tokens(request.steps)
        self.free_slots -= 1
        self._queue.append((self._tenants, request))
        self._tenants += 1
        return self._tenants - 1

    def step(self) -> list[Finished]:
        done = []
        for tenant, request in self._queue:
            short = len(request.prompt_ids) % 3 == 0
            answer = ANSWER[:1] if short else (ANSWER * 9)[: request.steps + 1]
            replayed = request.answer_ids
            answer = answer if replayed is None else list(replayed)
            done.append(Finished(tenant, request, answer, "stop" if short else "length", 0))
        self._queue = []
        return done

    def collect(self, finished: list[Finished], want_mass: bool = False) -> Ticket:
        self.free_slots += len(finished)
        return Ticket(0, tuple(finished), want_mass)

    def recordings(self, ticket: Ticket) -> list[Recording]:
        return [self._recording(done, ticket.want_mass) for done in ticket.finished]

    def _recording(self, done: Finished, want_mass: bool) -> Recording:
        random = np.random.default_rng(done.request.prompt_ids)
        shape = (done.n_steps + 1, self.layers, self.heads)
        mass = random.random((*shape, len(self.regions)), np.float32)
        stats = random.random((shape[0], 3), np.float32)
        first = np.delete(mass[0], self.regions.index("prompt"), -1)
        return Recording(random.random(shape, np.float32), first, stats, mass if want_mass else None)

    def abort(self) -> None:
        self._queue = []

    def close(self) -> None:
        pass


@pytest.fixture(scope="session")
def straw() -> Scorer:
    """A scorer on an engine of straw, with the demonstration model's tokenizer."""
    if not (MODEL / "config.json").is_file():
        pytest.fail(f"the demonstration model is not in {MODEL}: `make test` puts it there, or `make setup`")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(headrift.scorer, "ProbedEngine", StubEngine)
        return Scorer(MODEL, system_prompt="Be brief.", steps=4, regions=("tool", "page"), keep_mass=True)


@pytest.fixture
def on_straw(straw: Scorer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`headrift score` takes the scorer of straw, whatever it is asked for, in this process. The model to name."""
    monkeypatch.setattr(headrift.corpus.job, "Child", lambda start, verbose: start())
    monkeypatch.setattr(headrift.scorer, "Scorer", lambda *args, **settings: straw)
    return MODEL
