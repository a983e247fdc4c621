"""Engines for child processes that die, stop or hang when a prompt tells them to: fake ones, and the real one.

The folder this is in must be on PYTHONPATH. For the fake ones nothing of vLLM, torch or a model is imported.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from headrift.corpus.config import ScoreConfig
from headrift.corpus.scoring import ScoringEngine
from headrift.prepare import Prepared
from headrift.results import ScoreResult
from headrift.testing import text_of

LAYERS, HEADS, STEPS = 3, 2, 4
REGIONS = ("system", "user", "prompt")
TOKENIZER = "tokenizer.pickle"  # a file in the model's folder


def user_ids(prepared: Prepared) -> list[int]:
    """The tokens of the user's text."""
    start, end = prepared.request.regions["user"]
    return list(prepared.request.prompt_ids[start:end])


class FaultyEngine:
    """A fake engine: a result depends on the user's text only.

    `KILL` in a prompt ends the process, `KILL ONCE` too if there is no mark of it yet, `HANG` goes on for ever, and
    `STOP` stops the whole process.

    Args:
        marks: A folder in which a prompt that kills once leaves a mark.
        model: A fake model with its pickled tokenizer.
        pause: Seconds that a row takes.
    """

    def __init__(self, marks: Path, model: Path, pause: float = 0.0) -> None:
        self._marks, self._pause = marks, pause
        self.waited, self.steps_run = 0.0, 0
        self.about: dict[str, Any] = {
            **{"dtype": "float32", "layers": LAYERS, "heads": HEADS, "regions": list(REGIONS), "max_model_len": 512},
            **{"vocabulary": 258, "recorder_bytes": 1000, "chat_template_sha256": "", "in_flight": 50},
            **{"prepare_workers": 0, "tokenizer": (model / TOKENIZER).read_bytes()},
        }

    def score(self, requests: Iterable[Prepared]) -> Iterator[ScoreResult]:
        """Up to 20 at a time are in flight, as in an engine."""
        in_flight: list[Prepared] = []
        for prepared in requests:
            in_flight.append(prepared)
            if len(in_flight) == 20:
                yield from self._answers(in_flight)
                in_flight = []
        yield from self._answers(in_flight)

    def _answers(self, requests: list[Prepared]) -> Iterator[ScoreResult]:
        for prepared in requests:
            self._fail(text_of(user_ids(prepared)))
        for prepared in requests:
            time.sleep(self._pause)
            yield self._answer(prepared)

    def _fail(self, text: str) -> None:
        if text.startswith("KILL ONCE"):
            mark = self._marks / f"killed-{text.split()[2]}"
            if not mark.exists():
                mark.touch()
                os._exit(7)
        elif text.startswith("KILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif text.startswith("HANG"):
            threading.Event().wait()
        elif text.startswith("STOP"):
            os.kill(os.getpid(), signal.SIGSTOP)

    def _answer(self, prepared: Prepared) -> ScoreResult:
        seed = int.from_bytes(hashlib.sha256(bytes(user_ids(prepared))).digest()[:8], "big")
        instability = np.random.default_rng(seed).random((STEPS + 1, LAYERS), np.float32)
        return ScoreResult(
            index=prepared.index,
            id=prepared.id,
            score=float(instability[1:].mean()),
            reason=None,
            n_steps=STEPS,
            n_scored=STEPS,
            prompt_tokens=len(prepared.request.prompt_ids),
            system_tokens=3,
            answer_tokens=STEPS + 1,
            system_hash="0" * 16,
            signals={},
            flags=(),
            answer_ids=[],
            text="",
            instability=instability,
            shares=np.empty(0, np.float32),
            focus_heads=None,
            logit_stats=None,
            mass=None,
            region_names=REGIONS,
        )

    def close(self) -> None:
        """Nothing to free."""


class SlowEngine(FaultyEngine):
    """Runs many steps before its first answer; they rise in its count if it `moves`."""

    def __init__(self, marks: Path, model: Path, steps: int, pause: float, moves: bool) -> None:
        super().__init__(marks, model)
        self._steps, self._between, self._moves = steps, pause, moves

    def score(self, requests: Iterable[Prepared]) -> Iterator[ScoreResult]:
        """As its base class, after all steps."""
        requests = list(requests)
        for _ in range(self._steps):
            time.sleep(self._between)
            self.steps_run += self._moves
        yield from super().score(requests)


class WordyEngine(FaultyEngine):
    """Its answers are longer than what a socket holds."""

    def _answer(self, prepared: Prepared) -> ScoreResult:
        return replace(super()._answer(prepared), text="x" * 10**6)


class BrokenEngine:
    """Cannot be made."""

    def __init__(self) -> None:
        raise ValueError("there is no such engine")


class DyingEngine:
    """Ends its process while it is made."""

    def __init__(self) -> None:
        os._exit(9)


class Parent(FaultyEngine):
    """Starts a process, whose number is in marks/grandchild.pid."""

    def __init__(self, marks: Path, model: Path) -> None:
        super().__init__(marks, model)
        process = subprocess.Popen(["sleep", "600"])
        (marks / "grandchild.pid").write_text(str(process.pid))


class FaultyScoringEngine(ScoringEngine):
    """The real engine, whose process `KILL` in a prompt ends. pause: seconds that an answer is held back."""

    def __init__(self, config: ScoreConfig, pause: float = 0.0) -> None:
        super().__init__(config)
        self._pause = pause
        self._tokenizer = pickle.loads(self.about["tokenizer"])

    def score(self, requests: Iterable[Prepared]) -> Iterator[Any]:
        """As its base class."""
        for answer in super().score(self._faults(requests)):
            time.sleep(self._pause)
            yield answer

    def _faults(self, requests: Iterable[Prepared]) -> Iterator[Prepared]:
        for prepared in requests:
            if self._tokenizer.decode(user_ids(prepared)).startswith("KILL"):
                os.kill(os.getpid(), signal.SIGKILL)
            yield prepared
