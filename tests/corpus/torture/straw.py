"""An engine of straw for child processes: it scores by arithmetic on the prompt, and dies where a prompt tells it to.

Or it hangs.

The folder it is in must be on PYTHONPATH. Nothing of vLLM, torch or a model is imported.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from headrift.corpus.rows import Row, group_of
from headrift.corpus.scoring import Turned

LAYERS, HEADS, STEPS = 3, 2, 4
SHAPE = {"dtype": "float32", "layers": LAYERS, "heads": HEADS, "regions": ["system", "user", "prompt"]}


class StrawEngine:
    """marks: a folder in which a prompt that kills once leaves a mark. pause: seconds that a row takes."""

    def __init__(self, marks: Path, pause: float = 0.0) -> None:
        self._marks, self._pause = marks, pause
        self.waited, self.steps_run = 0.0, 0
        template = hashlib.sha256(b"straw").hexdigest()
        self.about: dict[str, Any] = {
            **SHAPE, "max_model_len": 512, "recorder_bytes": 1000, "chat_template_sha256": template, "in_flight": 50,
        }  # fmt: skip

    def score(self, rows: Iterable[Row]) -> Iterator[dict[str, Any] | Turned]:
        """Some rows are turned down, `KILL` ends the process, `KILL ONCE` too where there is no mark of it yet.

        `HANG` goes on for ever, and `STOP` stops the whole process.
        """
        held: list[Row] = []
        for row in rows:  # up to 20 at a time are in flight, as in an engine
            held.append(row)
            if len(held) == 20:
                yield from self._answers(held)
                held = []
        yield from self._answers(held)

    def _answers(self, rows: list[Row]) -> Iterator[dict[str, Any] | Turned]:
        for row in rows:
            text = row.prompt.prompt or ""
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
        for row in rows:
            time.sleep(self._pause)
            yield self._answer(row)

    def _answer(self, row: Row) -> dict[str, Any] | Turned:
        text = row.prompt.prompt or ""
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        if seed % 17 == 0:
            return Turned("prompt_too_long", "shorten it")
        random = np.random.default_rng(seed)
        instability = random.random((STEPS + 1, LAYERS), np.float32)
        counts = {"n_steps": STEPS, "n_scored": STEPS, "prompt_tokens": len(text), "system_tokens": 3}
        floats = dict.fromkeys(("system_share", "head_agreement", "focus", "entropy", "top1", "margin"), 0.5)
        return {
            **{"id": row.id, "source": row.source, "row": row.row, "label": row.label, "category": row.category},
            **{"group": group_of(row.prompt), "system_hash": "0" * 16, "score": float(instability[1:].mean())},
            **{"reason": None, "flags": [], "answer_tokens": STEPS + 1, "instability": instability.ravel()},
            **{**counts, **floats},
        }

    def close(self) -> None:
        """There is nothing to give back."""


class SlowEngine(StrawEngine):
    """Takes many steps before its first answer. moves: they are seen in its count."""

    def __init__(self, marks: Path, steps: int, pause: float, moves: bool) -> None:
        super().__init__(marks)
        self._steps, self._between, self._moves = steps, pause, moves

    def score(self, rows: Iterable[Row]) -> Iterator[dict[str, Any] | Turned]:
        """As its kind, once all steps are taken."""
        held = list(rows)
        for _ in range(self._steps):
            time.sleep(self._between)
            self.steps_run += self._moves
        yield from super().score(held)


class WordyEngine(StrawEngine):
    """Its answers are longer than what a socket holds."""

    def _answer(self, row: Row) -> dict[str, Any] | Turned:
        answer = super()._answer(row)
        return answer | {"text": "x" * 10**6} if isinstance(answer, dict) else answer


class BrokenEngine:
    """Cannot be made."""

    def __init__(self) -> None:
        raise ValueError("there is no straw left")


class DyingEngine:
    """Ends its process while it is made."""

    def __init__(self) -> None:
        os._exit(9)


class Parent(StrawEngine):
    """Starts a process, whose number stands in marks/grandchild.pid."""

    def __init__(self, marks: Path) -> None:
        super().__init__(marks)
        process = subprocess.Popen(["sleep", "600"])
        (marks / "grandchild.pid").write_text(str(process.pid))
