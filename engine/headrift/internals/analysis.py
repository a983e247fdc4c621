"""What the measurements say together: every figure with its interval and the rows that it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from headrift.internals.comparing import BEYOND, COMPARISONS, NEUTRAL, PLACES, SYSTEM
from headrift.internals.entropies import Entropies, entropies
from headrift.internals.estimates import Figure, Figures, Floats, Prompts, spearman, student
from headrift.internals.length import length
from headrift.internals.phrases import Rules, by_feature, effect_of_features, ranked
from headrift.internals.placements import PLACEMENTS
from headrift.internals.regions import Regions, regions
from headrift.internals.tables import MEASURES, Compared, column, grid

# Draws for the rank correlations of every layer and component, each of which ranks all rows anew.
_DRAWS_OF_RANKS = 200
INSTABILITIES = ("whole", "dropped", "neutral")


@dataclass(frozen=True, slots=True)
class Analysis:
    """What was found.

    by_layer: by (comparison, column of comparing.schema) means over prompts and system prompts, [layers, components].
    by_system: by comparison the mean cosine at the last token over layers, [systems, components]. output: by comparison
    the means of `kl`, `top1_changed` and `same` (part of the steps that the greedy answers have in common). beyond: by
    measure and system prompt, the effect less that of its neutral control. predicting: by place Spearman's correlation
    over rows of a layer's relative change with the next token's KL, [layers, components]; within: the same in each
    system prompt, mean over these. cka: by (comparison, place) [layers, components], mean over system prompts, and by
    chance. instability: of sentences, see _instability. The rest: see length, phrases, placements, regions and
    entropies; None where it was not measured.
    """

    compared: Compared
    by_layer: dict[tuple[str, str], Figures]
    by_system: dict[str, Figures]
    output: dict[str, dict[str, Figure]]
    beyond: dict[str, dict[str, Figure]]
    predicting: dict[str, Figures]
    within: dict[str, Figures]
    cka: dict[tuple[str, str], tuple[Floats, Floats]]
    length: dict[str, Any]
    features: dict[str, dict[str, Any]]
    sentences: list[dict[str, Any]] | None = None
    sentence_features: dict[str, dict[str, Any]] | None = None
    placements: dict[str, dict[str, Figure]] | None = None
    sentence_rows: int = 0
    instability: dict[str, Any] | None = None
    regions: Regions | None = None
    entropies: Entropies | None = None


def analysed(
    tables: Mapping[str, pa.Table | None], n_prompts: int, texts: Mapping[str, str], rules: Rules, seed: int = 0
) -> Analysis:
    """tables: of `components`, `cka`, `sentences`, `placements`, `attention`, `instability`. texts: of the system
    prompts, by name."""
    components = tables["components"]
    assert components is not None
    of, prompts = Compared.of(components, n_prompts), Prompts(n_prompts, seed)
    sentences, placed, attended = tables["sentences"], tables["placements"], tables["attention"]
    scored = tables["instability"]
    return Analysis(
        compared=of,
        by_layer={key: prompts.mean(_over(states[:, of.own]), of.rows) for key, states in of.states.items()},
        by_system={which: prompts.mean(_over(of.states[which, "last_cosine"], 2)) for which in COMPARISONS},
        output={which: _output(of, which, prompts) for which in COMPARISONS},
        beyond={measure: _beyond(of, measure, prompts) for measure in MEASURES},
        predicting={place: _predicting(of, place, prompts, within=False) for place in PLACES},
        within={place: _predicting(of, place, prompts, within=True) for place in PLACES},
        cka=_cka(tables["cka"], of.layers),
        length=length(of, prompts),
        features=by_feature(of, texts, rules, prompts),
        sentences=None if sentences is None else ranked(sentences, rules),
        sentence_features=None if sentences is None else effect_of_features(sentences, rules),
        placements=None if placed is None else _placements(placed),
        instability=None if scored is None else _instability(scored, rules),
        regions=None if attended is None else regions(attended, n_prompts, prompts),
        entropies=None if attended is None else entropies(attended, n_prompts, prompts),
        sentence_rows=0 if sentences is None else sentences.num_rows,
    )


def _over(values: Floats, axis: int = 1) -> Floats:
    """Means over an axis, NaN left out."""
    there = np.isfinite(values)
    n = there.sum(axis)
    return np.divide(np.where(there, values, 0.0).sum(axis), n, out=np.full(n.shape, np.nan), where=n > 0)


def _output(of: Compared, which: str, prompts: Prompts) -> dict[str, Figure]:
    same = of.numbers[which, "same_steps"] / of.numbers[which, "steps"]
    columns = {"kl": of.numbers[which, "kl"], "top1_changed": of.numbers[which, "top1_changed"], "same": same}
    return {name: prompts.mean(_over(values[:, of.own]), of.rows).at() for name, values in columns.items()}


def _beyond(of: Compared, measure: str, prompts: Prompts) -> dict[str, Figure]:
    """Of each system prompt, CHECK too, and of all but that together (""): with the system prompt less with neutral."""
    values = of.effect(measure, SYSTEM) - of.effect(measure, NEUTRAL)
    together = prompts.mean(_over(values[:, of.own]), of.rows).at()
    return {"": together} | {name: prompts.mean(values[:, i]).at() for i, name in enumerate(of.systems)}


def _predicting(of: Compared, place: str, prompts: Prompts, *, within: bool) -> Figures:
    """Spearman's correlation of relative change and next-token KL, [layers, components]."""
    change, kl = of.states[SYSTEM, f"{place}_l2"][:, of.own], of.numbers[SYSTEM, "kl"][:, of.own]
    shape, there = change.shape[2:], np.isfinite(kl) & np.isfinite(change).all((2, 3))

    def over_rows(drawn: Any) -> Floats:
        keep = there[drawn]
        x, y = change[drawn][keep].reshape(keep.sum(), -1), kl[drawn][keep]
        return spearman(x, np.broadcast_to(y[:, None], x.shape)).reshape(shape)

    def in_each(drawn: Any) -> Floats:
        found = []
        for i in range(kl.shape[1]):
            keep = drawn[there[drawn, i]]
            x, y = change[keep, i].reshape(len(keep), -1), kl[keep, i]
            found.append(spearman(x, np.broadcast_to(y[:, None], x.shape)).reshape(shape))
        return _over(np.stack(found), 0)

    return prompts.of(in_each if within else over_rows, int(there.sum()), _DRAWS_OF_RANKS)


