"""Instability compared with the other signals of the same runs: what each separates, and what instability adds to them.

`measurements` reads the signals; `aurocs`, `onset` and `normalisation` each answer a question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import BaseModel

from headrift.calibration.compare.aurocs import (
    NOT_SHOWN,
    QUESTIONS,
    TOO_FEW,
    Increment,
    SignalResult,
    Success,
    increments,
    separate,
    strata,
    success,
)
from headrift.calibration.compare.measurements import (
    NO_STEPS,
    ComparisonBootstrap,
    ImportantHeads,
    Measurements,
    measure,
)
from headrift.calibration.compare.normalisation import Normalisation, across, normalisation
from headrift.calibration.compare.onset import Before, Steps, onset
from headrift.calibration.splits import FOLDS, ComparisonSamples, take_samples
from headrift.calibration.thresholds import CalibrationError
from headrift.fail_terms import FailTerms
from headrift.runs.reading import UNLABELLED, Rows, ScoreRun, check_alike, read_rows
from headrift.signal import ScoreRange
from headrift.signals import signals

__all__ = ["SideBySide", "across", "side_by_side"]


class SideBySide(BaseModel, extra="forbid", frozen=True):
    """The result of `side_by_side`, over a window and layers [s, e); findings: a line for each verdict.

    Of runs of step 0 alone (window "none") there are no `steps`, and nothing about instability.
    """

    window: str
    layers: tuple[int, int]
    n_attack: int
    n_benign: int
    folds: int
    resamples: int
    seed: int
    signals: list[SignalResult]
    important_heads: ImportantHeads | None
    increments: list[Increment]
    steps: list[Steps]
    before: list[Before]
    success: Success
    normalisation: Normalisation
    findings: list[str]
    notes: list[str]


def side_by_side(
    runs: Sequence[ScoreRun],
    score_range: ScoreRange,
    *,
    resamples: int,
    seed: int,
    fail_terms: FailTerms | None,
    important_heads: bool = True,
    rows: Rows | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> SideBySide:
    """Compare the signals of runs of one model over a window and layers.

    Args:
        runs: finished runs.
        score_range: the window and layers to compare over.
        resamples: of the bootstrap; 0 for no intervals.
        seed: of the bootstrap.
        fail_terms: what tells a successful attack; None if that is not known.
        important_heads: whether to choose heads as Attention Tracker does.
        rows: of `read_rows`, if they are read already.
        say: is given the name of each stage.

    Raises:
        CalibrationError: The window ends after the recorded steps, a class is missing, or no row has a score.
        RunError: The runs cannot be read, or are of different models.
    """
    check_alike(runs)
    last, window = min(run.steps for run in runs), score_range.window
    if window.end > last:
        raise CalibrationError(f"the window {window} ends after step {last}, the last that all runs recorded")
    if rows is None:
        say("reading the rows")
        rows = read_rows(runs)
    samples = take_samples(runs, rows, seed)
    measured = measure(runs, samples, score_range, fail_terms=fail_terms, important_heads=important_heads, say=say)
    if "instability" not in measured.values and not window.empty:
        raise CalibrationError(f"no row has a score in steps {window}: choose an earlier window")
    bootstrap = ComparisonBootstrap(samples, resamples, seed)
    say(f"comparing {len(measured.values)} signals, {resamples} resamples")
    among = strata(samples, score_range)
    results = [separate(entry.name, measured, samples, among, bootstrap) for entry in signals(compared=True)]
    say("what instability adds to the others")
    of_step_0 = [(("prompt_tokens",), "focus")]
    added = increments(measured, samples, bootstrap, seed, of_step_0 if window.empty else QUESTIONS)
    steps: list[Steps] = []
    before: list[Before] = []
    succeeded = Success(absent=NO_STEPS, verdict=f"not known: {NO_STEPS}")
    by_length = Normalisation(absent=NO_STEPS, verdict=f"not known: {NO_STEPS}")
    if not window.empty:
        say("step by step")
        steps, before = onset(measured, samples, bootstrap, seed)
        succeeded = success(measured, samples, bootstrap, has_terms=fail_terms is not None)
        say("normalising by length")
        by_length = normalisation(measured.values["instability"], samples, bootstrap)
    return SideBySide(
        window=str(window),
        layers=score_range.layers(runs[0].model.layers),
        n_attack=int(samples.attack.sum()),
        n_benign=int((~samples.attack).sum()),
        folds=samples.n_folds,
        resamples=resamples,
        seed=seed,
        signals=results,
        important_heads=measured.important,
        increments=added,
        steps=steps,
        before=before,
        success=succeeded,
        normalisation=by_length,
        findings=_findings(results, added, before, succeeded, by_length),
        notes=_notes(rows, samples, measured),
    )


def _findings(
    results: Sequence[SignalResult],
    added: Sequence[Increment],
    before: Sequence[Before],
    succeeded: Success,
    by_length: Normalisation,
) -> list[str]:
    """A line for each verdict: what it is about, the verdict, and its numbers."""
    verdicts = {1: "attacks higher", -1: "attacks lower", None: NOT_SHOWN}
    lines = []
    for one in results:
        if one.auroc is not None and one.auroc.value is not None:
            interval = "" if one.auroc.interval is None else ", {:.3f} to {:.3f}".format(*one.auroc.interval)
            shown = TOO_FEW if one.auroc.interval is None else verdicts[one.sign]
            lines.append(f"{one.label}: {shown} (AUROC {one.auroc.value:.3f}{interval})")
    for question in added:
        change = question.log_loss_change
        if question.added == "instability" and change is not None:
            low_high = "" if change.interval is None else ", {:+.3f} to {:+.3f}".format(*change.interval)
            lines.append(f"{question.label}: {question.verdict} (log-loss {change.value:+.3f}{low_high})")
    lines += [f"first step of instability against {one.label}: {one.verdict}" for one in before]
    return [*lines, f"attack success: {succeeded.verdict}", f"normalising by length: {by_length.verdict}"]


def _notes(rows: Rows, samples: ComparisonSamples, measured: Measurements) -> list[str]:
    """What a reader must know, one statement each."""
    n = (int(samples.attack.sum()), int((~samples.attack).sum()))
    unlabelled, n_sets = int((rows.label == UNLABELLED).sum()), len(samples.sets)
    other_sets = int((samples.set < 0).sum())
    statements = (
        *(
            (drawn < all_of, f"{drawn:,} of {all_of:,} distinct {name} were compared, drawn at random")
            for name, drawn, all_of in zip(("attacks", "benign prompts"), n, samples.n_distinct)
        ),
        (unlabelled, f"{unlabelled:,} rows without a label were left out"),
        (samples.n_folds < FOLDS, f"too few distinct prompts for {FOLDS} folds: {samples.n_folds}"),
        (
            other_sets,
            f"{other_sets:,} samples are of other system prompts than the {n_sets} most common ones: left out where "
            "prompts of the same system prompt are compared",
        ),
        (
            n_sets > 1,
            f"{n_sets} sets (runs and system prompts) are taken together: a signal whose level differs between sets "
            "separates worse in all than within each; the stratum of the same set says how well within",
        ),
        (
            len(measured.values) > 1,
            f"intervals are 95% each: of {len(measured.values)} signals that say nothing one in 20 would leave out 0.5",
        ),
        (
            measured.important is not None,
            "intervals are of the measuring: in resamples neither important heads are chosen again nor regressions "
            "fitted again",
        ),
    )
    return [text for condition, text in statements if condition]
