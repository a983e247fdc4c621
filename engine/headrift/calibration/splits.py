"""Which rows are samples and what each is used for: exact repeats are one, and no group is on two sides of a split.

Of benign samples, part A chooses window and layers (with the attacks), and part B sets the threshold: one prompt of
each of its groups, drawn at random, since the rule for the threshold is exact for independent samples only. If there
are very many, a draw is enough to choose and to measure; B takes all groups that A does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrift.calibration.thresholds import CalibrateConfig, CalibrationError, needed
from headrift.runs.reading import ATTACK, BENIGN, HARD, UNLABELLED, Grouped, Grouping, Rows, ScoreRun
from headrift.stats import CONFIDENCE, Bools, Ints

FEWEST_TO_CHOOSE = 10  # samples of a class, below which there is nothing to choose by
FOLDS = 5  # of a comparison
_MANY_TO_CHOOSE = 30  # benign samples that A keeps when B takes more than half for cross-validation's sake
_MOST_MEASURED = 20_000  # samples of a class that held-out metrics are measured on
_MOST_CHOOSE = 5_000  # samples of a class that choose
_LOOK_UPS = 200_000_000  # most scores looked up in choosing: with more candidates fewer samples choose ...
_FEWEST_OF_MANY = 1_000  # ... but no fewer than this
_MOST_COMPARED = 10_000  # samples of a class in a comparison
_MOST_SETS = 20


@dataclass(frozen=True, slots=True)
class CalibrationSamples:
    """Samples of a calibration, in the order of their rows; arrays are [samples]."""

    row: Ints  # number of the row that stands for the sample
    attack: Bools
    group: Ints
    source: Ints  # number of its source
    repeats: Ints  # how many rows it stands for
    fold: Ints  # that it is held out in, from 0
    chooses: Bools  # window and layers (part A, and attacks)
    sets: Bools  # the threshold (part B): one of each group
    n_folds: int
    by_source: bool = False  # whether folds are sources

    @property
    def stratum(self) -> Ints:
        """What the groups are drawn within in a resample: attacks, benign samples that choose, and others."""
        return self.attack * 2 + (~self.attack & ~self.chooses)

    def with_sources_left_out(self) -> CalibrationSamples:
        """The same with a fold for each source, by number among those that occur."""
        number = np.unique(self.source, return_inverse=True)[1].astype(np.int64)
        return replace(self, fold=number, n_folds=int(number.max()) + 1, by_source=True)


@dataclass(frozen=True, slots=True)
class Division:
    """How prompts are divided."""

    samples: CalibrationSamples  # what is cross-validated
    part_b: Ints  # numbers of the rows of all of part B, one of each group
    n_attack: int  # all samples of the class
    n_benign: int
    left_to_groups: int  # benign samples outside part A that do not set the threshold: others of their groups do
    cross_validated: bool  # whether B is large enough in every fold to set a threshold there


def divide(rows: Rows, config: CalibrateConfig, n_candidates: int) -> Division:
    """Divide rows into samples and their parts; n_candidates windows and trims are there to choose from.

    Raises:
        CalibrationError: There are too few samples; the message says how many are needed.
    """
    label = np.where(rows.label == UNLABELLED, BENIGN, rows.label) if config.benign_only else rows.label
    if config.benign_only:
        label = np.where(label == ATTACK, UNLABELLED, label)
    random = np.random.default_rng(config.seed)
    # Groups together, in one order for attack and benign, and each group's prompts in a random order.
    order_of_group, order_of_prompt = (random.permutation(int(one.max()) + 1) for one in (rows.group, rows.prompt))
    attack, benign = (_distinct(rows, label == value, order_of_group, order_of_prompt) for value in (ATTACK, BENIGN))
    searches = n_candidates > 1
    need = needed(config.target, config.rule)
    n_groups = int(benign.first_of_group.sum())
    n_choose = _size_of_part_a(n_groups, config, need) if searches else 0
    _check_enough(len(attack.row), n_groups, need, config, searches, rows.grouped)

    measured = [samples.first(_MOST_MEASURED) for samples in (attack, benign)]
    row, repeats = (np.concatenate([getattr(part, name) for part in measured]) for name in ("row", "repeats"))
    first_of_group = np.concatenate([part.first_of_group for part in measured])
    is_attack = np.arange(len(row)) < len(measured[0].row)
    group = np.unique(rows.group[row], return_inverse=True)[1]
    tied = _tie_groups(group, rows.category[row]) if config.by_category else group.astype(np.int64)
    fold, n_folds = assign_folds(is_attack, tied, config.folds, config.seed)

    most = int(np.clip(_LOOK_UPS // (2 * n_candidates), _FEWEST_OF_MANY, _MOST_CHOOSE))
    chooses = is_attack & (np.arange(len(row)) < most) & searches
    n_choose = min(n_choose, most)
    by_fold = [np.flatnonzero(~is_attack & (fold == number)) for number in range(n_folds)]
    begins = [np.flatnonzero(first_of_group[members]) for members in by_fold]  # where each group begins in its fold
    for members, starts, n in zip(by_fold, begins, _proportions([len(starts) for starts in begins], n_choose)):
        chooses[members[: starts[n] if n < len(starts) else len(members)]] = True
    sets = ~is_attack & ~chooses & first_of_group
    in_other_folds = sets.sum() - np.bincount(fold[sets], minlength=n_folds)
    part_b = np.setdiff1d(benign.row[benign.first_of_group], row[chooses])
    others = len(np.setdiff1d(benign.row, row[chooses])) - len(part_b)

    order = np.argsort(row, kind="stable")
    return Division(
        CalibrationSamples(
            row=row[order],
            attack=is_attack[order],
            group=tied[order],
            source=rows.source[row[order]].astype(np.int64),
            repeats=repeats[order],
            fold=fold[order],
            chooses=chooses[order],
            sets=sets[order],
            n_folds=n_folds,
        ),
        part_b,
        len(attack.row),
        len(benign.row),
        others,
        n_folds > 1 and bool((in_other_folds >= need).all()),
    )


def _size_of_part_a(n: int, config: CalibrateConfig, need: int) -> int:
    """Half of n; less if B needs more, in every fold too if that leaves enough."""
    in_folds = -(-need * config.folds // (config.folds - 1)) + config.folds
    part_b = max(-(-n // 2), in_folds)
    if n - part_b < _MANY_TO_CHOOSE:
        part_b = max(-(-n // 2), need)
    return n - part_b


def _check_enough(
    n_attack: int, n_benign: int, need: int, config: CalibrateConfig, searches: bool, grouped: Grouped
) -> None:
    """CalibrationError if there are too few. n_benign: of groups."""
    kind = "distinct" if grouped == Grouped() else "groups of"
    fix = ", or take near duplicates for independent (--group own)" if grouped.by is Grouping.NEAR else ""
    benign_prompts = "prompts" if config.benign_only else "benign prompts"
    goal = f"a false positive rate of {config.target_fpr:.3g}"
    goal += f" with {CONFIDENCE:.0%} confidence" if config.rule == "binomial" else " on average"
    if config.benign_only:
        goal += f", if {config.contamination:.3g} of the prompts are attacks,"
    choosers = FEWEST_TO_CHOOSE if searches else 0
    if n_benign < need + choosers:
        more = f", and {choosers} more to choose what to detect by" if choosers else ""
        raise CalibrationError(
            f"{goal} needs at least {need} {kind} {benign_prompts} to set the threshold{more}; there are {n_benign}: "
            f"score more, or set a higher --target-fpr{fix}"
        )
    if not config.benign_only and not n_attack:
        raise CalibrationError("no row is labelled attack: label the rows and score them again, or give --benign-only")
    if not config.benign_only and searches and n_attack < FEWEST_TO_CHOOSE:
        raise CalibrationError(
            f"choosing what to detect by needs at least {FEWEST_TO_CHOOSE} distinct attacks, and there are {n_attack}: "
            "score more, or calibrate with --benign-only"
        )


@dataclass(frozen=True, slots=True)
class ComparisonSamples:
    """Attacks and benign prompts that are compared, in the order of their rows; arrays are [samples]."""

    row: Ints  # number of the row over all runs
    attack: Bools
    group: Ints
    fold: Ints
    n_folds: int
    set: Ints  # number of its run and system prompt, -1 beyond the largest 20
    sets: list[str]  # their names
    category: NDArray[np.str_]  # "" for none
    counts: dict[str, NDArray[np.int32]]  # as in Rows
    n_distinct: tuple[int, int]  # attacks and benign prompts that there were to draw from

    def __len__(self) -> int:
        return len(self.row)

    @property
    def hard(self) -> Bools:
        """Benign prompts that were written to look like attacks, by their category."""
        return ~self.attack & np.char.startswith(self.category, HARD)

    def other_folds(self, seed: int) -> Ints:
        """Another division into folds."""
        return assign_folds(self.attack, self.group, FOLDS, seed)[0]


def take_samples(runs: Sequence[ScoreRun], rows: Rows, seed: int, *, by_run: bool = False) -> ComparisonSamples:
    """The samples to compare, drawn at random if there are more than 10,000 of a class.

    by_run: take the same prompt in two runs for two samples (the runs are of different models). CalibrationError if a
    class is missing.
    """
    categories, sets, run = _read_sets(runs)
    key = np.unique(rows.prompt * len(runs) + run, return_inverse=True)[1] if by_run else rows.prompt
    order = np.random.default_rng(seed).permutation(int(key.max()) + 1)
    no_group = np.zeros(int(rows.group.max()) + 1, np.int64)
    drawn = [_distinct(replace(rows, prompt=key), rows.label == label, no_group, order) for label in (ATTACK, BENIGN)]
    for name, samples in zip(("attack", "benign"), drawn):
        if not len(samples.row):
            raise CalibrationError(
                f"no row is labelled {name}: a comparison takes attacks and benign prompts; label the rows and score "
                "them again"
            )
    row = np.sort(np.concatenate([samples.row[:_MOST_COMPARED] for samples in drawn]))
    attack = rows.label[row] == ATTACK
    group = np.unique(rows.group[row], return_inverse=True)[1].astype(np.int64)
    fold, n_folds = assign_folds(attack, group, FOLDS, seed)
    set_number, set_names = _number_sets(sets[row], runs)
    return ComparisonSamples(
        row=row,
        attack=attack,
        group=group,
        fold=fold,
        n_folds=n_folds,
        set=set_number,
        sets=set_names,
        category=categories[row],
        counts={name: values[row] for name, values in rows.counts.items()},
        n_distinct=(len(drawn[0].row), len(drawn[1].row)),
    )


def _read_sets(runs: Sequence[ScoreRun]) -> tuple[NDArray[np.str_], NDArray[np.str_], Ints]:
    """Of all rows: category, run and system prompt ("<run number> <hash>"), number of the run."""
    categories: list[str] = []
    sets: list[str] = []
    numbers: list[int] = []
    for number, run in enumerate(runs):
        for batch in run.batches(["category", "system_hash"]):
            categories += [text or "" for text in batch.column("category").to_pylist()]
            sets += [f"{number} {text}" for text in batch.column("system_hash").to_pylist()]
            numbers += [number] * batch.num_rows
    return np.array(categories, np.str_), np.array(sets, np.str_), np.array(numbers, np.int64)


def _number_sets(sets: NDArray[np.str_], runs: Sequence[ScoreRun]) -> tuple[Ints, list[str]]:
    """The largest sets' numbers from 0, in the order of the runs, -1 for the others; and their names."""
    distinct, index, n = np.unique(sets, return_inverse=True, return_counts=True)
    kept = np.sort(np.argsort(-n, kind="stable")[:_MOST_SETS])
    kept = kept[np.argsort([int(distinct[place].split()[0]) for place in kept], kind="stable")]
    number = np.full(len(distinct), -1)
    number[kept] = np.arange(len(kept))
    parts = [distinct[place].split() for place in kept]
    run_numbers = [int(run) for run, _ in parts]
    names = [
        Path(runs[run].name).name + (f", system prompt {text[:8]}" if run_numbers.count(run) > 1 else "")
        for run, (_, text) in zip(run_numbers, parts)
    ]
    return number[index].astype(np.int64), names


