"""What all measurements say together: every number with its interval, and the prompts and rows it is made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from headrift.internals.attention import summarise_entropy, summarise_regions
from headrift.internals.cases import CHECK, SystemPrompt
from headrift.internals.comparing import BEYOND, COMPARISONS, COMPONENTS, NEUTRAL, PLACEMENTS, PLACES, RESIDUAL, SYSTEM
from headrift.internals.estimates import (
    Estimate,
    Estimates,
    cell_means,
    column,
    correlation,
    difference,
    nan_mean,
    of_systems,
    over_prompts,
    over_systems,
    slope,
    spearman,
    with_variance,
)
from headrift.internals.sentences import Rules, effect_of_features, rank_sentences
from headrift.runs.folder import list_column
from headrift.stats import Bools, Floats

# How much a system prompt changes, three ways; changes of the residual stream are relative, mean over layers.
MEASURES = {
    "kl": "next-token KL (nats)",
    "residual_last": "change of residual at the last prompt token",
    "residual_question": "change of residual at the question's tokens",
}
SCORES = ("whole", "dropped", "neutral")
_NUMBERS = ("kl", "top1_changed", "same_steps", "steps", "system_tokens")


@dataclass(frozen=True, slots=True)
class Changes:
    """The records of comparing.compare as arrays, NaN for a prompt without a record."""

    systems: list[str]  # names of the system prompts, CHECK last
    layers: int
    numbers: dict[tuple[str, str], Floats]  # by comparison and column [prompts, systems]
    states: dict[tuple[str, str], Floats]  # by comparison and column [prompts, systems, layers, components]

    @classmethod
    def from_table(cls, table: pa.Table, n_prompts: int) -> Changes:
        """Make the arrays from the records of all parts."""
        metadata = json.loads(table.schema.metadata[b"headrift"])
        names, comparisons = column(table, "system").tolist(), column(table, "comparison")
        systems = list(dict.fromkeys(names))
        place = column(table, "prompt"), np.array([systems.index(name) for name in names])
        shape, cells = (n_prompts, len(systems)), (metadata["layers"], len(COMPONENTS))
        numbers, states = {}, {}
        for comparison in COMPARISONS:
            rows = comparisons == comparison
            index = tuple(axis[rows] for axis in place)
            for name in _NUMBERS:
                numbers[comparison, name] = np.full(shape, np.nan)
                numbers[comparison, name][index] = column(table, name).astype(float)[rows]
            for name in metadata["shapes"]:
                states[comparison, name] = np.full((*shape, *cells), np.nan)
                states[comparison, name][index] = np.reshape(list_column(table, name), (-1, *cells))[rows]
        return cls(systems, metadata["layers"], numbers, states)

    @property
    def own(self) -> list[int]:
        """The numbers of the system prompts without CHECK."""
        return [i for i, name in enumerate(self.systems) if name != CHECK]

    def effect(self, measure: str, comparison: str) -> Floats:
        """One of MEASURES [prompts, systems]."""
        if measure == "kl":
            return self.numbers[comparison, "kl"]
        place = measure.removeprefix("residual_")
        return self.states[comparison, f"{place}_l2"][..., COMPONENTS.index(RESIDUAL)].mean(-1)

    def mean(self, values: Floats) -> Estimates:
        """Mean over prompts and, but for CHECK, system prompts of values [prompts, systems, ...]."""
        return over_systems(values[:, self.own])


def analyse(
    tables: Mapping[str, pa.Table | None], n_prompts: int, systems: Sequence[SystemPrompt], rules: Rules
) -> tuple[Changes, dict[str, Any]]:
    """Analyse the tables of all kinds of measurements, None for those that were not measured.

    The results are under their keys in internals.json and figures.json, None for what was not measured.
    """
    components, sentences, placements = tables["components"], tables["sentences"], tables["placements"]
    attention, scores = tables["attention"], tables["instability"]
    assert components is not None
    changes, texts = Changes.from_table(components, n_prompts), {system.name: system.text for system in systems}
    cosine = {one: over_prompts(nan_mean(changes.states[one, "last_cosine"], 2)) for one in COMPARISONS}
    by_layer: dict[str, dict[str, Estimates]] = {comparison: {} for comparison in COMPARISONS}
    for (comparison, name), values in changes.states.items():
        by_layer[comparison][name] = changes.mean(values)  # [layers, components]
    results = {
        "prompts": n_prompts,
        "system_prompts": [changes.systems[i] for i in changes.own],
        "by_layer": by_layer,
        "by_system": {"systems": changes.systems, "cosine_at_last_token": cosine},
        "output": {comparison: _output(changes, comparison) for comparison in COMPARISONS},
        "beyond_neutral": {measure: _beyond(changes, measure) for measure in MEASURES},
        "predicting_kl": {
            "across_system_prompts": {place: _predicting(changes, place, within=False) for place in PLACES},
            "within_system_prompts": {place: _predicting(changes, place, within=True) for place in PLACES},
        },
        "cka": _cka(tables["cka"], changes.layers),
        "length": {measure: _length(changes, measure) for measure in MEASURES},
        "features": _features(changes, texts, rules),
        "sentences": None if sentences is None else rank_sentences(sentences, rules),
        "sentence_features": None if sentences is None else effect_of_features(sentences, rules),
        "placements": None if placements is None else _placements(placements),
        "instability": None if scores is None else _instability(scores, rules),
        "attention": None if attention is None else summarise_regions(attention, n_prompts),
        "attention_entropy": None if attention is None else summarise_entropy(attention, n_prompts),
        "comparisons": {
            SYSTEM: "without and with the system prompt",
            NEUTRAL: "without and with neutral text of its length",
            BEYOND: "with neutral text and with the system prompt",
        },
    }
    return changes, results


def _output(changes: Changes, comparison: str) -> dict[str, Estimate]:
    """Mean KL, how often the most likely first token changes, and the fraction of the answer's steps in common."""
    numbers = {name: changes.numbers[comparison, name] for name in _NUMBERS}
    same = numbers["same_steps"] / numbers["steps"]
    columns = {"kl": numbers["kl"], "top1_changed": numbers["top1_changed"], "same": same}
    return {name: changes.mean(values).at() for name, values in columns.items()}


