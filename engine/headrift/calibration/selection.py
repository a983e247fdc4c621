"""Which signal tells attacks best: all of them learned on the same folds and measured on what they have not seen.

A contender learns a detector from samples that may choose (attacks, and part A of the benign prompts). The one with the
highest lower bound of its held-out AUROC is taken, or a simpler one whose bound is within half a standard error of it.
The figures of that choice are nested: for each fold it is made again without the fold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from headrift.calibration.search import Search, SumTable, standard_error
from headrift.calibration.splits import CalibrationSamples, assign_folds
from headrift.signal import ScoreRange
from headrift.signals import Signal, get, signals
from headrift.signals.detectors import AnyDetector, Directed, NotEnoughError, Readout, Training, direction_of
from headrift.signals.features import Prompts
from headrift.stats import Bools, ClusterBootstrap, Floats, Ints

INNER_FOLDS = 4
FEWEST_SOURCES, MOST_SOURCES = 3, 20  # of which each is left out whole; more are files of a log and not kinds of attack
WORDS, LENGTH = "words", "prompt_tokens"  # what every signal has to beat
_TOLERANCE = 0.5  # standard errors that a simpler signal may be behind
_Z = 1.96
_ORDER = ("values", "focus_heads", "logit_shares")  # from simple to less so
_KEPT_RANGES = 64  # whose scores are kept over resamples
_WORD_PENALTY = 10.0  # C of the words' regression


@dataclass(frozen=True, slots=True)
class Learned:
    """A detector, its values of all samples [samples], and the range it is measured over."""

    detector: AnyDetector
    values: Floats
    score_range: ScoreRange


class Contender(Protocol):
    """A signal that may be chosen. `learn` may raise NotEnoughError."""

    @property
    def entry(self) -> Signal:
        """The signal."""

    def learn(self, train: Ints) -> Learned:
        """Learn from the samples with these numbers."""

    def learn_without(self, train: Ints, fold: Ints) -> list[Learned]:
        """Learn from samples [n] without each of their folds [n], from 0."""


@dataclass(frozen=True, slots=True)
class OfSignal:
    """A signal whose detector is learned from what was recorded, or is a readout of an earlier calibration."""

    entry: Signal
    samples: CalibrationSamples
    prompts: Prompts  # of all samples
    score_range: ScoreRange
    seed: int
    windowed: bool = False
    readout: Readout | None = None  # nothing is learned
    own_normal: bool = False  # standardise each source by its own benign samples that choose

    def learn(self, train: Ints) -> Learned:
        """Learn from the samples with these numbers."""
        samples = self.samples
        detector: AnyDetector
        if self.readout is None:
            training = Training(
                self.prompts.take(train),
                samples.attack[train],
                samples.source[train],
                inner_folds(samples, train, self.seed),
                self.windowed,
                self.own_normal,
            )
            detector = self.entry.detector(training)
        else:
            detector = self.readout
        return Learned(detector, self._values(detector), self.score_range)

    def learn_without(self, train: Ints, fold: Ints) -> list[Learned]:
        """Learn from samples [n] without each of their folds [n], from 0."""
        n_folds = int(fold.max()) + 1
        if self.readout is not None:
            return [self.learn(train)] * n_folds
        return [self.learn(train[fold != number]) for number in range(n_folds)]

    def _values(self, detector: AnyDetector) -> Floats:
        if not (self.own_normal and isinstance(detector, Readout)):
            return detector.values(self.prompts)
        values = np.full(len(self.prompts), np.nan)
        normal = np.flatnonzero(self.samples.chooses & ~self.samples.attack)
        for number in np.unique(self.samples.source):
            own = np.flatnonzero(self.samples.source == number)
            moments_of = normal[self.samples.source[normal] == number]
            try:
                of_source = detector.with_normal(self.prompts.take(moments_of))
            except NotEnoughError:
                of_source = detector
            values[own] = of_source.values(self.prompts.take(own))
        return values


class OfInstability:
    """Instability over the window and layers that tell attacks best, in the direction of the widest window."""

    def __init__(
        self, sums: SumTable, candidates: Sequence[ScoreRange], samples: CalibrationSamples, seed: int
    ) -> None:
        self.entry = get("instability")
        self._candidates, self._samples, self._seed = list(candidates), samples, seed
        self._sums = {1: sums}
        # The widest window tells the direction: of a narrow one it is often chance.
        self._own = sums.scores(max(self._candidates, key=lambda one: one.window.end - one.window.start))

    def learn(self, train: Ints) -> Learned:
        """Learn from the samples with these numbers."""
        return self._learn(train, np.zeros(len(train), np.int64), 1)[-1]

    def learn_without(self, train: Ints, fold: Ints) -> list[Learned]:
        """Learn from samples [n] without each of their folds [n], from 0."""
        return self._learn(train, fold, int(fold.max()) + 1)[:-1]

    def redo(self, train: Ints, fold: Ints, learned: Sequence[Learned]) -> Callable[[Ints], list[Floats]]:
        """A function of how often each sample counts [samples]: searches again, gives values without each fold."""
        directions = [one.detector.direction for one in learned if isinstance(one.detector, Directed)]
        searches = {one: self.search(train, fold, len(learned), one) for one in set(directions)}
        values = lru_cache(_KEPT_RANGES)(lambda direction, chosen: self.sums(direction).scores(chosen))

        def choose(times: Ints) -> list[Floats]:
            ranges = {one: search.best(times[train]) for one, search in searches.items()}
            return [values(one, ranges[one][place]) for place, one in enumerate(directions)]

        return choose

    def search(self, train: Ints, fold: Ints, n_folds: int, direction: int) -> Search:
        """Candidates compared on the samples."""
        return Search(self.sums(direction).select(train), self._candidates, self._samples.attack[train], fold, n_folds)

    def sums(self, direction: int) -> SumTable:
        """Of all samples, with the sign of the direction."""
        if direction not in self._sums:
            self._sums[direction] = self._sums[1].negated()
        return self._sums[direction]

    def _learn(self, train: Ints, fold: Ints, n_folds: int) -> list[Learned]:
        """Without each fold, then on all."""
        without = [train[fold != number] for number in range(n_folds)] if n_folds > 1 else [train]
        directions = [direction_of(self._own[part], self._samples.attack[part]) for part in [*without, train]]
        if len(self._candidates) == 1:
            ranges = dict.fromkeys(set(directions), self._candidates * (n_folds + 1))
        else:
            times = np.ones(len(train), np.int64)
            ranges = {one: self.search(train, fold, n_folds, one).best(times) for one in set(directions)}
        return [
            Learned(Directed(signal="instability", direction=one), self.sums(one).scores(chosen), chosen)
            for place, one in enumerate(directions)
            for chosen in [ranges[one][place]]
        ]


def contenders(
    names: Iterable[str] | None, absent: Callable[[Signal], str | None]
) -> tuple[list[Signal], dict[str, str]]:
    """The signals to compare, simple ones first, and why others cannot be."""
    named = [entry for entry in signals() if entry.detects and (names is None or entry.name in names)]
    reasons = {entry.name: why for entry in named if (why := absent(entry)) is not None}
    usable = [entry for entry in named if entry.name not in reasons]
    return sorted(usable, key=lambda entry: _ORDER.index(entry.reads)), reasons


def inner_folds(samples: CalibrationSamples, train: Ints, seed: int) -> Ints:
    """Folds of some samples that settings are chosen by: their sources, if there are 3 to 20."""
    sources, number = np.unique(samples.source[train], return_inverse=True)
    if FEWEST_SOURCES <= len(sources) <= MOST_SOURCES:
        return number.astype(np.int64)
    return assign_folds(samples.attack[train], samples.group[train], INNER_FOLDS, seed)[0]


def cross_learn(contender: Contender, samples: CalibrationSamples, choosers: Bools) -> list[Learned]:
    """Learn without each fold of the samples, and without the groups of its samples."""
    fold, numbers = samples.fold, range(samples.n_folds)
    apart = all(not np.isin(samples.group[fold == n], samples.group[fold != n]).any() for n in numbers)
    if apart:
        train = np.flatnonzero(choosers)
        return contender.learn_without(train, fold[train])
    learned = []
    for number in numbers:
        shared = np.isin(samples.group, samples.group[fold == number])
        learned.append(contender.learn(np.flatnonzero(choosers & ~shared)))
    return learned


def held_out(learned: Sequence[Learned], fold: Ints) -> Floats:
    """Each sample's value by the detector that was learned without its fold; NaN, no value, lowest."""
    values = np.stack([one.values for one in learned])[fold, np.arange(len(fold))]
    return np.where(np.isnan(values), -np.inf, values)


