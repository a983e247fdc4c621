"""The real engine, which dies of a prompt that tells it to. The folder this is in must be on PYTHONPATH."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from typing import Any

from headrift.corpus.rows import Row
from headrift.corpus.scoring import ScoringEngine
from headrift.corpus.settings import Settings


class MortalEngine(ScoringEngine):
    """`KILL` ends the process as soon as the row is taken. pause: seconds that an answer is held back."""

    def __init__(self, asked: Settings, pause: float = 0.0) -> None:
        super().__init__(asked)
        self._pause = pause

    def score(self, rows: Iterable[Row]) -> Iterator[Any]:
        """As its kind."""
        for answer in super().score(_deadly(rows)):
            time.sleep(self._pause)
            yield answer


def _deadly(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        if (row.prompt.prompt or "").startswith("KILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        yield row
