"""What all measurements say together: every number with its interval, and the prompts and rows it is made from."""

from __future__ import annotations

import json
import warnings
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
    PromptBootstrap,
    column,
    nan_mean,
    pearson,
    prompt_means,
    spearman,
    student,
)
from headrift.internals.sentences import Rules, effect_of_features, rank_sentences
from headrift.runs.folder import list_column
from headrift.stats import Floats, Ints

# How much a system prompt changes, three ways; changes of the residual stream are relative, mean over layers.
MEASURES = {
    "kl": "next-token KL (nats)",
    "residual_last": "change of residual at the last prompt token",
    "residual_question": "change of residual at the question's tokens",
}
SCORES = ("whole", "dropped", "neutral")
_RANK_RESAMPLES = 200  # of rank correlations, each of which ranks all rows again
_NUMBERS = ("kl", "top1_changed", "same_steps", "steps", "system_tokens")
_NO_STATSMODELS = "statsmodels is not installed: pip install 'headrift[internals]'"


@dataclass(frozen=True, slots=True)
class Changes:
    """The records of comparing.compare as arrays, NaN for a prompt without a record."""

    systems: list[str]  # names of the system prompts, CHECK last
    layers: int
    numbers: dict[tuple[str, str], Floats]  # by comparison and column [prompts, systems]
    states: dict[tuple[str, str], Floats]  # by comparison and column [prompts, systems, layers, components]
    bootstrap: PromptBootstrap

    @classmethod
    def from_table(cls, table: pa.Table, n_prompts: int, seed: int) -> Changes:
        """Make the arrays from the records of all parts. seed: of the intervals."""
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
        return cls(systems, metadata["layers"], numbers, states, PromptBootstrap(n_prompts, seed))

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
        rows = int(np.isfinite(self.numbers[SYSTEM, "kl"][:, self.own]).sum())
        return self.bootstrap.mean(nan_mean(values[:, self.own]), rows)


def analyse(
    tables: Mapping[str, pa.Table | None], n_prompts: int, systems: Sequence[SystemPrompt], rules: Rules, seed: int = 0
) -> tuple[Changes, dict[str, Any]]:
    """Analyse the tables of all kinds of measurements, None for those that were not measured. seed: of intervals.

    The results are under their keys in internals.json and figures.json, None for what was not measured.
    """
    components, sentences, placements = tables["components"], tables["sentences"], tables["placements"]
    attention, scores = tables["attention"], tables["instability"]
    assert components is not None
    changes = Changes.from_table(components, n_prompts, seed)
    bootstrap, texts = changes.bootstrap, {system.name: system.text for system in systems}
    cosine = {one: bootstrap.mean(nan_mean(changes.states[one, "last_cosine"], 2)) for one in COMPARISONS}
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
            "over_rows": {place: _predicting(changes, place, within=False) for place in PLACES},
            "within_system_prompts": {place: _predicting(changes, place, within=True) for place in PLACES},
        },
        "cka": _cka(tables["cka"], changes.layers),
        "length": {measure: _length(changes, measure) for measure in MEASURES},
        "features": _features(changes, texts, rules),
        "sentences": None if sentences is None else rank_sentences(sentences, rules),
        "sentence_features": None if sentences is None else effect_of_features(sentences, rules),
        "placements": None if placements is None else _placements(placements),
        "instability": None if scores is None else _instability(scores, rules),
        "attention": None if attention is None else summarise_regions(attention, bootstrap),
        "attention_entropy": None if attention is None else summarise_entropy(attention, bootstrap),
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
        name: changes.bootstrap.mean(values[:, i]).at() for i, name in enumerate(changes.systems)
    }


def _predicting(changes: Changes, place: str, *, within: bool) -> Estimates:
    """Spearman's correlation of a layer's change and the KL [layers, components], over rows or within systems."""
    change = changes.states[SYSTEM, f"{place}_l2"][:, changes.own]
    kl = changes.numbers[SYSTEM, "kl"][:, changes.own]
    valid = np.isfinite(kl) & np.isfinite(change).all((2, 3))

    def correlate(x: Floats, y: Floats) -> Floats:
        return spearman(x.reshape(len(y), -1), y[:, None]).reshape(change.shape[2:])

    def over_rows(drawn: Ints) -> Floats:
        keep = valid[drawn]
        return correlate(change[drawn][keep], kl[drawn][keep])

    def within_systems(drawn: Ints) -> Floats:
        kept = [drawn[valid[drawn, i]] for i in range(kl.shape[1])]
        return nan_mean(np.stack([correlate(change[rows, i], kl[rows, i]) for i, rows in enumerate(kept)]), 0)

    return changes.bootstrap.statistic(within_systems if within else over_rows, int(valid.sum()), _RANK_RESAMPLES)


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


def _length(changes: Changes, measure: str) -> dict[str, Any]:
    """The correlation of length and effect of system prompts, of neutral texts and of their difference."""
    tokens = changes.numbers[SYSTEM, "system_tokens"][:, changes.own]
    system, neutral = (changes.effect(measure, comparison)[:, changes.own] for comparison in (SYSTEM, NEUTRAL))
    groups = {"system": system, "neutral": neutral, "beyond": system - neutral}
    return {"mixed": mixed_model(system, neutral, tokens)} | {
        name: length_correlations(values, tokens, changes.bootstrap) for name, values in groups.items()
    }