def auroc_draws(values: Floats, samples: CalibrationSamples, bootstrap: ClusterBootstrap) -> Floats:
    """Mean over the folds with both classes of the AUROC within a fold, of the data and of each resample."""
    return _within(values, samples.attack, samples.fold, bootstrap)


def _within(values: Floats, attack: Bools, fold: Ints, bootstrap: ClusterBootstrap) -> Floats:
    within = [bootstrap.auroc(values, attack, fold == number) for number in range(int(fold.max()) + 1)]
    known = [draws for draws in within if not np.isnan(draws[0])]
    if not known:
        return np.full(len(bootstrap.times), np.nan)
    stacked = np.array(known)
    n = np.maximum((~np.isnan(stacked)).sum(axis=0), 1)
    return np.nansum(stacked, axis=0) / n


def pick(aurocs: Mapping[str, tuple[float, float]]) -> str:
    """The signal of those in order from simple to less so; aurocs: lower bound and standard error of each."""
    best, spread = max(aurocs.values())
    return next(name for name, (low, _) in aurocs.items() if low >= best - _TOLERANCE * spread)


def pick_within(among: Mapping[str, Contender], samples: CalibrationSamples, choosers: Bools, seed: int) -> list[str]:
    """The signal that is chosen without each fold, by folds within the others."""
    chosen = []
    for number in range(samples.n_folds):
        train = np.flatnonzero(choosers & ~np.isin(samples.group, samples.group[samples.fold == number]))
        inner = inner_folds(samples, train, seed)
        attack = samples.attack[train]
        once = ClusterBootstrap(samples.group[train], 0)
        n_attack, n_benign = int(attack.sum()), int((~attack).sum())
        bounds = {}
        for name, contender in among.items():
            try:
                learned = contender.learn_without(train, inner)
            except NotEnoughError:
                continue
            values = held_out([Learned(one.detector, one.values[train], one.score_range) for one in learned], inner)
            auroc = float(_within(values, attack, inner, once)[0])
            if not np.isnan(auroc):
                spread = standard_error(auroc, n_attack, n_benign)
                bounds[name] = (auroc - _Z * spread, spread)
        chosen.append(pick(bounds) if bounds else next(iter(among)))
    return chosen


