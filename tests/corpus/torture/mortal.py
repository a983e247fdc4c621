"""The real engine, which dies of a prompt that tells it to. The folder this is in must be on PYTHONPATH."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

from headrift.corpus.rows import Row
from headrift.corpus.scoring import ScoringEngine


class MortalEngine(ScoringEngine):
    """`KILL` ends the process as soon as the row is taken."""

    def score(self, rows: Iterable[Row]) -> Iterator[Any]:
        """As its kind."""
        return super().score(_deadly(rows))


def _deadly(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        if (row.prompt.prompt or "").startswith("KILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        yield row
