"""The closing table: what became of the rows, and how well the score tells attacks from benign prompts.

Kept while rows stream by: counts, and for each scored row some 50 bytes.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headrift.corpus.rows import LABELS
from headrift.corpus.separation import TARGET_FPR, Interval, Separation, separation

if TYPE_CHECKING:
    from rich.console import Console

HARD = "hard"  # categories of benign prompts that are made to be mistaken for attacks begin so
SCORE = "score (no score: lowest)"
SCORED = "score, scored rows only"
_CLASSES = (*LABELS, None)
_MAX_CATEGORIES = 1000
_OTHER = "(other)"
_LABEL_WIDTH = 24


@dataclass(frozen=True, slots=True)
class Comparison:
    """Attacks against benign prompts, repeats counted once: how many, and what each measure says (see separation)."""

    title: str
    n_attack: int
    n_benign: int
    measures: dict[str, Separation]

    def numbers(self) -> dict[str, Any]:
        """The figures for run.json."""
        measures = {name: measure.numbers() for name, measure in self.measures.items()}
        return {"title": self.title, "attack": self.n_attack, "benign": self.n_benign, "measures": measures}


class Summary:
    """Accumulates one run's rows: `add` for each row in the parts, `reject` for each of the others.

    last_step: the window's last step; an answer without it stopped early.
    """

    def __init__(self, last_step: int = 0) -> None:
        self.no_score: Counter[str] = Counter()
        self.rejects: Counter[str] = Counter()
        self._last_step = last_step
        self._scores = array("d")
        self._classes = array("b")
        self._categories = array("h")
        self._category_numbers: dict[str | None, int] = {None: 0}
        self._prompt_tokens = array("l")
        self._answer_tokens = array("l")
        self._steps = array("l")
        self._groups = array("Q")
        self._systems = array("Q")
        self._comparisons: list[Comparison] | None = None

    def add(self, record: Mapping[str, Any]) -> None:
        """A row of a part, with the columns that parts.part_schema names."""
        if record["score"] is None:
            self.no_score[record["reason"]] += 1
        self._scores.append(np.nan if record["score"] is None else record["score"])
        self._classes.append(_CLASSES.index(record["label"]))
        self._categories.append(self._number(record["category"]))
        self._prompt_tokens.append(record["prompt_tokens"])
        self._answer_tokens.append(record["answer_tokens"])
        self._steps.append(record["n_steps"])
        self._groups.append(int(record["group"], 16))
        self._systems.append(int(record["system_hash"], 16))
        self._comparisons = None

    def _number(self, category: str | None) -> int:
        numbers = self._category_numbers
        if category not in numbers and len(numbers) >= _MAX_CATEGORIES:
            hard = category is not None and category.startswith(HARD)
            category = f"{HARD} {_OTHER}" if hard else _OTHER
        return numbers.setdefault(category, len(numbers))

    def reject(self, reason: str) -> None:
        """A row that went into the rejects."""
        self.rejects[reason] += 1

    @property
    def rows(self) -> int:
        """Rows that came by, rejects included."""
        return len(self._scores) + self.rejects.total()

    @property
    def scored(self) -> int:
        """Rows that have a score."""
        return len(self._scores) - self.no_score.total()

    def counts(self) -> dict[str, Any]:
        """The counts for run.json."""
        reasons = {"no_score": dict(self.no_score), "rejected": dict(self.rejects)}
        return {"rows": self.rows, "scored": self.scored, **reasons}

    def by_class(self) -> dict[str, dict[str, float | int | None]]:
        """Of each class with rows (attack, benign, unlabelled): n, and as fractions of it coverage (those with a score)
        and early (answers that end before the window does); mean and median score, None without scores."""
        scores, classes, steps = np.array(self._scores), np.array(self._classes), np.array(self._steps)
        found: dict[str, dict[str, float | int | None]] = {}
        for number, label in enumerate(_CLASSES):
            of_class = classes == number
            if not of_class.any():
                continue
            there = scores[of_class & ~np.isnan(scores)]
            found[label or "unlabelled"] = {
                "n": int(of_class.sum()),
                "coverage": len(there) / int(of_class.sum()),
                "early": float((steps[of_class] < self._last_step).mean()),
                "mean": float(there.mean()) if len(there) else None,
                "median": float(np.median(there)) if len(there) else None,
            }
        return found

    def by_category(self) -> dict[tuple[str, str], NDArray[np.float64]]:
        """The scores, NaN for none, of each class and category that has rows, in order of first appearance."""
        scores, classes, categories = (np.array(of) for of in (self._scores, self._classes, self._categories))
        found = {}
        for number, label in enumerate(_CLASSES):
            for category, index in self._category_numbers.items():
                of_both = scores[(classes == number) & (categories == index)]
                if len(of_both):
                    found[label or "unlabelled", category or ""] = of_both
        return found

    def comparisons(self) -> list[Comparison]:
        """Attacks against all benign prompts and, where some are hard and some not, against those that are not.

        Rows alike in group, system prompt and label count once (the first of them). None unless both classes are there.
        """
        if self._comparisons is None:
            hard = {number for name, number in self._category_numbers.items() if name and name.startswith(HARD)}
            benign = np.array(self._classes) == LABELS.index("benign")
            is_hard = benign & np.isin(np.array(self._categories), list(hard))
            every = np.ones(len(benign), np.bool_)
            found = [self._compare("Attack against benign", every)]
            if is_hard.any() and (benign & ~is_hard).any():
                found.append(self._compare("Attack against benign that is not hard", ~is_hard))
            self._comparisons = [comparison for comparison in found if comparison is not None]
        return self._comparisons

    def _compare(self, title: str, among: NDArray[np.bool_]) -> Comparison | None:
        classes = np.array(self._classes)
        keys = np.stack([np.array(self._groups), np.array(self._systems), classes.astype(np.uint64)], axis=1)
        rows = np.flatnonzero(among & (classes < len(LABELS)))
        if len(rows):
            rows = rows[np.sort(np.unique(keys[rows], axis=0, return_index=True)[1])]
        attack = classes[rows] == LABELS.index("attack")
        if attack.all() or not attack.any():
            return None
        groups = np.unique(keys[rows, 0], return_inverse=True)[1]
        scores = np.array(self._scores)[rows]
        measures = {SCORE: separation(scores, attack, groups)}
        there = ~np.isnan(scores)
        if 0 < attack[there].sum() < there.sum():
            common = np.unique(groups[there], return_inverse=True)[1]
            measures[SCORED] = separation(scores[there], attack[there], common)
        confounds = {"prompt length": self._prompt_tokens, "answer length": self._answer_tokens}
        for name, values in {**confounds, "number of steps": self._steps}.items():
            measures[name] = separation(np.array(values, np.float64)[rows], attack, groups)
        return Comparison(title, int(attack.sum()), int((~attack).sum()), measures)

    def print(self, console: Console, *, start_seconds: float, score_seconds: float) -> None:
        """Print the tables. start_seconds: until the engine was ready; score_seconds: from there to the last result."""

        def line(name: str, n: int, more: str = "") -> None:
            console.print(f"{name:<10}{n:>9,}  {more}".rstrip(), markup=False, highlight=False)

        n_through = len(self._scores)
        speed = f"{n_through / score_seconds:.1f} prompts/s for {score_seconds:.1f} s" if n_through else "none scored"
        line("rows", self.rows, f"{speed}, after {start_seconds:.0f} s to start")
        line("scored", self.scored)
        for name, reasons in (("no score", self.no_score), ("rejected", self.rejects)):
            line(name, reasons.total(), ", ".join(f"{reason} {n:,}" for reason, n in reasons.most_common()))

        classes = []
        for name, of in self.by_class().items():
            fractions = (f"{of[key]:.1%}" for key in ("coverage", "early"))
            classes.append((name, f"{of['n']:,}", *fractions, _digits(of["mean"]), _digits(of["median"])))
        if classes:
            _print_table(console, ("", "rows", "with score", "stop early", "mean score", "median"), classes)
        for comparison in self.comparisons():
            console.print()
            n_attack, n_benign = f"{comparison.n_attack:,}", f"{comparison.n_benign:,}"
            console.print(f"{comparison.title}: {n_attack} against {n_benign}", markup=False, highlight=False)
            names = ("", "AUROC", "95% interval", f"TPR at {TARGET_FPR:.0%} FPR", "95% interval")
            rows = [
                (name, f"{of.auroc:.3f}", _range(of.auroc_interval), f"{of.tpr:.3f}", _range(of.tpr_interval))
                for name, of in comparison.measures.items()
            ]
            _print_table(console, names, rows)
        if self.comparisons():
            note = "Higher counts as attack, repeats count once, no score is never flagged."
            console.print(f"\n{note}", markup=False, highlight=False)


def _print_table(console: Console, names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", min_width=0 if i else _LABEL_WIDTH)
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)


def _range(interval: Interval | None) -> str:
    return "too few" if interval is None else f"{interval[0]:.3f}-{interval[1]:.3f}"


def _digits(value: float | int | None) -> str:
    return "" if value is None else f"{value:.4f}"