def _beyond(changes: Changes, measure: str) -> dict[str, Estimate]:
    """Mean effect less that of neutral text, by system prompt; "": of all but CHECK."""
    values = changes.effect(measure, SYSTEM) - changes.effect(measure, NEUTRAL)
    return {"": changes.mean(values).at()} | {
        name: over_prompts(values[:, i]).at() for i, name in enumerate(changes.systems)
    }


def _predicting(changes: Changes, place: str, *, within: bool) -> Estimates:
    """Spearman's correlation of a layer's change and the KL [layers, components].

    Across system prompts, of their means; or over the prompts of each system prompt (`within`), mean.
    """
    change = changes.states[SYSTEM, f"{place}_l2"][:, changes.own]
    kl = changes.numbers[SYSTEM, "kl"][:, changes.own]
    valid = np.isfinite(kl) & np.isfinite(change).all((2, 3))
    both = np.concatenate([kl[..., None], change.reshape(*kl.shape, -1)], -1)
    both[~valid] = np.nan
    shape = change.shape[2:]

    def means(kept: Bools) -> Floats:
        return nan_mean(both[kept], 0)

    def correlations(kept: Bools) -> Floats:
        columns = (both[kept & valid[:, i], i] for i in range(kl.shape[1]))
        missing = np.full(shape, np.nan)
        return np.stack([spearman(one[:, 1:], one[:, :1]).reshape(shape) if len(one) else missing for one in columns])

    def of_means(values: Floats) -> tuple[Floats, Floats, Floats]:
        values = values[np.isfinite(values).all(1)]
        return with_variance(spearman(values[:, 1:], values[:, :1]).reshape(shape), len(values))

    rows = int(valid.sum())
    if within:
        return of_systems(correlations, both, rows=rows)
    return of_systems(means, both, of_means, rows, is_correlation=True)


