"""Which rows of runs are compared, and what is known of each but its signals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrift.calibration.runs import ATTACK, BENIGN, HARD, Rows, Run
from headrift.calibration.settings import CalibrationError
from headrift.calibration.units import distinct, folds

Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

FOLDS = 5
_MOST = 10_000  # samples of a class
_MOST_SETS = 20


@dataclass(frozen=True, slots=True)
class Samples:
    """Attacks and benign prompts, exact repeats once, in the order of their rows.

    row: its number over all runs; group, fold: from 0; set: a number for each run and system prompt, named in `sets`,
    -1 beyond the largest 20; category: "" for none; counts: as in Rows. n_distinct: of attacks and benign prompts, how
    many there were to draw from.
    """

    row: Ints
    attack: Bools
    group: Ints
    fold: Ints
    n_folds: int
    set: Ints
    sets: list[str]
    category: NDArray[np.str_]
    counts: dict[str, NDArray[np.int32]]
    n_distinct: tuple[int, int]

    def __len__(self) -> int:
        return len(self.row)

    @property
    def hard(self) -> Bools:
        """Benign prompts that were written to look like attacks, by their category."""
        return ~self.attack & np.char.startswith(self.category, HARD)

    def other_folds(self, seed: int) -> Ints:
        """Another division into folds."""
        return folds(self.attack, self.group, FOLDS, seed)[0]


def take(runs: Sequence[Run], rows: Rows, seed: int, *, by_run: bool = False) -> Samples:
    """The samples, drawn at random where there are more than 10,000 of a class. by_run: the same prompt in another run
    is no repeat (another model). CalibrationError where a class is missing."""
    categories, sets, run = _texts(runs)
    key = np.unique(rows.prompt * len(runs) + run, return_inverse=True)[1] if by_run else rows.prompt
    draw = np.random.default_rng(seed).permutation(int(key.max()) + 1)
    drawn = [distinct(key, rows.label == label, draw) for label in (ATTACK, BENIGN)]
    for name, of in zip(("attack", "benign"), drawn):
        if not len(of.row):
            raise CalibrationError(
                f"no row is labelled {name}: signals are compared by how they tell attacks from benign prompts; label "
                "the rows and score them anew"
            )
    row = np.sort(np.concatenate([of.row[:_MOST] for of in drawn]))
    attack = rows.label[row] == ATTACK
    group = np.unique(rows.group[row], return_inverse=True)[1].astype(np.int64)
    fold, n_folds = folds(attack, group, FOLDS, seed)
    number, named = _numbered(sets[row], runs)
    return Samples(
        row=row,
        attack=attack,
        group=group,
        fold=fold,
        n_folds=n_folds,
        set=number,
        sets=named,
        category=categories[row],
        counts={name: values[row] for name, values in rows.counts.items()},
        n_distinct=(len(drawn[0].row), len(drawn[1].row)),
    )


def _texts(runs: Sequence[Run]) -> tuple[NDArray[np.str_], NDArray[np.str_], Ints]:
    """Of all rows: category, run and system prompt ("<run number> <hash>"), number of the run."""
    categories: list[str] = []
    sets: list[str] = []
    numbers: list[int] = []
    for at, run in enumerate(runs):
        for batch in run.batches(["category", "system_hash"]):
            categories += [text or "" for text in batch.column("category").to_pylist()]
            sets += [f"{at} {text}" for text in batch.column("system_hash").to_pylist()]
            numbers += [at] * batch.num_rows
    return np.array(categories, np.str_), np.array(sets, np.str_), np.array(numbers, np.int64)


def _numbered(sets: NDArray[np.str_], runs: Sequence[Run]) -> tuple[Ints, list[str]]:
    """The largest sets' numbers from 0, in the order of the runs, -1 for the others; and their names."""
    found, of, n = np.unique(sets, return_inverse=True, return_counts=True)
    kept = np.sort(np.argsort(-n, kind="stable")[:_MOST_SETS])
    kept = kept[np.argsort([int(found[at].split()[0]) for at in kept], kind="stable")]
    number = np.full(len(found), -1)
    number[kept] = np.arange(len(kept))
    parts = [found[at].split() for at in kept]
    runs_of = [int(run) for run, _ in parts]
    names = [
        Path(runs[run].name).name + (f", system prompt {text[:8]}" if runs_of.count(run) > 1 else "")
        for run, (_, text) in zip(runs_of, parts)
    ]
    return number[of].astype(np.int64), names
