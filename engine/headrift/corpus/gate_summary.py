"""The closing table of a gate: what was blocked of each class, and how many answers gave away what they should not."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headrift.corpus.summary import Summary
from headrift.runs.reading import read_batches
from headrift.stats import exact_interval
from headrift.terminal import print_table

if TYPE_CHECKING:
    from rich.console import Console

    from headrift.calibration.artifact import Calibration


@dataclass(frozen=True, slots=True)
class Rate:
    """So many of n distinct prompts, with the 95% interval of the rate (exact, Clopper-Pearson)."""

    k: int
    n: int
    rate: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, k: int, n: int) -> Rate:
        """Of counts."""
        return cls(k, n, k / n, exact_interval(k, n))

    @property
    def cells(self) -> tuple[str, str]:
        """The rate and its interval, to print."""
        return f"{self.rate:.1%}", f"{self.interval[0]:.1%}-{self.interval[1]:.1%}"


@dataclass(frozen=True, slots=True)
class Gated:
    """Of a class: rows, blocked ones, answer tokens that were decoded; and of its distinct prompts (at most 20,000,
    drawn) those that were blocked, those whose answer held a fail term, with the gate and without, and those whose
    answer would have and was blocked. None where it was not looked for."""

    rows: int
    rows_blocked: int
    tokens: int
    blocked: Rate
    leaked: Rate | None
    leaked_ungated: Rate | None
    prevented: Rate | None


class GateSummary:
    """Of all parts and rejects in a folder. last_step: the window's. compared: there is a column leaked_ungated.

    counts: rows scored and rejected (a Summary). classes: Gated by class (attack, benign, unlabelled).
    """

    def __init__(self, folder: Path, last_step: int, calibration: Calibration, *, compared: bool) -> None:
        self.counts = Summary.of_folder(folder, last_step, calibration)
        drawn = self.counts.samples()
        wanted = np.sort(np.concatenate([*drawn.values(), np.array([], np.int64)]))
        columns = ["label", "blocked", "leaked", "answer_tokens", *(["leaked_ungated"] if compared else [])]
        rows, blocked, tokens = Counter[str](), Counter[str](), Counter[str]()
        seen: Counter[tuple[str, str]] = Counter()  # of the prompts that were drawn
        first = 0
        for batch in read_batches(folder, columns):
            of = {name: batch[name].to_pylist() for name in columns}
            labels = [label or "unlabelled" for label in of["label"]]
            rows.update(labels)
            blocked.update(label for label, is_blocked in zip(labels, of["blocked"]) if is_blocked)
            for label, n in zip(labels, of["answer_tokens"]):
                tokens[label] += n
            start, stop = np.searchsorted(wanted, [first, first + len(batch)])
            for at in (wanted[start:stop] - first).tolist():
                row = {name: column[at] for name, column in of.items()}
                true = {
                    **{name: row.get(name) is True for name in ("blocked", "leaked", "leaked_ungated")},
                    "prevented": row.get("leaked_ungated") is True and row["blocked"],
                    "looked": row["leaked"] is not None,
                }
                seen.update((labels[at], name) for name, is_true in true.items() if is_true)
            first += len(batch)
        self.classes = {}
        for label, of_class in drawn.items():
            n = len(of_class)

            def rate(name: str, there: bool, label: str = label, n: int = n) -> Rate | None:
                return Rate.of(seen[label, name], n) if there else None

            self.classes[label] = Gated(
                rows=rows[label],
                rows_blocked=blocked[label],
                tokens=tokens[label],
                blocked=Rate.of(seen[label, "blocked"], n),
                leaked=rate("leaked", seen[label, "looked"] > 0),
                leaked_ungated=rate("leaked_ungated", compared),
                prevented=rate("prevented", compared),
            )

    @property
    def rows(self) -> int:
        """Rows that came by, rejects included."""
        return self.counts.rows

    def numbers(self) -> dict[str, Any]:
        """The figures for run.json."""
        return {**self.counts.numbers(), "gate": {name: asdict(of) for name, of in self.classes.items()}}

    def print(self, console: Console, *, rows: int, start_seconds: float, score_seconds: float) -> None:
        """Print the tables (see Summary.print)."""
        self.counts.print_counts(console, rows=rows, start_seconds=start_seconds, score_seconds=score_seconds)
        blocked = [
            (name, f"{of.rows:,}", f"{of.rows_blocked:,}", f"{of.tokens:,}", *of.blocked.cells)
            for name, of in self.classes.items()
        ]
        print_table(console, ("", "rows", "blocked", "tokens made", "of prompts", "95% interval"), blocked)
        leaks = [
            (f"{name}, {what}", f"{rate.k:,} of {rate.n:,}", *rate.cells)
            for name, of in self.classes.items()
            for what, rate in {
                "with the gate": of.leaked,
                "without it": of.leaked_ungated,
                "prevented by it": of.prevented,
            }.items()
            if rate is not None
        ]
        if leaks:
            print_table(console, ("answers with a fail term", "prompts", "", "95% interval"), leaks)
        self.counts.print_warnings(console)
