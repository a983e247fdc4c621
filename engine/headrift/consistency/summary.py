"""Summary of scored pairs: flip rates, distances, and whether attention predicts which answers flip.

Intervals are 95% percentile intervals from resampling questions, with all their pairs. Rates have that of
`stats.rate_interval`, with the questions as groups.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrift.runs.folder import list_column
from headrift.stats import (
    Bools,
    ClusterBootstrap,
    Floats,
    Interval,
    Ints,
    effective_groups,
    rate_interval,
    separation,
    side,
)
from headrift.terminal import print_table

# What may predict that an answer flips, and its label. The wrapper's length is the baseline.
PREDICTORS = {
    "distance": "attention distance, TV",
    "core_mass_lost": "attention the core loses",
    "wrapped_instability": "instability, wrapped",
    "instability_change": "instability, wrapped - clean",
    "wrapped_focus": "focus, wrapped",
    "focus_change": "focus, wrapped - clean",
    "wrapper_tokens": "length of the wrapper",
}
# Means over all pairs and of each family: of values that are 0 or 1, but for the distance.
RATES = {
    "flipped": "answers that flip",
    "clean_right": "right, clean",
    "wrapped_right": "right, wrapped",
    "hinted": "the hinted wrong answer",
    "distance": "attention distance, TV",
}


def summarise(table: pa.Table, seed: int = 0) -> dict[str, Any]:
    """Summarise scored pairs (rows of `scoring.part_schema`) as plain values.

    `predicts_flips` has the AUROC of flipped against other pairs: below 0.5, flipped pairs have the lower values.
    `by_layer` has mean distances over steps, and masses at step 0.
    """
    values = _values(table)
    question = np.unique(np.array(table["question"].to_pylist()), return_inverse=True)[1]
    bootstrap = ClusterBootstrap(question, seed=seed)
    family = np.array(["" if name is None else name for name in table["family"].to_pylist()])
    masks = {name: family == name for name in dict.fromkeys(family.tolist()) if name}
    every = np.ones(len(question), np.bool_)

    def rates(mask: Bools) -> dict[str, Any]:
        return {
            name: mean_estimate(bootstrap, values[name], question, mask, is_rate=name != "distance") for name in RATES
        }

    return {
        "questions": int(question.max()) + 1,
        "pairs": len(question),
        "predicts_flips": {name: _predict(values[name], values["flipped"], question, seed) for name in PREDICTORS},
        "all": rates(every),
        "families": {label: {"pairs": int(mask.sum())} | rates(mask) for label, mask in masks.items()},
        "by_layer": _by_layer(table),
    }


def estimate(draws: Floats, question: Ints) -> dict[str, Any]:
    """A statistic with its interval, as summary.json and evaluation.json have it; None for what there is not.

    draws: of a `ClusterBootstrap`. question: of each pair; there is no interval with few.
    """
    interval = Interval.from_draws(draws, effective_groups(question))
    bounds = interval.bounds
    value = None if np.isnan(interval.value) else interval.value
    return {"value": value, "interval": None if bounds is None else list(bounds)}


def mean_estimate(
    bootstrap: ClusterBootstrap, values: Floats, question: Ints, mask: Bools, *, is_rate: bool
) -> dict[str, Any]:
    """The mean of the masked pairs' values [pairs] with its interval, as `estimate` has it; NaN is left out.

    Args:
        bootstrap: over the questions.
        question: [pairs] the number of each pair's question.
        is_rate: the values are 0 or 1: the interval is that of `stats.rate_interval`.
    """
    valid = mask & ~np.isnan(values)
    draws = bootstrap.mean(values, valid)
    result = estimate(draws, question[valid])
    if is_rate and valid.any():
        result["interval"] = list(rate_interval(values[valid] == 1, question[valid]))
    return result


def print_summary(summary: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"{summary['pairs']:,} pairs of {summary['questions']:,} questions", markup=False)
    rows: list[tuple[str, ...]] = [(label, cell(summary["all"][name])) for name, label in RATES.items()]
    print_table(console, ("of all pairs", "mean [95%]"), rows)
    if summary["families"]:
        rows = [(name, cell(own["flipped"]), cell(own["distance"])) for name, own in summary["families"].items()]
        print_table(console, ("family", RATES["flipped"], RATES["distance"]), rows)
    predictors = [(label, summary["predicts_flips"][name]) for name, label in PREDICTORS.items()]
    rows = [(label, cell(own, "auroc"), f"{own['pairs']:,}", _verdict(own)) for label, own in predictors]
    print_table(console, ("which answers flip", "AUROC [95%]", "pairs", "verdict"), rows)


def cell(result: Mapping[str, Any] | None, key: str = "value") -> str:
    """A value with its interval, as text."""
    if result is None or result[key] is None:
        return "-"
    bounds = "" if result["interval"] is None else " [{:.3f}, {:.3f}]".format(*result["interval"])
    return f"{result[key]:.3f}{bounds}"


def _verdict(predictor: Mapping[str, Any]) -> str:
    if predictor["interval"] is None:
        return "too few"
    verdicts = {1: "higher if it flips", -1: "lower if it flips", None: "not shown"}
    return verdicts[side(predictor["interval"], 0.5)]


def _values(table: pa.Table) -> dict[str, Floats]:
    """By name, [pairs]; NaN if a pair has none."""
    sides = ("clean_instability", "wrapped_instability", "clean_focus", "wrapped_focus")
    columns = ("wrapper_tokens", *RATES, *sides)
    values = {name: np.array(table[name].to_pylist(), float) for name in columns}
    for name in ("instability", "focus"):
        values[f"{name}_change"] = values[f"wrapped_{name}"] - values[f"clean_{name}"]
    core = {side: _first_step(table, f"{side}_mass")[..., 0].mean(axis=(1, 2)) for side in ("clean", "wrapped")}
    return values | {"core_mass_lost": core["clean"] - core["wrapped"]}


def _predict(values: Floats, flipped: Floats, question: Ints, seed: int) -> dict[str, Any]:
    valid = ~np.isnan(values)
    flips = flipped[valid] == 1
    result: dict[str, Any] = {"pairs": int(valid.sum()), "flipped": int(flips.sum()), "auroc": None, "interval": None}
    if flips.any() and not flips.all():
        groups = np.unique(question[valid], return_inverse=True)[1]
        separated = separation(values[valid], flips, groups, seed=seed)
        result |= {"auroc": separated.auroc, "interval": separated.auroc_interval}
    return result


def _by_layer(table: pa.Table) -> dict[str, Any]:
    """Means over pairs, heads and, for distances, steps: one number per layer."""
    means: dict[str, Any] = {}
    for name in ("distance_l2", "distance_tv"):
        by_pair = [steps.mean(axis=(0, 2)) for steps in _by_head(table, name)]
        means[name] = np.mean(by_pair, axis=0).tolist()
    for version in ("clean", "wrapped"):
        masses = _first_step(table, f"{version}_mass").mean(axis=(0, 2))
        means[f"{version}_mass"] = dict(zip(("core", "wrapper", "system"), masses.T.tolist()))
    return means


def _first_step(table: pa.Table, name: str) -> Floats:
    """[pairs, layers, heads, 3] masses at step 0."""
    return np.stack([steps[0] for steps in _by_head(table, name, 3)]).astype(np.float64)


def _by_head(table: pa.Table, name: str, *more: int) -> Iterator[NDArray[Any]]:
    """Each pair's values [steps, layers, heads, *more] of a column."""
    about = json.loads(table.schema.metadata[b"headrift"])
    for values in list_column(table, name):
        yield values.reshape(-1, about["layers"], about["heads"], *more)