def _cka(table: pa.Table | None, layers: int) -> dict[str, dict[str, Floats]]:
    """By comparison and place, mean CKA over system prompts [layers, components], and by chance."""
    if table is None or not table.num_rows:
        return {}
    comparisons, places = column(table, "comparison"), column(table, "place")
    values = np.stack([column(table, "cka"), column(table, "by_chance")])
    results = {}
    for comparison, place in dict.fromkeys(zip(comparisons.tolist(), places.tolist())):
        own = values[:, (comparisons == comparison) & (places == place)]
        cka, by_chance = nan_mean(own.reshape(2, -1, layers, len(COMPONENTS)))
        results[f"{comparison} / {place}"] = {"cka": cka, "by_chance": by_chance}
    return results


def _length(changes: Changes, measure: str) -> dict[str, dict[str, Estimate]]:
    """How length goes with the effect of system prompts, of neutral texts and with their difference."""
    tokens = changes.numbers[SYSTEM, "system_tokens"][:, changes.own]
    system, neutral = (changes.effect(measure, comparison)[:, changes.own] for comparison in (SYSTEM, NEUTRAL))
    groups = {"system": system, "neutral": neutral, "beyond": system - neutral}
    return {name: with_length(values, nan_mean(tokens, 0)) for name, values in groups.items()}


def with_length(values: Floats, tokens: Floats) -> dict[str, Estimate]:
    """Correlations of system prompts' values [prompts, systems] and tokens [systems], and the slope per 100 tokens."""
    values = _within_prompts(values)
    return {
        "spearman": over_systems(values, correlation(tokens, ranks=True), is_correlation=True).at(),
        "pearson": over_systems(values, correlation(tokens, ranks=False), is_correlation=True).at(),
        "per_100_tokens": over_systems(values, slope(tokens / 100)).at(),
    }


def _within_prompts(values: Floats) -> Floats:
    """Values [prompts, systems] less their prompt's mean, so that a prompt that a system prompt lacks is no effect."""
    return values - nan_mean(values)[:, None]


def _features(changes: Changes, texts: Mapping[str, str], rules: Rules) -> dict[str, dict[str, Any]]:
    """By feature, the KL beyond neutral text of the system prompts that have it, less that of the others."""
    beyond = (changes.effect("kl", SYSTEM) - changes.effect("kl", NEUTRAL))[:, changes.own]
    results: dict[str, dict[str, Any]] = {}
    for feature, pattern in rules.items():
        has = np.array([pattern.search(texts[changes.systems[i]]) is not None for i in changes.own])
        results[feature] = {"with": int(has.sum()), "without": int((~has).sum()), "difference": None}
        if has.any() and not has.all():
            results[feature]["difference"] = with_feature(beyond, has)
    return results


def with_feature(values: Floats, has: Bools) -> Estimate:
    """Mean value [prompts, systems] of the system prompts that have something, `has` [systems], less the others'."""
    return over_systems(_within_prompts(values), difference(has)).at()


def _placements(table: pa.Table) -> dict[str, dict[str, Estimate]]:
    """By placement the mean effects and, but for the first, each less that as system prompt (`.._less`)."""
    placements = column(table, "placement")
    results: dict[str, dict[str, Estimate]] = {placement: {} for placement in PLACEMENTS}
    for measure in MEASURES:
        values = [cell_means(table, measure, placements == one) for one in PLACEMENTS]
        for placement, own in zip(PLACEMENTS, values):
            results[placement][measure] = over_systems(own).at()
            if own is not values[0]:
                results[placement][f"{measure}_less"] = over_systems(own - values[0]).at()
    return results


def _instability(table: pa.Table, rules: Rules) -> dict[str, Any]:
    """What sentences do to the instability score; rows without a score are left out."""
    table = table.drop_null()
    names = (*SCORES, "effect", "effect_dropped")
    means = {name: over_systems(cell_means(table, name), rows=table.num_rows).at() for name in names}
    return {
        "scores": {name: means.pop(name) for name in SCORES},
        **means,
        "sentences": rank_sentences(table, rules, (*SCORES, "effect_dropped")),
        "features": effect_of_features(table, rules),
    }
