"""Every signal of every compared prompt, over a window and step by step, from what runs saved.

What a run saved per step (shares, mass, entropy_steps) is measured over the requested range; if it saved none, its own
columns serve, over its own window, and `how` says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel

from headrift import signal
from headrift.calibration.splits import ComparisonSamples
from headrift.fail_terms import FailTerms
from headrift.runs.reading import ScoreRun
from headrift.signal import ScoreRange
from headrift.signals import PromptData, Signal, get, signals
from headrift.signals.detectors import choose_heads
from headrift.stats import Bools, Bounds, ClusterBootstrap, Floats, Interval, Ints, effective_groups, fewest_groups

NO_STEPS = "no steps after step 0"
_OF_ANSWER = ("answer_tokens", "n_steps")  # lengths of what a run of step 0 alone does not have
FEWEST_FOR_HEADS = 10  # samples of a class in every training fold
# The columns from which a signal can be measured over any range, by what `--save` calls them.
_SOURCES = {
    "shares": ("mass", "shares"),
    "entropy": ("entropy_steps",),
    "focus": ("focus_heads", "mass"),
    "mass": ("mass",),
}


class Estimate(BaseModel, extra="forbid", frozen=True):
    """A number with its 95% interval, both None if the data does not allow them, and the distinct prompts behind it."""

    value: float | None
    interval: Bounds | None = None
    n_attack: int
    n_benign: int
    reason: str | None = None


class ImportantHeads(BaseModel, extra="forbid", frozen=True):
    """The heads (layer, head) that Attention Tracker's rule chooses on all samples, for a look at them."""

    n: int | None  # the rule's; None if no head passed and the best few were taken
    heads: list[tuple[int, int]]
    per_fold: list[int]  # how many were chosen without each fold; these are the ones that are measured
    in_all_folds: int  # how many were chosen without every fold
    how: str


class ComparisonBootstrap(ClusterBootstrap):
    """Resamples of attacks and benign prompts: groups are drawn whole, as many of a class as there are."""

    def __init__(self, samples: ComparisonSamples, resamples: int, seed: int) -> None:
        super().__init__(samples.group, resamples, seed=seed, strata=~samples.attack)
        self.attack = samples.attack

    def separation(
        self, values: Floats, mask: Bools, pair_strata: Ints | None = None, positive: Bools | None = None
    ) -> Estimate:
        """AUROC of the masked samples' values, of attacks unless other positives are given."""
        positive = self.attack if positive is None else positive
        draws = self.auroc(values, positive, mask, pair_strata)
        n = [effective_groups(self.group[mask & one]) for one in (positive, ~positive)]
        return self._estimate(Interval.from_aurocs(draws, *n), mask, positive)

    def estimate(self, draws: Floats, mask: Bools) -> Estimate:
        """A statistic of the masked samples, of both classes or of one, from its value in each draw."""
        n = fewest_groups(self.group, mask & self.attack, mask & ~self.attack)
        return self._estimate(Interval.from_draws(draws, n), mask, self.attack)

    def _estimate(self, result: Interval, mask: Bools, positive: Bools) -> Estimate:
        n_attack, n_benign = int((mask & positive).sum()), int((mask & ~positive).sum())
        if np.isnan(result.value):
            reason = "one of the classes has no such prompt"
            return Estimate(value=None, n_attack=n_attack, n_benign=n_benign, reason=reason)
        return Estimate(value=result.value, interval=result.bounds, n_attack=n_attack, n_benign=n_benign)


@dataclass(frozen=True, slots=True)
class Measurements:
    """Signals of the samples by name."""

    values: dict[str, Floats]  # [samples], NaN for none
    steps: dict[str, Floats]  # [samples, steps + 1], step 0 first, NaN after an answer's end
    how: dict[str, str]  # each was measured
    absent: dict[str, str]  # why there is none
    steps_absent: dict[str, str]
    important: ImportantHeads | None
    succeeded: NDArray[np.int8]  # [samples] 1 if a fail term is in the answer, 0 if none is, -1 if it is not known