@dataclass(frozen=True, slots=True)
class _Distinct:
    """Samples of a class in the order in which they are drawn, groups together.

    Attributes:
        row, repeats: a row of each, and how many rows it stands for.
        first_of_group: whether it is the first of its group.
    """

    row: Ints
    repeats: Ints
    first_of_group: Bools

    def first(self, n: int) -> _Distinct:
        return _Distinct(self.row[:n], self.repeats[:n], self.first_of_group[:n])


def _distinct(rows: Rows, mask: Bools, order_of_group: Ints, order_of_prompt: Ints) -> _Distinct:
    """One sample for each prompt among the masked rows: its first row."""
    number = np.flatnonzero(mask)
    prompts, first, repeats = np.unique(rows.prompt[number], return_index=True, return_counts=True)
    group = rows.group[number[first]]
    order = np.lexsort((order_of_prompt[prompts], order_of_group[group]))
    ordered = group[order]
    first_of_group = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]
    return _Distinct(number[first][order], repeats[order], first_of_group)


def assign_folds(attack: Bools, group: Ints, most: int, seed: int) -> tuple[Ints, int]:
    """Each sample's fold, classes spread evenly and groups whole, and the number of folds.

    That is `most`, fewer if there are too few groups, and 1 if none can be held out.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    per_class = [len(np.unique(group[attack == label])) for label in (True, False) if (attack == label).any()]
    n_folds = min(most, *per_class, len(np.unique(group)))
    while n_folds > 1:
        fold = np.zeros(len(group), np.int64)
        splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
        for number, (_, held_out) in enumerate(splitter.split(group, attack, group)):
            fold[held_out] = number
        classes = [len(np.unique(attack[fold == number])) for number in range(n_folds)]
        if min(classes) == len(per_class):
            return fold, n_folds
        n_folds -= 1
    return np.zeros(len(group), np.int64), 1


def _tie_groups(group: Ints, category: NDArray[np.int32]) -> Ints:
    """Groups joined if they share a category, categories if they share a group."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    named = category >= 0
    n_groups = int(group.max()) + 1
    size = n_groups + int(category.max(initial=-1)) + 1
    edges = (np.ones(int(named.sum())), (group[named], n_groups + category[named]))
    return np.asarray(connected_components(coo_array(edges, shape=(size, size)), directed=False)[1][group], np.int64)


def _proportions(sizes: list[int], total: int) -> list[int]:
    """A total divided in proportion to sizes, whole numbers."""
    ends = np.floor(np.cumsum([0, *sizes]) * total / max(sum(sizes), 1)).astype(int)
    return [int(n) for n in np.diff(ends)]
