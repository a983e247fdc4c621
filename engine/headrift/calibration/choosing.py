"""The choice of what to detect by: what may be chosen, learned on all folds, compared, and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import numpy as np

from headrift.calibration import evidence
from headrift.calibration.artifact import Compared, Metric
from headrift.calibration.evidence import Choice
from headrift.calibration.search import SumTable, grid, standard_error
from headrift.calibration.selection import (
    FEWEST_SOURCES,
    LENGTH,
    MOST_SOURCES,
    WORDS,
    Contender,
    Learned,
    OfInstability,
    OfSignal,
    auroc_draws,
    contenders,
    cross_learn,
    held_out,
    pick,
    pick_within,
    words_held_out,
)
from headrift.calibration.splits import CalibrationSamples, divide
from headrift.calibration.thresholds import CalibrateConfig, CalibrationError
from headrift.runs.detector_input import NOT_KEPT, detector_values, read_prompts, read_selected, read_texts
from headrift.runs.reading import Rows, ScoreRun, exact_scores, read_instability
from headrift.signal import ScoreRange, Window
from headrift.signals import Signal, get, signals
from headrift.signals.detectors import Directed, NotEnoughError, Readout
from headrift.signals.features import Prompts
from headrift.stats import Bools, ClusterBootstrap, Floats, Interval, effective_groups

Say: TypeAlias = Callable[[str], None]
SHORT = {"agreement": "head_agreement"}  # shorter names of signals


class Choosing:
    """The choice of a signal: what may be chosen, learned on all folds, and what came of it.

    Attributes:
        comparison, left_out, notes: for the calibration; `choose` fills them in.
    """

    def __init__(
        self,
        runs: Sequence[ScoreRun],
        rows: Rows,
        config: CalibrateConfig,
        say: Say,
        readout: Readout | None,
        *,
        own_normal: bool,
    ) -> None:
        self._runs, self._rows, self._config, self._say = runs, rows, config, say
        self._readout, self._own_normal = readout, own_normal
        self.comparison: list[Compared] = []
        self.left_out: dict[str, Metric] = {}
        self.notes: list[str] = []
        self._steps = 0 if config.prefill_only else min(run.steps for run in runs)
        ranges = {run.score_range for run in runs}
        self._range = next(iter(ranges)) if len(ranges) == 1 else None
        self._ranges, self._no_instability = self._instability_ranges()
        self._entries, self._absent = contenders(self._names(), self._why_absent)
        if not self._entries:
            reasons = "; ".join(f"{get(name).label}: {why}" for name, why in self._absent.items())
            raise CalibrationError(f"no signal can be calibrated on ({reasons})")
        only_instability = [entry.name for entry in self._entries] == ["instability"]
        fixed = readout is not None and not own_normal
        self.n_candidates = len(self._ranges) if only_instability else 1 if fixed else max(len(self._ranges), 2)
        self.division = divide(rows, config, self.n_candidates)
        self.samples = self.division.samples

    def _names(self) -> set[str] | None:
        """The signals to compare; None for all."""
        name = SHORT.get(self._config.signal, self._config.signal)
        known = [entry.name for entry in signals() if entry.detects]
        if name not in ("auto", *known):
            raise CalibrationError(f"--signal {name}: no such signal; choose from auto, {', '.join(known)}")
        if self._readout is not None or self._own_normal:
            if name not in ("auto", "readout"):
                raise CalibrationError(f"--readout and --normal go with --signal readout, not with {name}")
            return {"readout"}
        if name == "auto" and self._config.window is not None:
            return {"instability"}  # the only one that is measured over a window of one's choice
        if name != "auto":
            return {name}
        if not self._config.benign_only:
            return None
        return {"novelty"} if self._why_absent(get("novelty")) is None else {"instability"}

    def _instability_ranges(self) -> tuple[list[ScoreRange], str | None]:
        """The windows and layers to choose from, or why there are none."""
        config = self._config
        if self._steps == 0:
            return [], "no steps after step 0"
        if not config.benign_only and config.window is None:
            return grid(self._steps, self._runs[0].model.layers), None
        own = {run.score_range for run in self._runs}
        if config.window is not None:
            own = {ScoreRange(config.window, one.drop_shallow, one.drop_deep) for one in own}
        if len(own) > 1:
            return [], (
                "the runs were scored over different windows or layers, and nothing here chooses between them: give "
                "runs that are alike, or the --window"
            )
        (only,) = own
        if only.window.end > self._steps:
            return [], f"--window {only.window} ends after step {self._steps}, the last that all runs recorded"
        return [only], None

    def _why_absent(self, entry: Signal) -> str | None:
        """Why a signal cannot be calibrated on, or None."""
        if entry.name == "instability":
            return self._no_instability
        if entry.windowed and not self._windowed:
            return "no steps after step 0" if self._steps == 0 else "the runs are of several windows"
        if entry.reads == "values":
            return None if entry.name in self._rows.signals else entry.why_absent()
        for run in self._runs:
            _, prompts = next(read_prompts([run], {entry.reads}))
            array = getattr(prompts, entry.reads)
            if array is None or np.isnan(array).all():
                return f"{run.name} has no {NOT_KEPT[entry.reads]}"
        return None

    @property
    def _windowed(self) -> bool:
        return self._steps > 0 and self._range is not None and not self._range.window.empty

    def _among(self) -> dict[str, Contender]:
        """What may be chosen, by name."""
        samples, config = self.samples, self._config
        among: dict[str, Contender] = {}
        reads = {entry.reads for entry in self._entries}
        self._say(f"reading {len(samples.row):,} samples")
        prompts = read_selected(self._runs, samples.row, reads)
        features_range = self._range or ScoreRange(Window(1, 0))
        at_step_0 = replace(features_range, window=Window(1, 0))
        for entry in self._entries:
            if entry.name == "instability":
                sums = SumTable(len(samples.row), self._steps, self._runs[0].model.layers)
                for which, block in read_instability(self._runs, samples.row, self._steps):
                    sums.put(which, block)
                among[entry.name] = OfInstability(sums, self._ranges, samples, config.seed)
                continue
            windowed = self._windowed if self._readout is None else self._readout.windowed
            of_window = entry.windowed or (entry.reads == "logit_shares" and windowed)
            among[entry.name] = OfSignal(
                entry,
                samples,
                prompts,
                features_range if of_window else at_step_0,
                config.seed,
                windowed and entry.reads == "logit_shares",
                self._readout,
                self._own_normal,
            )
        return among

    def choose(self) -> Choice:
        """Compare what may be chosen, and learn what is."""
        samples = self.samples
        among = self._among()
        # With a given window nothing is searched, and all samples serve to learn the direction.
        choosers = samples.chooses if samples.chooses.any() else np.ones(len(samples.row), np.bool_)
        folds = self._config.folds
        if samples.n_folds < folds and self._readout is None and any(one.entry.learn for one in among.values()):
            few = "nothing can be held out" if samples.n_folds == 1 else f"--folds {samples.n_folds} would do"
            raise CalibrationError(
                f"there are too few groups of prompts for {folds} folds with both classes in each ({few}): add prompts "
                "or give the rows groups of their own"
            )
        by_fold = self._learn(among, samples, choosers)
        left_out = samples.with_sources_left_out()
        by_source = self._learn(among, left_out, choosers) if self._leaves_sources_out(left_out) else {}
        chosen = self._compare(among, samples, by_fold, left_out, by_source, choosers)
        self._say(f"learning {get(chosen).label} on {int(choosers.sum()):,} samples")
        try:
            final = among[chosen].learn(np.flatnonzero(choosers))
        except NotEnoughError as error:
            raise CalibrationError(f"--signal {chosen}: {error}") from None
        metrics = self._metrics(among, chosen, samples, by_fold, choosers)
        if by_source:
            self.left_out = self._metrics(among, chosen, left_out, by_source, choosers)
        return self._choice(final, metrics)

    def _leaves_sources_out(self, left_out: CalibrationSamples) -> bool:
        """Whether whole sources can be left out. CalibrationError if no source has both classes."""
        n = left_out.n_folds
        if self._config.benign_only or not 2 <= n <= MOST_SOURCES:
            return False
        both = [len(np.unique(left_out.attack[left_out.fold == number])) == 2 for number in range(n)]
        names = ", ".join(self._rows.sources[:3]) + (", ..." if n > 3 else "")
        if not any(both) and n >= FEWEST_SOURCES:
            raise CalibrationError(
                f"every source ({names}) has one class alone: what tells the sources apart would be taken for what "
                "tells attacks; add benign prompts and attacks of the same source, or name it in the rows' `source_set`"
            )
        if not any(both):
            self.notes.append(
                f"attacks and benign prompts are of different sources ({names}): what tells the sources apart tells "
                "them apart too"
            )
        elif n >= FEWEST_SOURCES and sum(both) == 1:
            self.notes.append("one source alone has both classes: how a detector does on other sources is not known")
        return n >= FEWEST_SOURCES and sum(both) >= 2

    def _learn(
        self, among: dict[str, Contender], samples: CalibrationSamples, choosers: Bools
    ) -> dict[str, list[Learned]]:
        """Each contender learned without each fold; those that cannot are dropped."""
        learned = {}
        for name, contender in list(among.items()):
            if samples.n_folds > 1:
                self._say(f"{contender.entry.label}, without each {'source' if samples.by_source else 'fold'}")
                try:
                    learned[name] = cross_learn(contender, samples, choosers)
                except NotEnoughError as error:
                    self._absent[name] = str(error)
                    del among[name]
        if not among:
            raise CalibrationError(f"no signal can be calibrated on: {'; '.join(self._absent.values())}")
        return learned

    def _compare(
        self,
        among: dict[str, Contender],
        samples: CalibrationSamples,
        by_fold: dict[str, list[Learned]],
        left_out: CalibrationSamples,
        by_source: dict[str, list[Learned]],
        choosers: Bools,
    ) -> str:
        """Choose by the held-out AUROCs, and say what each has beside it; returns the name."""
        config = self._config
        if config.benign_only or samples.n_folds < 2:
            return next(iter(among))
        bootstrap = ClusterBootstrap(samples.group, config.resamples, seed=config.seed, strata=samples.stratum)
        baselines = self._baselines(samples, left_out if by_source else None, choosers)
        draws = {
            name: [
                None if values is None else auroc_draws(values, divided, bootstrap)
                for values, divided in ((inside, samples), (outside, left_out))
            ]
            for name, (inside, outside) in {
                **{
                    name: (
                        held_out(by_fold[name], samples.fold),
                        held_out(by_source[name], left_out.fold) if by_source else None,
                    )
                    for name in among
                },
                **baselines,
            }.items()
        }
        groups = [effective_groups(samples.group[mask]) for mask in (samples.attack, ~samples.attack)]

        def of_auroc(one: Floats) -> Interval:
            return Interval.from_aurocs(one, *groups)

        deciding = 1 if by_source else 0
        n_classes = int(samples.attack.sum()), int((~samples.attack).sum())
        bounds = {}
        for name in among:
            one = draws[name][deciding]
            assert one is not None
            interval, spread = of_auroc(one), standard_error(float(one[0]), *n_classes)
            bounds[name] = (float(one[0]) - 1.96 * spread if interval.low is None else interval.low, spread)
        chosen = pick(bounds)
        own = draws[chosen][deciding]
        how = "held out, mean within " + ("sources left out" if by_source else "folds")
        for name, (inside, outside) in draws.items():
            label = get(name).label if name != WORDS else "words (TF-IDF)"
            deciding_draws = (inside, outside)[deciding]
            difference = None
            if name != chosen and own is not None and deciding_draws is not None:
                interval = Interval.from_draws(own - deciding_draws, min(groups))
                difference = _metric(interval, "AUROC of the chosen signal less this one's, paired")
            self.comparison.append(
                Compared(
                    name=name,
                    label=label,
                    direction=_direction(by_fold.get(name, ())),
                    auroc=None if inside is None else _metric(of_auroc(inside), "held out, mean within folds"),
                    left_out=None if outside is None else _metric(of_auroc(outside), how),
                    difference=difference,
                )
            )
        absent = {**self._absent, **({} if WORDS in baselines else {WORDS: self._no_words})}
        for name, why in absent.items():
            label = "words (TF-IDF)" if name == WORDS else get(name).label
            self.comparison.append(Compared(name=name, label=label, absent=why))
        self.comparison.sort(key=lambda one: one.name != chosen)
        return chosen

    def _baselines(
        self, samples: CalibrationSamples, left_out: CalibrationSamples | None, choosers: Bools
    ) -> dict[str, tuple[Floats | None, Floats | None]]:
        """Held-out values of prompt length and words."""
        baselines: dict[str, tuple[Floats | None, Floats | None]] = {}
        divided = (samples, left_out)
        length = self._rows.counts[LENGTH][samples.row].astype(np.float64)
        prompts = Prompts({LENGTH: np.where(length >= 0, length, np.nan)}, np.ones(len(length)))
        contender = OfSignal(get(LENGTH), samples, prompts, ScoreRange(Window(1, 0)), self._config.seed)
        baselines[LENGTH] = tuple(  # type: ignore[assignment]
            None if one is None else held_out(cross_learn(contender, one, choosers), one.fold) for one in divided
        )
        self._no_words = ""
        texts = read_texts(self._runs, samples.row)
        if texts is None:
            self._no_words = "the runs saved no prompts: score with --save text"
            return baselines
        self._say("words")
        baselines[WORDS] = tuple(  # type: ignore[assignment]
            None if one is None else words_held_out(texts, one, choosers) for one in divided
        )
        return baselines

    def _metrics(
        self,
        among: dict[str, Contender],
        chosen: str,
        samples: CalibrationSamples,
        learned: dict[str, list[Learned]],
        choosers: Bools,
    ) -> dict[str, Metric]:
        """The held-out metrics of the whole procedure, the choice of the signal included."""
        config = self._config
        if samples.n_folds == 1:
            return {}
        self._say(f"cross-validating, {config.resamples} resamples")
        names, how = [chosen] * samples.n_folds, ""
        if len(among) > 1:
            names = pick_within(among, samples, choosers, config.seed)
            how = ", signal chosen without it"
        exact = self._exact([learned[name][number] for number, name in enumerate(names)])
        redo = None
        contender = among[chosen]
        if len(among) == 1 and isinstance(contender, OfInstability):
            train = np.flatnonzero(choosers)
            if not samples.by_source:
                redo = contender.redo(train, samples.fold[train], learned[chosen])
            how = ", window and layers chosen without it" if len(self._ranges) > 1 else ""
        return evidence.cross_validate(samples, exact, redo, config, how)

    def _exact(self, learned: Sequence[Learned]) -> list[Floats]:
        """Values of the samples; instability's by the definition, and not from sums."""
        ranges = {one.score_range: None for one in learned if _is_instability(one)}
        requests = [(one, self.samples.row) for one in ranges]
        scores = dict(zip(ranges, exact_scores(self._runs, self._rows, requests))) if requests else {}
        return [
            one.detector.direction * scores[one.score_range]  # type: ignore[union-attr]
            if _is_instability(one)
            else one.values
            for one in learned
        ]

    def _choice(self, final: Learned, metrics: Mapping[str, Metric]) -> Choice:
        """Values of all rows by the detector that was learned."""
        self._say(f"scoring {len(self._rows):,} rows")
        if not _is_instability(final):
            values = detector_values(self._runs, final.detector, len(self._rows))
            return Choice(final.detector, final.score_range, metrics, values)
        assert isinstance(final.detector, Directed)
        direction = final.detector.direction
        own = {run.score_range for run in self._runs}
        unsearched = list(own) if len(self._ranges) > 1 and len(own) == 1 and own != {final.score_range} else []
        requests = [(final.score_range, np.arange(len(self._rows))), *((one, self.samples.row) for one in unsearched)]
        scores, *own_scores = exact_scores(self._runs, self._rows, requests)
        choice = Choice(final.detector, final.score_range, metrics, direction * scores)
        if not unsearched:
            return choice
        return replace(choice, own_range=unsearched[0], own_scores=direction * own_scores[0])


def _is_instability(learned: Learned) -> bool:
    return isinstance(learned.detector, Directed) and learned.detector.signal == "instability"


def _direction(learned: Sequence[Learned]) -> Literal[1, -1] | None:
    """The direction that most folds learned; None of what has none."""
    directions = [one.detector.direction for one in learned if isinstance(one.detector, Directed)]
    return None if not directions else 1 if sum(directions) >= 0 else -1


def _metric(interval: Interval, how: str) -> Metric:
    return Metric(value=None if np.isnan(interval.value) else interval.value, interval=interval.bounds, how=how)