def learn_words(texts: Sequence[str], attack: Bools) -> Callable[[Sequence[str]], Floats]:
    """Fit log-odds of an attack to the words of prompts (TF-IDF of words and of letters); a function of other texts.

    Raises:
        NotEnoughError: The prompts have no words, or are all of one class.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    if attack.all() or not attack.any():
        raise NotEnoughError("the prompts are all of one class")
    model = make_pipeline(
        make_union(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=100_000),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, max_features=50_000),
        ),
        LogisticRegression(C=_WORD_PENALTY, class_weight="balanced", max_iter=500),
    )
    try:
        model.fit(texts, attack)
    except ValueError as error:
        raise NotEnoughError("the prompts have no words") from error
    return lambda others: np.asarray(model.decision_function(others), np.float64)


def words_held_out(texts: Sequence[str], samples: CalibrationSamples, choosers: Bools) -> Floats:
    """What the words of each prompt say of it, learned without its fold; lowest if nothing can be learned."""
    values = np.full(len(texts), -np.inf)
    for number in range(samples.n_folds):
        inside = np.flatnonzero(samples.fold == number)
        train = np.flatnonzero(choosers & ~np.isin(samples.group, samples.group[inside]))
        with suppress(NotEnoughError):
            log_odds = learn_words([texts[place] for place in train], samples.attack[train])
            values[inside] = log_odds([texts[place] for place in inside])
    return values
