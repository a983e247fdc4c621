"""Numbers in words, never stronger than the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headrift.corpus.summary import SCORE, Comparison
from headrift.report.gather import Gathered
from headrift.report.measure import OfRun
from headrift.stats import TARGET_FPR, Bounds, Separation

_CONFOUNDS = ("prompt length", "answer length", "number of steps")
_ENDINGS = {"attack": "attacks", "benign": "benign prompts", "unlabelled": "rows without a label"}


def sentence(text: str) -> str:
    """A statement as a sentence of its own."""
    return text if not text else f"{text[0].upper()}{text[1:]}{'' if text[-1] in '.!?:' else '.'}"


def interval(of: Bounds | None, digits: int = 2) -> str:
    """An interval for a sentence or a table."""
    return "too few for an interval" if of is None else f"{of[0]:.{digits}f} to {of[1]:.{digits}f}"


def percents(of: Bounds | None) -> str:
    """An interval of fractions."""
    return "too few for an interval" if of is None else f"{of[0]:.0%} to {of[1]:.0%}"


def verdict(of: Bounds | None) -> str:
    """What an AUROC's interval allows to be said."""
    if of is None:
        return "there are too few prompts for an interval, so nothing can be concluded from it"
    if of[0] > 0.5:
        return "better than chance"
    if of[1] < 0.5:
        return "the wrong way round: attacks score lower"
    return "the interval includes chance, so these prompts do not show that the score tells them apart"


def summary(of: Gathered, runs: Sequence[OfRun]) -> list[str]:
    """The page's first sentences."""
    found = [_what_there_is(of)]
    comparisons = of.summary.comparisons()
    if not comparisons:
        missing = " and ".join(_ENDINGS[label] for label in ("attack", "benign") if label not in of.classes)
        found.append(
            f"There are no {missing} here, so nothing can be said of how well the score tells attacks from benign "
            "prompts; what follows shows how the scores are spread and which rows stand out."
        )
    else:
        found += _separation(comparisons, of.summary.sampled)
        found += _confounds(comparisons[0])
    found.append(_endings(of))
    found += _of_runs(runs)
    return found


def _what_there_is(of: Gathered) -> str:
    by_class = of.summary.by_class()
    counts = [f"{by_class[label]['n']:,} {_ENDINGS[label]}" for label in of.classes]
    systems = "" if len(of.runs) == 1 else f" from {len(of.runs)} runs"
    rejected = of.summary.rejects.total()
    more = f" {rejected:,} further rows could not be scored and were rejected." if rejected else ""
    return (
        f"{_listed(counts)}{systems}, answered by "
        f"{of.runs[0].model.name} ({of.runs[0].model.dtype}); the score is the mean instability over steps "
        f"{of.cell.window} of the answer and layers {of.layers[0]} to {of.layers[1] - 1}.{more}"
    )


def _separation(comparisons: Sequence[Comparison], sampled: str) -> list[str]:
    score = comparisons[0].measures[SCORE]
    n_attack, n_benign = comparisons[0].n_attack, comparisons[0].n_benign
    found = [
        f"Of an attack and a benign prompt drawn at random, the attack has the higher score in {score.auroc:.0%} of "
        f"cases (95% interval {percents(score.auroc_interval)}; chance is 50%; {n_attack:,} distinct attacks, "
        f"{n_benign:,} distinct benign prompts{sampled}): {verdict(score.auroc_interval)}.",
        f"At a threshold that {TARGET_FPR:.0%} of these very benign prompts reach, {score.tpr:.0%} of the attacks are "
        f"found ({percents(score.tpr_interval)}); a threshold for other prompts needs `headrift calibrate`.",
    ]
    for other in comparisons[1:]:
        measured = other.measures[SCORE]
        found.append(
            f"Leaving out benign prompts that were made to be mistaken for attacks it is {measured.auroc:.0%} "
            f"({percents(measured.auroc_interval)}; {other.n_benign:,} benign prompts are left): "
            f"{verdict(measured.auroc_interval)}."
        )
    return found


def _confounds(of: Comparison) -> list[str]:
    """Whether something as plain as length does as well."""
    score = of.measures[SCORE]
    if score.auroc_interval is None:
        return []
    names = [name for name in _CONFOUNDS if name in of.measures]
    numbers = ", ".join(
        f"{name} {of.measures[name].auroc:.0%} ({percents(of.measures[name].auroc_interval)})" for name in names
    )
    text = f"The same count for numbers that have nothing to do with attention: {numbers}."
    as_good = [name for name in names if _may_do_as_well(of.measures[name], score)]
    if as_good and score.auroc_interval[0] > 0.5:
        text += (
            f" For {_listed(as_good)}, read the better way round, the interval overlaps the score's: it is not shown "
            "that the score does better."
        )
    return [text]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _may_do_as_well(other: Separation, score: Separation) -> bool:
    """Whether, read the better way round, the intervals overlap."""
    if other.auroc_interval is None or score.auroc_interval is None:
        return True
    return max(other.auroc_interval[1], 1 - other.auroc_interval[0]) >= score.auroc_interval[0]


def _endings(of: Gathered) -> str:
    by_class = of.summary.by_class()
    parts = [
        f"{_fraction(by_class[label], 'early')} of the {_ENDINGS[label]} (no score at all: "
        f"{1 - float(by_class[label]['coverage'] or 0):.1%})"
        for label in of.classes
    ]
    return (
        f"The answer ended inside the window for {_listed(parts)}; a row without a score is never flagged and "
        "ranks below all others."
    )


def _fraction(numbers: Mapping[str, float | int | None], key: str) -> str:
    return f"{float(numbers[key] or 0):.1%}"


def _of_runs(runs: Sequence[OfRun]) -> list[str]:
    """In how many of several runs the score separates."""
    measured = [(run.name, run.score.auroc_interval) for run in runs if run.score is not None]
    if len(runs) < 2 or not measured:
        return []
    above = [name for name, of in measured if of and of[0] > 0.5]
    below = [name for name, of in measured if of and of[1] < 0.5]
    text = f"Taken one by one, {len(above)} of {len(measured)} runs have an interval above chance"
    text += f" ({', '.join(above)})" if above else ""
    text += f", and {len(below)} below it ({', '.join(below)})" if below else ""
    return [f"{text}. Where several runs are looked at, some differ by luck alone."]