def _cka(table: pa.Table | None, layers: int) -> dict[tuple[str, str], tuple[Floats, Floats]]:
    if table is None or not table.num_rows:
        return {}
    rows = table.to_pylist()
    names = list(dict.fromkeys(row["component"] for row in rows))
    found = {}
    for key in dict.fromkeys((row["comparison"], row["place"]) for row in rows):
        sums = np.zeros((2, layers, len(names)))
        counts = np.zeros((layers, len(names)))
        for row in rows:
            if (row["comparison"], row["place"]) == key and row["system"] and np.isfinite(row["cka"]):
                at = row["layer"], names.index(row["component"])
                sums[(0, *at)] += row["cka"]
                sums[(1, *at)] += row["by_chance"]
                counts[at] += 1
        means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
        found[key] = means[0], means[1]
    return found


def _placements(table: pa.Table) -> dict[str, dict[str, Figure]]:
    """By place the mean effects, and, but for the first place, each less that of the system prompt (`.._less`)."""
    prompts = sorted(set(column(table, "prompt")))
    found: dict[str, dict[str, Figure]] = {}
    for measure in MEASURES:
        values = {where: grid(table, measure, prompts, placement=where) for where in PLACEMENTS}
        for where, of in values.items():
            rows = sum(1 for each in column(table, "placement") if each == where)
            about = found.setdefault(where, {})
            about[measure] = student(of, rows)[0]
            if where != PLACEMENTS[0]:
                about[f"{measure}_less"] = student(of - values[PLACEMENTS[0]], rows)[0]
    return found


def _instability(table: pa.Table, rules: Rules) -> dict[str, Any]:
    """What sentences do to the instability score, see instability: `scores`, the three means; `effect` and
    `effect_dropped`, means over sentences; `sentences` and `features` as of the KL. Rows without a score left out."""
    table = table.drop_null()
    prompts = sorted(set(column(table, "prompt")))
    means = {
        name: student(grid(table, name, prompts), table.num_rows)[0]
        for name in (*INSTABILITIES, "effect", "effect_dropped")
    }
    return {
        "scores": {name: means[name] for name in INSTABILITIES},
        "effect": means["effect"],
        "effect_dropped": means["effect_dropped"],
        "sentences": ranked(table, rules, (*INSTABILITIES, "effect_dropped")),
        "features": effect_of_features(table, rules),
    }


def numbers(of: Analysis) -> dict[str, Any]:
    """All of it as plain values, for internals.json and figures.json."""
    return {
        "prompts": of.compared.prompts,
        "system_prompts": [of.compared.systems[i] for i in of.compared.own],
        "by_layer": {
            which: {name: figures for (one, name), figures in of.by_layer.items() if one == which}
            for which in COMPARISONS
        },
        "by_system": {"systems": of.compared.systems, "cosine_at_last_token": of.by_system},
        "output": of.output,
        "beyond_neutral": of.beyond,
        "predicting_kl": {"over_rows": of.predicting, "within_system_prompts": of.within},
        "cka": {
            " / ".join(key): {"cka": value, "by_chance": chance} for key, (value, chance) in of.cka.items()
        },
        "length": of.length,
        "features": of.features,
        "sentences": of.sentences,
        "sentence_features": of.sentence_features,
        "placements": of.placements,
        "instability": of.instability,
        "attention": of.regions,
        "attention_entropy": of.entropies,
        "comparisons": {SYSTEM: "without and with the system prompt", NEUTRAL: "without and with neutral text of its "
                        "length", BEYOND: "with neutral text and with the system prompt"},
    }  # fmt: skip
