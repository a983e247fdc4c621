"""Which rows are samples, and what each is used for: exact repeats are one, and no prompt is on two sides of a split.

Of benign samples, part A chooses window and layers (with the attacks), and part B sets the threshold. Where there are
very many, a draw is enough to choose and to measure; B takes all that A does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrift.calibration.runs import ATTACK, BENIGN, UNLABELLED, Rows
from headrift.calibration.settings import CalibrationError, Settings
from headrift.calibration.thresholds import needed
from headrift.stats import CONFIDENCE

Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

FEWEST_TO_CHOOSE = 10  # samples of a class, below which there is nothing to choose by
_MANY_TO_CHOOSE = 30  # benign samples that A keeps where B takes more than half for cross-validation's sake
_MOST_MEASURED = 20_000  # samples of a class that figures are measured on
_MOST_CHOOSE = 5_000  # samples of a class that choose
_LOOKS = 200_000_000  # fewer choose where cells are so many that more than this were to be looked up ...
_FEWEST_OF_MANY = 1_000  # ... but no fewer than this


@dataclass(frozen=True, slots=True)
class Units:
    """Samples, in the order of their rows: a row each, its class, its group (from 0), how many rows it stands for, the
    fold that it is held out in (from 0), whether it chooses (part A, and attacks) and whether it sets (part B)."""

    row: Ints
    attack: Bools
    group: Ints
    repeats: Ints
    fold: Ints
    chooses: Bools
    sets: Bools
    n_folds: int


@dataclass(frozen=True, slots=True)
class Division:
    """units: what is cross-validated. sets: the rows of all of part B. n_attack, n_benign: all samples of a class.
    cross_validated: whether B is large enough in every fold to set a threshold there."""

    units: Units
    sets: Ints
    n_attack: int
    n_benign: int
    cross_validated: bool


def divide(rows: Rows, settings: Settings, n_cells: int) -> Division:
    """Samples and their parts. n_cells: how many cells there are to choose from. CalibrationError, with the number that
    is needed, where there are too few."""
    label = np.where(rows.label == UNLABELLED, BENIGN, rows.label) if settings.benign_only else rows.label
    if settings.benign_only:
        label = np.where(label == ATTACK, UNLABELLED, label)
    random = np.random.default_rng(settings.seed)
    group_of = np.empty(rows.prompt.max() + 1, np.int64)
    group_of[rows.prompt] = rows.group
    draw = random.permutation(rows.group.max() + 1)[group_of]  # groups together, in one order for attack and benign
    attack, benign = (distinct(rows.prompt, label == of, draw) for of in (ATTACK, BENIGN))
    searches = n_cells > 1
    need = needed(target_of(settings), settings.rule)
    n_choose = _n_choose(len(benign.row), settings, need) if searches else 0
    _check_enough(len(attack.row), len(benign.row), need, settings, searches)

    measured = [of.first(_MOST_MEASURED) for of in (attack, benign)]
    row, repeats = (np.concatenate([getattr(of, name) for of in measured]) for name in ("row", "repeats"))
    is_attack = np.arange(len(row)) < len(measured[0].row)
    group = np.unique(rows.group[row], return_inverse=True)[1]
    tied = _tied(group, rows.category[row]) if settings.by_category else group.astype(np.int64)
    fold, n_folds = folds(is_attack, tied, settings.folds, settings.seed)

    most = int(np.clip(_LOOKS // (2 * n_cells), _FEWEST_OF_MANY, _MOST_CHOOSE))
    chooses = is_attack & (np.arange(len(row)) < most) & searches
    n_choose = min(n_choose, most)
    of_fold = [np.flatnonzero(~is_attack & (fold == at)) for at in range(n_folds)]
    for members, n in zip(of_fold, _shares([len(members) for members in of_fold], n_choose)):
        while 0 < n < len(members) and group[members[n]] == group[members[n - 1]]:
            n -= 1  # no group is on both sides
        chooses[members[:n]] = True
    sets = ~is_attack & ~chooses
    in_other_folds = sets.sum() - np.bincount(fold[sets], minlength=n_folds)

    order = np.argsort(row, kind="stable")
    units = Units(
        row=row[order],
        attack=is_attack[order],
        group=tied[order],
        repeats=repeats[order],
        fold=fold[order],
        chooses=chooses[order],
        sets=sets[order],
        n_folds=n_folds,
    )
    return Division(
        units,
        np.setdiff1d(benign.row, row[chooses]),
        len(attack.row),
        len(benign.row),
        n_folds > 1 and bool((in_other_folds >= need).all()),
    )


@dataclass(frozen=True, slots=True)
class Distinct:
    """Samples of a class in the order in which they are drawn: a row each, and how many rows it stands for."""

    row: Ints
    repeats: Ints

    def first(self, n: int) -> Distinct:
        return Distinct(self.row[:n], self.repeats[:n])


def distinct(prompt: Ints, mine: Bools, draw: Ints) -> Distinct:
    """One sample per prompt among the rows that are mine: its first row. draw: a place for each prompt."""
    number = np.flatnonzero(mine)
    prompts, first, repeats = np.unique(prompt[number], return_index=True, return_counts=True)
    order = np.argsort(draw[prompts], kind="stable")
    return Distinct(number[first][order], repeats[order])


def target_of(settings: Settings) -> float:
    """The rate of all prompts that may be flagged: with benign_only, if all flagged ones were benign."""
    return settings.target_fpr * (1 - settings.contamination) if settings.benign_only else settings.target_fpr


def _n_choose(n: int, settings: Settings, need: int) -> int:
    """The size of part A: half; less where B needs more, in every fold too if that leaves enough."""
    in_folds = -(-need * settings.folds // (settings.folds - 1)) + settings.folds
    for_sets = max(-(-n // 2), in_folds)
    if n - for_sets < _MANY_TO_CHOOSE:
        for_sets = max(-(-n // 2), need)
    return n - for_sets


def _check_enough(n_attack: int, n_benign: int, need: int, settings: Settings, searches: bool) -> None:
    goal = f"a false positive rate of {settings.target_fpr:.3g}"
    goal += f" with {CONFIDENCE:.0%} confidence" if settings.rule == "binomial" else " on average"
    if settings.benign_only:
        goal += f" among prompts of which {settings.contamination:.3g} may be attacks"
    choosers = FEWEST_TO_CHOOSE if searches else 0
    if n_benign < need + choosers:
        more = f", and {choosers} others to choose window and layers" if choosers else ""
        raise CalibrationError(
            f"{goal} needs at least {need} distinct benign prompts to set the threshold{more}; there are {n_benign}: "
            "score more, or set a higher --target-fpr"
        )
    if not settings.benign_only and not n_attack:
        raise CalibrationError("no row is labelled attack: label the rows and score them anew, or give --benign-only")
    if not settings.benign_only and searches and n_attack < FEWEST_TO_CHOOSE:
        raise CalibrationError(
            f"choosing window and layers needs at least {FEWEST_TO_CHOOSE} distinct attacks, and there are {n_attack}: "
            "score more, name the --window, or calibrate with --benign-only"
        )


def folds(attack: Bools, group: Ints, most: int, seed: int) -> tuple[Ints, int]:
    """Each sample's fold, classes spread evenly, groups whole; and how many folds there are, `most` at most: 1 where
    there are too few groups to hold any out."""
    from sklearn.model_selection import StratifiedGroupKFold

    per_class = [len(np.unique(group[attack == of])) for of in (True, False) if (attack == of).any()]
    n_folds = min(most, *per_class, len(np.unique(group)))
    while n_folds > 1:
        fold = np.zeros(len(group), np.int64)
        splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
        for at, (_, held_out) in enumerate(splitter.split(group, attack, group)):
            fold[held_out] = at
        both = [len(np.unique(attack[fold == at])) for at in range(n_folds)]
        if min(both) == len(per_class):
            return fold, n_folds
        n_folds -= 1
    return np.zeros(len(group), np.int64), 1


def _tied(group: Ints, category: NDArray[np.int32]) -> Ints:
    """Groups joined where they share a category, categories where they share a group."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    named = category >= 0
    n_groups = int(group.max()) + 1
    size = n_groups + int(category.max(initial=-1)) + 1
    edges = (np.ones(int(named.sum())), (group[named], n_groups + category[named]))
    return np.asarray(connected_components(coo_array(edges, shape=(size, size)), directed=False)[1][group], np.int64)


def _shares(sizes: list[int], total: int) -> list[int]:
    """A total divided in proportion to sizes, whole numbers."""
    ends = np.floor(np.cumsum([0, *sizes]) * total / max(sum(sizes), 1)).astype(int)
    return [int(n) for n in np.diff(ends)]