def length_correlations(values: Floats, tokens: Floats, bootstrap: PromptBootstrap) -> dict[str, Estimate]:
    """Pearson's and Spearman's correlation of values and lengths over all rows [prompts, systems]."""
    valid = np.isfinite(values)

    def both(drawn: Ints) -> Floats:
        keep = valid[drawn]
        x, y = tokens[drawn][keep], values[drawn][keep]
        return np.array([pearson(x, y), spearman(x, y)])

    estimates = bootstrap.statistic(both, int(valid.sum()), _RANK_RESAMPLES)
    return {"pearson": estimates.at(0), "spearman": estimates.at(1)}


def mixed_model(system: Floats, neutral: Floats, tokens: Floats) -> dict[str, Any]:
    """Fit effect ~ length * (neutral text or system prompt), all [prompts, systems], with the prompt as random effect.

    Returns:
        With Wald intervals, per 100 tokens: the slope of neutral texts, and by how much that of system prompts is
        larger. Or the reason why there is none.
    """
    valid = np.isfinite(system) & np.isfinite(neutral)
    prompts = np.broadcast_to(np.arange(len(system))[:, None], system.shape)[valid]
    rows, n_prompts = 2 * int(valid.sum()), len(np.unique(prompts))
    counts = {"rows": rows, "prompts": n_prompts}
    if n_prompts < 3 or len(np.unique(tokens[valid])) < 3:
        return {"reason": "fewer than three prompts, or three lengths", **counts}
    try:
        from statsmodels.regression.mixed_linear_model import MixedLM
    except ImportError:
        return {"reason": _NO_STATSMODELS, **counts}
    length, is_system = np.tile(tokens[valid] / 100, 2), np.repeat([1.0, 0.0], rows // 2)
    effect = np.concatenate([system[valid], neutral[valid]])
    design = np.column_stack([np.ones(rows), length, is_system, length * is_system])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `converged` says the same
        try:
            fit = MixedLM(effect, design, np.tile(prompts, 2)).fit(reml=True)
        except (np.linalg.LinAlgError, ValueError) as error:
            return {"reason": f"the model could not be fitted: {error}", **counts}
        intervals = fit.conf_int()
    sd = float(np.sqrt(max(0.0, np.asarray(fit.cov_re)[0, 0])))
    results: dict[str, Any] = {"converged": bool(fit.converged), **counts, "random_effect_sd": sd}
    for name, i in (("per_100_neutral", 1), ("per_100_beyond", 3)):
        low, high = map(float, intervals[i])
        interval = (low, high) if np.isfinite([low, high]).all() else None
        results[name] = Estimate(float(fit.fe_params[i]), interval, n_prompts, rows)
    return results


def _features(changes: Changes, texts: Mapping[str, str], rules: Rules) -> dict[str, dict[str, Any]]:
    """By feature, the KL beyond neutral text of the system prompts that have it, less that of the others."""
    beyond = (changes.effect("kl", SYSTEM) - changes.effect("kl", NEUTRAL))[:, changes.own]
    results: dict[str, dict[str, Any]] = {}
    for feature, pattern in rules.items():
        has = np.array([pattern.search(texts[changes.systems[i]]) is not None for i in changes.own])
        results[feature] = {"with": int(has.sum()), "without": int((~has).sum()), "difference": None}
        if has.any() and not has.all():
            difference = changes.bootstrap.mean(nan_mean(beyond[:, has]) - nan_mean(beyond[:, ~has]))
            results[feature]["difference"] = difference.at()
    return results


def _placements(table: pa.Table) -> dict[str, dict[str, Estimate]]:
    """By placement the mean effects and, but for the first, each less that as system prompt (`.._less`)."""
    prompts, placements = sorted(set(column(table, "prompt").tolist())), column(table, "placement")
    results: dict[str, dict[str, Estimate]] = {placement: {} for placement in PLACEMENTS}
    for measure in MEASURES:
        first: Floats | None = None
        for placement in PLACEMENTS:
            own = table.filter(pa.array(placements == placement))
            means = prompt_means(own, measure, prompts)
            results[placement][measure] = student(means, own.num_rows)[0]
            if first is None:
                first = means
            else:
                results[placement][f"{measure}_less"] = student(means - first, own.num_rows)[0]
    return results


def _instability(table: pa.Table, rules: Rules) -> dict[str, Any]:
    """What sentences do to the instability score; rows without a score are left out."""
    table = table.drop_null()
    prompts = sorted(set(column(table, "prompt").tolist()))
    names = (*SCORES, "effect", "effect_dropped")
    means = {name: student(prompt_means(table, name, prompts), table.num_rows)[0] for name in names}
    return {
        "scores": {name: means.pop(name) for name in SCORES},
        **means,
        "sentences": rank_sentences(table, rules, (*SCORES, "effect_dropped")),
        "features": effect_of_features(table, rules),
    }
