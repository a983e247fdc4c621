"""Do longer system prompts change more? Against neutral text of the same lengths, which changes something too."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from headrift.internals.comparing import NEUTRAL, SYSTEM
from headrift.internals.estimates import Figure, Floats, Prompts, pearson, spearman
from headrift.internals.tables import MEASURES, Compared

# Each ranks all rows anew.
_DRAWS = 200
_NO_STATSMODELS = "statsmodels is not installed: pip install 'headrift[internals]'"


def length(of: Compared, prompts: Prompts) -> dict[str, Any]:
    """By measure: the correlation of effect and length of system prompts (`system`), of neutral texts (`neutral`) and
    of the difference (`beyond`), each `pearson` and `spearman`; `mixed`: see `mixed_model`."""
    tokens = of.numbers[SYSTEM, "system_tokens"][:, of.own]
    found: dict[str, Any] = {}
    for measure in MEASURES:
        effects = {
            name: of.effect(measure, which)[:, of.own] for name, which in (("system", SYSTEM), ("neutral", NEUTRAL))
        }
        found[measure] = {"mixed": mixed_model(effects["system"], effects["neutral"], tokens)}
        for name, values in {**effects, "beyond": effects["system"] - effects["neutral"]}.items():
            found[measure][name] = correlations(values, tokens, prompts)
    return found


def correlations(values: Floats, tokens: Floats, prompts: Prompts) -> dict[str, Figure]:
    """Pearson's and Spearman's correlation over all rows [prompts, systems], intervals over prompts."""
    there = np.isfinite(values)

    def both(drawn: Any) -> Floats:
        keep = there[drawn]
        x, y = tokens[drawn][keep], values[drawn][keep]
        return np.array([pearson(x, y), spearman(x, y)])

    figures = prompts.of(both, int(there.sum()), _DRAWS)
    return {"pearson": figures.at(0), "spearman": figures.at(1)}


def mixed_model(system: Floats, neutral: Floats, tokens: Floats) -> dict[str, Any]:
    """effect ~ length * (neutral or system prompt), the prompt as random effect; lengths in 100 tokens.

    per_100_neutral: slope of neutral texts; per_100_beyond: what the slope of system prompts has beyond it; both with
    Wald intervals. reason: why there is none.
    """
    there = np.isfinite(system) & np.isfinite(neutral)
    prompts = np.broadcast_to(np.arange(len(system))[:, None], system.shape)[there]
    rows, n_prompts = 2 * int(there.sum()), len(np.unique(prompts))
    if n_prompts < 3 or len(np.unique(tokens[there])) < 3:
        return {"reason": "fewer than three prompts, or three lengths", "rows": rows, "prompts": n_prompts}
    try:
        from statsmodels.regression.mixed_linear_model import MixedLM
    except ImportError:
        return {"reason": _NO_STATSMODELS, "rows": rows, "prompts": n_prompts}
    long, own = np.tile(tokens[there] / 100, 2), np.repeat([1.0, 0.0], rows // 2)
    effect = np.concatenate([system[there], neutral[there]])
    design = np.column_stack([np.ones(rows), long, own, long * own])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is in `converged`
        try:
            fitted = MixedLM(effect, design, np.tile(prompts, 2)).fit(reml=True)
        except (np.linalg.LinAlgError, ValueError) as error:
            return {"reason": f"the model could not be fitted: {error}", "rows": rows, "prompts": n_prompts}
        intervals = fitted.conf_int()
    found: dict[str, Any] = {"converged": bool(fitted.converged), "rows": rows, "prompts": n_prompts}
    found["random_effect_sd"] = float(np.sqrt(max(0.0, np.asarray(fitted.cov_re)[0, 0])))
    for name, i in (("per_100_neutral", 1), ("per_100_beyond", 3)):
        low, high = map(float, intervals[i])
        interval = (low, high) if np.isfinite([low, high]).all() else None
        found[name] = Figure(float(fitted.fe_params[i]), interval, n_prompts, rows)
    return found