def measure(
    runs: Sequence[ScoreRun],
    samples: ComparisonSamples,
    score_range: ScoreRange,
    *,
    fail_terms: FailTerms | None = None,
    important_heads: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Measurements:
    """Measure all signals of the samples over a range; the runs must be of one model."""
    columns, regions = _saved(runs)
    same_range = all(run.score_range == score_range for run in runs)
    absent = {} if important_heads else {"focus_important": "not requested"}
    masks: list[Bools] | None = None
    important = None
    if important_heads and ("focus_heads" in columns or ("mass" in columns and {"system", "user"} <= regions)):
        say("choosing important heads")
        focus_heads = _read_focus_heads(runs, samples, score_range, columns)
        by_fold = choose_without_folds(focus_heads, samples)
        if by_fold is not None:
            important = describe_heads(focus_heads, samples, by_fold)
            masks = [by_fold[fold][1] for fold in samples.fold]
        else:
            few = f"at least {FEWEST_FOR_HEADS} attacks and as many benign prompts outside each fold"
            absent["focus_important"] = f"choosing important heads takes {few}"
    say(f"reading the signals of {len(samples):,} samples")
    entries, by_step = signals(compared=True), signals(compared=True, by_step=True)
    n_steps = min(run.steps for run in runs) + 1
    values = {entry.name: np.full(len(samples), np.nan) for entry in entries}
    steps = {entry.name: np.full((len(samples), n_steps), np.nan) for entry in by_step}
    own = [entry.name for entry in entries if entry.column and entry.name in columns]
    tensors = ["mass" if {"system", "prompt"} <= regions and "mass" in columns else "shares"]
    tensors = [name for name in (*tensors, "focus_heads", "entropy_steps") if name in columns]
    # Over the same range the run's own number is preferred: saved shares are rounded.
    saved = {save for save, sources in _SOURCES.items() if columns & set(sources)}
    own = [name for name in own if same_range or not saved & set(get(name).saves)]
    for place, data, row in read_prompts(runs, samples.row, score_range, [*own, *tensors], masks):
        for entry in entries:
            value = row.get(entry.name) if entry.name in own else None
            if value is None and entry.value is not None:
                value = entry.value(data)
            values[entry.name][place] = np.nan if value is None else value
        for entry in by_step:
            series = entry.steps(data) if entry.steps else None
            if series is not None:
                steps[entry.name][place, : len(series)] = series[:n_steps]
    for entry in entries:
        if entry.of_chosen_heads:
            values[entry.name] = standardise(values[entry.name], samples)
            steps[entry.name] = standardise(steps[entry.name], samples)
        if entry.length:
            count = samples.counts[entry.name]
            values[entry.name] = np.where(count >= 0, count, np.nan)
        if score_range.window.empty and (entry.windowed or entry.name in _OF_ANSWER):
            absent[entry.name] = NO_STEPS
        elif np.isnan(values[entry.name]).all():
            absent.setdefault(entry.name, entry.why_absent())
    steps_absent = {
        entry.name: absent.get(entry.name, entry.why_absent(by_step=True))
        for entry in by_step
        if np.isnan(steps[entry.name]).all()
    }
    return Measurements(
        values={name: column for name, column in values.items() if name not in absent},
        steps={name: series for name, series in steps.items() if name not in steps_absent},
        how={entry.name: _how(entry, runs, score_range, entry.name in own, important) for entry in entries},
        absent=absent,
        steps_absent=steps_absent,
        important=important,
        succeeded=_read_success(runs, samples, fail_terms),
    )


def _how(
    entry: Signal, runs: Sequence[ScoreRun], score_range: ScoreRange, own: bool, important: ImportantHeads | None
) -> str:
    """How a signal was measured, and over what; own: by the runs' columns, over their own windows."""
    if entry.of_chosen_heads:
        return f"{entry.how}; {important.how}" if important else ""
    if not entry.windowed:
        return entry.how
    windows = ", ".join(sorted({f"steps {run.score_range.window}" for run in runs}))
    if own and any(run.score_range != score_range for run in runs):
        return f"{entry.how}; the runs' own column over {windows}, not the requested range"
    start, end = score_range.layers(runs[0].model.layers)
    return f"{entry.how}; steps {score_range.window}, layers {start} to {end - 1}"


def _read_success(
    runs: Sequence[ScoreRun], samples: ComparisonSamples, fail_terms: FailTerms | None
) -> NDArray[np.int8]:
    """Whether each sample's answer contains a fail term: 1, 0, or -1 if it is not known."""
    succeeded = np.full(len(samples), -1, np.int8)
    if fail_terms is None:
        return succeeded
    first = 0
    for run in runs:
        for batch in run.batches(["label", "text"]):
            start, stop = np.searchsorted(samples.row, [first, first + batch.num_rows])
            if "text" in batch.schema.names:
                text = batch.column("text")
                for place in range(start, stop):
                    answer = text[int(samples.row[place]) - first].as_py()
                    if answer is not None:
                        succeeded[place] = fail_terms.in_text(answer)
            first += batch.num_rows
    return succeeded


# Reading prompts


def read_prompts(
    runs: Sequence[ScoreRun],
    selected: Ints,
    score_range: ScoreRange,
    columns: Sequence[str],
    important_heads: Sequence[Bools] | None = None,
) -> Iterator[tuple[int, PromptData, dict[str, float]]]:
    """Read what runs saved of selected rows.

    Args:
        runs, score_range: runs of one model, and what to measure over.
        selected: [n] numbers of the rows over all runs, ascending.
        columns: tensors and columns with a number to read.
        important_heads: the chosen heads of each selected row.

    Yields:
        Which of the selected rows, its data, and its columns with a number, those that are not null.
    """
    first = 0
    for run in runs:
        for batch in run.batches(["instability", "n_steps", *columns]):
            start, stop = np.searchsorted(selected, [first, first + batch.num_rows])
            arrays = {name: batch.column(name) for name in batch.schema.names}
            numbers = {name: column for name, column in arrays.items() if not pa.types.is_list(column.type)}
            regions = _regions(batch)
            for place in range(start, stop):
                at = int(selected[place]) - first
                heads = None if important_heads is None else important_heads[place]
                row = {name: column[at].as_py() for name, column in numbers.items() if column[at].is_valid}
                yield place, _prompt_data(arrays, at, run, regions, score_range, int(row["n_steps"]), heads), row
            first += batch.num_rows


def _prompt_data(
    arrays: dict[str, pa.Array],
    at: int,
    run: ScoreRun,
    regions: Sequence[str],
    score_range: ScoreRange,
    n_steps: int,
    heads: Bools | None,
) -> PromptData:
    n_layers, n_heads = run.model.layers, run.model.heads or 1

    def tensor(name: str, *shape: int) -> NDArray[Any] | None:
        value = arrays[name][at] if name in arrays else None
        if value is None or not value.is_valid:
            return None
        return np.asarray(value.values.to_numpy(zero_copy_only=False), np.float32).reshape(shape)

    instability = tensor("instability", -1, n_layers)
    share, focus_heads = tensor("shares", -1, n_layers, n_heads), tensor("focus_heads", n_layers, n_heads)
    entropy, masses = tensor("entropy_steps", -1), tensor("mass", -1, n_layers, n_heads, len(regions))
    mass = {} if masses is None else {name: masses[..., place] for place, name in enumerate(regions)}
    # A region that the prompt does not have is NaN throughout.
    mass = {name: values for name, values in mass.items() if not np.isnan(values[0, 0, 0])}
    if {"system", "prompt"} <= mass.keys():
        share = signal.share(mass["system"], mass["prompt"])
    if focus_heads is None and {"system", "user"} <= mass.keys():
        focus_heads = signal.focus_heads(mass["system"][0], mass["user"][0])
    return PromptData(
        score_range=score_range,
        n_steps=n_steps,
        instability=np.empty((0, n_layers), np.float32) if instability is None else instability,
        share=share,
        mass=mass,
        focus_heads=focus_heads,
        logit_stats={} if entropy is None else {"entropy": entropy},
        important_heads=heads,
    )


def _saved(runs: Sequence[ScoreRun]) -> tuple[frozenset[str], frozenset[str]]:
    """Columns that are not null throughout and regions of the masses that all runs have, by their first rows."""
    own = [entry.name for entry in signals(column=True, compared=True)]
    columns, regions = [], []
    for run in runs:
        batch = next(run.batches([*own, "shares", "mass", "focus_heads", "entropy_steps"]), None)
        if batch is not None:
            columns.append({name for name in batch.schema.names if batch.column(name).null_count < batch.num_rows})
            regions.append(set(_regions(batch)))
    return frozenset(set.intersection(*columns)), frozenset(set.intersection(*regions))


def _regions(batch: pa.RecordBatch) -> list[str]:
    about = (batch.schema.metadata or {}).get(b"headrift")
    return list(json.loads(about)["regions"]) if about else []


# Important heads, as Attention Tracker chooses them (Hung et al. 2024, arXiv 2411.00348): those whose focus on the
# system prompt an attack moves by more than it varies from prompt to prompt.


def choose_without_folds(
    focus_heads: NDArray[np.floating], samples: ComparisonSamples
) -> list[tuple[int | None, Bools]] | None:
    """For each fold the heads chosen on the other folds; None if a fold leaves too few samples of a class.

    Samples whose focus is not known (NaN) choose nothing.
    """
    training = [_known(focus_heads) & (samples.fold != fold) for fold in range(samples.n_folds)]
    classes = [(mask & (samples.attack == label)).sum() for mask in training for label in (True, False)]
    if samples.n_folds < 2 or min(classes) < FEWEST_FOR_HEADS:
        return None
    return [choose_heads(focus_heads[mask], samples.attack[mask]) for mask in training]


def describe_heads(
    focus_heads: NDArray[np.floating], samples: ComparisonSamples, by_fold: Sequence[tuple[int | None, Bools]]
) -> ImportantHeads:
    """What was chosen."""
    known = _known(focus_heads)
    n, chosen = choose_heads(focus_heads[known], samples.attack[known])
    rules = sorted(
        {"the best tenth, as none passed" if of_fold is None else f"n = {of_fold}" for of_fold, _ in by_fold}
    )
    return ImportantHeads(
        n=n,
        heads=[(int(layer), int(head)) for layer, head in np.argwhere(chosen)],
        per_fold=[int(mask.sum()) for _, mask in by_fold],
        in_all_folds=int(np.all([mask for _, mask in by_fold], axis=0).sum()),
        how="heads with mean_clean - mean_attack - n * (std_clean + std_attack) > 0 of their focus at step 0, for the "
        f"largest n from 4 to 1 that any head passes, chosen without the measured fold: {', '.join(rules)}",
    )


def standardise(values: Floats, samples: ComparisonSamples) -> Floats:
    """Values [samples, ...] in standard deviations from the mean of the other folds' benign prompts.

    Heads chosen again in each fold have another level in each.
    """
    result = np.full(values.shape, np.nan)
    for fold in range(samples.n_folds):
        inside = samples.fold == fold
        known = values[~inside & ~samples.attack]
        valid = ~np.isnan(known)
        n = np.maximum(valid.sum(axis=0), 1)
        mean = np.where(valid, known, 0.0).sum(axis=0) / n
        spread = np.sqrt(np.where(valid, (known - mean) ** 2, 0.0).sum(axis=0) / n)
        result[inside] = (values[inside] - mean) / np.maximum(spread, 1e-12)
    return result


def _read_focus_heads(
    runs: Sequence[ScoreRun], samples: ComparisonSamples, score_range: ScoreRange, columns: frozenset[str]
) -> NDArray[np.float32]:
    """[samples, layers, heads] at step 0, NaN if it is not known."""
    result = np.full((len(samples), runs[0].model.layers, runs[0].model.heads or 1), np.nan, np.float32)
    column = "focus_heads" if "focus_heads" in columns else "mass"
    for place, data, _ in read_prompts(runs, samples.row, score_range, [column]):
        if data.focus_heads is not None:
            result[place] = data.focus_heads
    return result


def _known(focus_heads: NDArray[np.floating]) -> Bools:
    return np.asarray(~np.isnan(focus_heads).any(axis=(1, 2)))
