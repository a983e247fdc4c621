"""The closing table: what became of the rows, and how well the score tells attacks from benign prompts.

Kept while rows stream by: counts, and for each scored row some 40 bytes.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headrift.corpus.readers import LABELS

if TYPE_CHECKING:
    from rich.console import Console

RESAMPLES = 1000
# Below this many distinct prompts in a class a bootstrap interval says little, and looks as if it said much.
MIN_FOR_INTERVAL = 10
_CLASSES = (*LABELS, None)
_NO_SCORE = -1.0  # below every score: a row without one is never flagged


@dataclass(frozen=True, slots=True)
class Auroc:
    """Area under the ROC curve, attack = positive and higher = attack; interval: 95%, None where too few prompts."""

    value: float
    interval: tuple[float, float] | None


class Summary:
    """Accumulates one run's rows: `add` for each row in the parts, `reject` for each of the others."""

    def __init__(self) -> None:
        self.no_score: Counter[str] = Counter()
        self.rejects: Counter[str] = Counter()
        self._scores = array("d")
        self._classes = array("b")
        self._prompt_tokens = array("l")
        self._steps = array("l")
        self._groups = array("Q")
        self._systems = array("Q")

    def add(self, record: Mapping[str, Any]) -> None:
        """A row of a part, with its columns score, reason, label, prompt_tokens, n_steps, group and system_hash."""
        if record["score"] is None:
            self.no_score[record["reason"]] += 1
        self._scores.append(_NO_SCORE if record["score"] is None else record["score"])
        self._classes.append(_CLASSES.index(record["label"]))
        self._prompt_tokens.append(record["prompt_tokens"])
        self._steps.append(record["n_steps"])
        self._groups.append(int(record["group"], 16))
        self._systems.append(int(record["system_hash"], 16))

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
        """Of each class with rows (attack, benign, unlabelled): n, coverage, mean and median (None without scores)."""
        scores, classes = np.array(self._scores), np.array(self._classes)
        found: dict[str, dict[str, float | int | None]] = {}
        for number, label in enumerate(_CLASSES):
            of_class = scores[classes == number]
            if not len(of_class):
                continue
            there = of_class[of_class != _NO_SCORE]
            found[label or "unlabelled"] = {
                "n": len(of_class),
                "coverage": len(there) / len(of_class),
                "mean": float(there.mean()) if len(there) else None,
                "median": float(np.median(there)) if len(there) else None,
            }
        return found

    def aurocs(self) -> tuple[dict[str, Auroc], int, int] | None:
        """AUROC of the score, of prompt length and of the number of steps; the numbers of attack and benign rows.

        Rows alike in group, system prompt and label count once (the first of them); one without a score ranks lowest.
        None unless both classes are there.
        """
        from sklearn.metrics import roc_auc_score

        classes = np.array(self._classes)
        keys = np.stack([np.array(self._groups), np.array(self._systems), classes.astype(np.uint64)], axis=1)
        labelled = np.flatnonzero(classes < len(LABELS))
        if len(labelled):
            labelled = labelled[np.unique(keys[labelled], axis=0, return_index=True)[1]]
        attack = classes[labelled] == LABELS.index("attack")
        n_attack, n_benign = int(attack.sum()), int((~attack).sum())
        if not n_attack or not n_benign:
            return None
        groups = np.unique(keys[labelled, 0], return_inverse=True)[1]
        found = {}
        for name, values in {
            "instability score": self._scores,
            "prompt length": self._prompt_tokens,
            "number of steps": self._steps,
        }.items():
            ranked = np.array(values, np.float64)[labelled]
            interval = None
            if min(n_attack, n_benign) >= MIN_FOR_INTERVAL:
                interval = bootstrap_interval(ranked, attack, groups)
            found[name] = Auroc(float(roc_auc_score(attack, ranked)), interval)
        return found, n_attack, n_benign

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

        classes = [
            (name, f"{of['n']:,}", f"{of['coverage']:.1%}", _number(of["mean"]), _number(of["median"]))
            for name, of in self.by_class().items()
        ]
        if classes:
            _print_table(console, ("class", "rows", "coverage", "mean score", "median score"), classes)
        judged = self.aurocs()
        if judged is None:
            return
        aurocs, n_attack, n_benign = judged
        _print_table(
            console,
            ("attack against benign", "AUROC", "95% interval"),
            [(name, f"{auroc.value:.3f}", _interval(auroc.interval)) for name, auroc in aurocs.items()],
        )
        note = f"of {n_attack:,} attack and {n_benign:,} benign prompts, repeats counted once; no score ranks lowest"
        console.print(note, markup=False, highlight=False)


def bootstrap_interval(
    values: NDArray[np.float64], attack: NDArray[np.bool_], groups: NDArray[np.int64], *, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of the AUROC of values, from resampling whole groups with replacement.

    groups: for each row the number of its group, 0 and up. Resamples without both classes are left out. The same seed
    and input give the same interval.
    """
    random = np.random.default_rng(seed)
    rank = np.unique(values, return_inverse=True)[1]
    n_groups, n_ranks = int(groups.max()) + 1, int(rank.max()) + 1
    found = []
    for _ in range(RESAMPLES):
        weight = np.bincount(random.integers(0, n_groups, n_groups), minlength=n_groups)[groups]
        at_rank = (
            np.bincount(rank[attack], weight[attack], n_ranks),
            np.bincount(rank[~attack], weight[~attack], n_ranks),
        )
        attacks, benign = at_rank
        pairs = attacks.sum() * benign.sum()
        if pairs:
            # An attack beats the benign prompts of lower ranks, and half of those of its own.
            found.append(attacks @ (np.cumsum(benign) - benign / 2) / pairs)
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def _print_table(console: Console, names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in names:
        table.add_column(name, justify="left" if name == names[0] else "right")
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)


def _interval(interval: tuple[float, float] | None) -> str:
    return "too few prompts" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _number(value: float | int | None) -> str:
    return "" if value is None else f"{value:.4f}"
