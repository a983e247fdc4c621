"""Which features of a system prompt go with more change, and which of its sentences cause it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from headrift.internals.comparing import NEUTRAL, SYSTEM
from headrift.internals.estimates import Prompts, student
from headrift.internals.tables import Compared, column, grid

# A sentence is said to do something where its p-value, corrected for the number of sentences, is below this.
ALPHA = 0.05

Rules = Mapping[str, re.Pattern[str]]


class RulesError(ValueError):
    """A file of features that cannot be used; the message says why and what to do."""


def read_rules(extra: Path | None = None) -> Rules:
    """The features that come with headrift, and those of a file of the same form. RulesError where it has another."""
    own = (files("headrift.internals") / "features.toml").read_text(encoding="utf-8")
    rules = _parsed(own, "features.toml")
    if extra is not None:
        try:
            rules |= _parsed(extra.read_text(encoding="utf-8"), str(extra))
        except OSError as error:
            raise RulesError(f"--features {extra} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise RulesError(f"--features {extra} is not UTF-8 text: convert it to UTF-8") from error
    return rules


def _parsed(text: str, name: str) -> dict[str, re.Pattern[str]]:
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RulesError(f"--features {name} is no TOML file: {error}") from error
    rules = {}
    for feature, rule in given.items():
        patterns = rule.get("patterns") if isinstance(rule, dict) else None
        if not isinstance(patterns, list) or not patterns or not all(isinstance(each, str) for each in patterns):
            raise RulesError(
                f"--features {name}: [{feature}] needs `patterns`, a list of regular expressions, as in "
                "patterns = ['\\bplease\\b']"
            )
        try:
            rules[feature] = re.compile("|".join(f"(?:{each})" for each in patterns), re.IGNORECASE)
        except re.error as error:
            raise RulesError(
                f"--features {name}: [{feature}] has a pattern that is no regular expression: {error}"
            ) from error
    return rules


def features_of(text: str, rules: Rules) -> list[str]:
    """The features that a text has."""
    return [name for name, pattern in rules.items() if pattern.search(text)]


def by_feature(of: Compared, texts: Mapping[str, str], rules: Rules, prompts: Prompts) -> dict[str, dict[str, Any]]:
    """By feature: how much more KL beyond the neutral control the system prompts have that have it, than those that
    have it not (`difference`, interval over prompts, the system prompts as they are), and how many have it (`with`)."""
    beyond = of.effect("kl", SYSTEM) - of.effect("kl", NEUTRAL)
    found = {}
    for feature in rules:
        has = np.array([feature in features_of(texts[of.systems[i]], rules) for i in of.own])
        about: dict[str, Any] = {"with": int(has.sum()), "without": int((~has).sum()), "difference": None}
        if has.any() and not has.all():
            own = beyond[:, of.own]
            about["difference"] = prompts.mean(_mean(own[:, has]) - _mean(own[:, ~has])).at()
        found[feature] = about
    return found


def ranked(table: pa.Table, rules: Rules, means: Sequence[str] = ("kl", "top1_changed")) -> list[dict[str, Any]]:
    """The sentences by their `effect` (see sentences and instability), largest first: that with Student's interval over
    prompts, its p-value and that corrected by Benjamini and Hochberg for the number of sentences, and `shown`: below
    ALPHA. means: columns whose means are given too."""
    from scipy.stats import false_discovery_control

    found = []
    keys = dict.fromkeys(zip(column(table, "system"), column(table, "sentence")))
    number, names = np.array(column(table, "sentence")), np.array(column(table, "system"))
    values = {name: np.array(column(table, name), float) for name in ("effect", *means)}
    texts = column(table, "text")
    for system, sentence in keys:
        mine = (names == system) & (number == sentence)
        figure, p = student(values["effect"][mine])
        text = texts[int(np.argmax(mine))]
        found.append(
            {
                "system": system,
                "sentence": int(sentence),
                "text": text,
                "features": features_of(text, rules),
                "effect": figure,
                **{name: float(values[name][mine].mean()) for name in means},
                "p": p,
            }
        )
    tested = [row for row in found if np.isfinite(row["p"])]
    corrected = false_discovery_control([row["p"] for row in tested]) if tested else []
    for row in found:
        row |= {"p_corrected": None, "shown": False}
    for row, p in zip(tested, corrected):
        row |= {"p_corrected": float(p), "shown": bool(p < ALPHA)}
    return sorted(found, key=lambda row: -row["effect"].value)


def effect_of_features(table: pa.Table, rules: Rules) -> dict[str, dict[str, Any]]:
    """By feature the mean effect of the sentences that have it, interval over prompts, and of those that have none."""
    texts = column(table, "text")
    prompts = sorted(set(column(table, "prompt")))
    found = {}
    every = {feature: [feature in features_of(text, rules) for text in texts] for feature in rules}
    every["none of them"] = [not any(flags) for flags in zip(*every.values())]
    for feature, flags in every.items():
        some = table.filter(pa.array(flags))
        sentences = len(set(zip(column(some, "system"), column(some, "sentence"))))
        figure, p = student(grid(some, "effect", prompts), some.num_rows)
        found[feature] = {"sentences": sentences, "effect": figure, "p": p}
    return found


def _mean(values: Any) -> Any:
    """Over the system prompts of each prompt, NaN left out."""
    there = np.isfinite(values)
    n = there.sum(1)
    return np.divide(np.where(there, values, 0.0).sum(1), n, out=np.full(len(n), np.nan), where=n > 0)


def texts_of(systems: Sequence[Any]) -> dict[str, str]:
    """The system prompts' texts by name."""
    return {system.name: system.text for system in systems}
