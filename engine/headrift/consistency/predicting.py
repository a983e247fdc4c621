"""What scored pairs say together: how often answers flip, how far attention is drawn away, and does the one tell of the
other?

Intervals are 95% percentile intervals from drawing questions, with all their pairs, with replacement.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrift.stats import MIN_FOR_INTERVAL, RESAMPLES, ClusterBootstrap, separation
from headrift.terminal import print_table

Floats = NDArray[np.float64]

# What may tell that an answer flips, and its words. The wrapper's length is there for what it explains by itself.
PREDICTORS = {
    "distance": "attention distance, TV",
    "core_mass_lost": "attention that the core loses",
    "wrapped_instability": "instability, wrapped",
    "instability_change": "instability, wrapped - clean",
    "wrapped_focus": "focus, wrapped",
    "focus_change": "focus, wrapped - clean",
    "wrapper_tokens": "length of the wrapper, tokens",
}
# What is said of each family.
RATES = {
    "flipped": "answers that flip",
    "clean_right": "right, clean",
    "wrapped_right": "right, wrapped",
    "hinted": "the hinted wrong answer",
    "distance": "attention distance, TV",
}


def summarised(table: pa.Table, seed: int = 0) -> dict[str, Any]:
    """The figures of all pairs (rows of pair_parts) as plain values.

    predicts_flips: by predictor the chance that a pair that flips has the higher value, ties half (AUROC; below 0.5
    those that flip have the lower one), over the pairs that have it, None where none or all of them flip. all and
    families: means of RATES. by_layer: mean distance at steps 0..N, and masses on core, wrapper and system at step 0.
    """
    values = _values(table)
    _, question = np.unique(np.array(table["question"].to_pylist()), return_inverse=True)
    draws = ClusterBootstrap(question, RESAMPLES, seed=seed)
    family = np.array(["" if name is None else name for name in table["family"].to_pylist()])
    masks = {name: family == name for name in dict.fromkeys(family.tolist()) if name}
    every = np.ones(len(question), bool)
    return {
        "questions": int(question.max()) + 1,
        "pairs": len(question),
        "predicts_flips": {name: _predicts(values[name], values["flipped"], question, seed) for name in PREDICTORS},
        "all": {name: _mean(values[name], every, question, draws) for name in RATES},
        "families": {
            label: {"pairs": int(mask.sum())} | {name: _mean(values[name], mask, question, draws) for name in RATES}
            for label, mask in masks.items()
        },
        "by_layer": _by_layer(table),
    }


def print_summary(found: Mapping[str, Any]) -> None:
    """Print what `summarised` found."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"{found['pairs']:,} pairs of {found['questions']:,} questions", markup=False)
    print_table(console, ("of all pairs", "mean [95%]"), [(RATES[name], _cell(found["all"][name])) for name in RATES])
    if found["families"]:
        of_family = [(label, _cell(of["flipped"]), _cell(of["distance"])) for label, of in found["families"].items()]
        print_table(console, ("family", RATES["flipped"], RATES["distance"]), of_family)
    predicted = [
        (words, _cell(found["predicts_flips"][name], "auroc"), f"{found['predicts_flips'][name]['pairs']:,}")
        for name, words in PREDICTORS.items()
    ]
    print_table(console, ("which answers flip, told by", "AUROC [95%]", "pairs"), predicted)


def _values(table: pa.Table) -> dict[str, Floats]:
    """Of each pair, NaN where it has none."""
    columns = ("distance", "wrapper_tokens", *RATES)
    columns += ("clean_instability", "wrapped_instability", "clean_focus", "wrapped_focus")
    found = {name: np.array(table[name].to_pylist(), float) for name in columns}
    for name in ("instability", "focus"):
        found[f"{name}_change"] = found[f"wrapped_{name}"] - found[f"clean_{name}"]
    core = {side: _first_step(table, f"{side}_mass")[..., 0].mean(axis=(1, 2)) for side in ("clean", "wrapped")}
    return found | {"core_mass_lost": core["clean"] - core["wrapped"]}


def _predicts(values: Floats, flipped: Floats, question: NDArray[np.int64], seed: int) -> dict[str, Any]:
    there = ~np.isnan(values)
    flips = flipped[there] == 1
    about: dict[str, Any] = {"pairs": int(there.sum()), "flipped": int(flips.sum()), "auroc": None, "interval": None}
    if flips.any() and not flips.all():
        groups = np.unique(question[there], return_inverse=True)[1]
        found = separation(values[there], flips, groups, seed=seed)
        few = min(len(np.unique(groups[flips])), len(np.unique(groups[~flips]))) < MIN_FOR_INTERVAL
        about |= {"auroc": found.auroc, "interval": None if few else found.auroc_interval}
    return about


def _mean(
    values: Floats, mask: NDArray[np.bool_], question: NDArray[np.int64], draws: ClusterBootstrap
) -> dict[str, Any]:
    """The mean of the mask's pairs that have a value, None where none has."""
    mask = mask & ~np.isnan(values)
    if not mask.any():
        return {"value": None, "interval": None}
    drawn = draws.mean(values, mask)
    rest = drawn[1:][~np.isnan(drawn[1:])]
    few = len(np.unique(question[mask])) < MIN_FOR_INTERVAL
    interval = None if few or not len(rest) else [float(x) for x in np.percentile(rest, [2.5, 97.5])]
    return {"value": float(drawn[0]), "interval": interval}


def _by_layer(table: pa.Table) -> dict[str, Any]:
    """Means over pairs, heads and, of distances, steps: a number a layer each."""
    layers, heads = _shape(table)
    found: dict[str, Any] = {}
    for name in ("distance_l2", "distance_tv"):
        means = [np.reshape(row, (-1, layers, heads)).mean(axis=(0, 2)) for row in _rows(table, name)]
        found[name] = np.mean(means, axis=0).tolist()
    for side in ("clean", "wrapped"):
        masses = _first_step(table, f"{side}_mass").mean(axis=(0, 2))
        found[f"{side}_mass"] = dict(zip(("core", "wrapper", "system"), masses.T.tolist()))
    return found


def _first_step(table: pa.Table, name: str) -> Floats:
    """[pairs, layers, heads, 3] masses at step 0."""
    shape = (*_shape(table), 3)
    return np.stack([row[: np.prod(shape)].reshape(shape) for row in _rows(table, name)]).astype(np.float64)


def _shape(table: pa.Table) -> tuple[int, int]:
    about = json.loads(table.schema.metadata[b"headrift"])
    return about["layers"], about["heads"]


def _rows(table: pa.Table, name: str) -> list[NDArray[np.float32]]:
    return [chunk[i].values.to_numpy() for chunk in table[name].chunks for i in range(len(chunk))]


def _cell(figure: Mapping[str, Any], key: str = "value") -> str:
    if figure[key] is None:
        return "-"
    if figure["interval"] is None:
        return f"{figure[key]:.3f}"
    low, high = figure["interval"]
    return f"{figure[key]:.3f} [{low:.3f}, {high:.3f}]"
