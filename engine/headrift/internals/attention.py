"""Where a model looks while it answers, by layer, head and step: the engine's attention masses and entropies.

Regions: the system prompt (or the neutral text in its place), the question, the template around them, the last five
tokens of the prompt (which are also in the template or the question), and the answer so far (`generated`: what is left
to 1, a sink's part included). A long region gets more attention for its length alone, so each is also given per token:
1 is what a token gets on average.

Entropy is over all keys, in nats, where a longer prompt has more for its length alone, and relative to the logarithm of
the number of keys that a head may see (fewer with a sliding window): 1 is the same attention to every key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from headrift.internals.cases import CHECK, Case, Rendering
from headrift.internals.comparing import NEUTRAL, SYSTEM, columns
from headrift.internals.estimates import Estimates, PromptBootstrap, column, list_column, nan_mean
from headrift.prepare import Prompt
from headrift.results import Rejected, ScoreResult
from headrift.scorer import Scorer
from headrift.stats import Floats

REGIONS = ("system", "user", "template", "last_five", "generated")
KINDS = (SYSTEM, NEUTRAL)
# When entropies are taken: at step 0, and at the tokens of the answer (mean).
WHEN = ("last prompt token", "answer")
_LAST = 5
_PER_TOKEN = len(REGIONS) - 1  # `generated` has no fixed number of tokens


def open_scorer(model: Path, steps: int, dtype: str, verbose: bool) -> Scorer:
    """Start the engine that `records` and sentences.measure_instability need."""
    return Scorer(
        model,
        steps=steps,
        keep_mass=True,
        attention_entropy=True,
        regions=("last_five",),
        engine_args={} if dtype == "auto" else {"dtype": dtype},
        verbose=verbose,
    )


def make_prompts(cases: Sequence[Case]) -> Iterator[Prompt]:
    """Each case with its system prompt, then each with neutral text: the order of `records`."""
    for kind in KINDS:
        for case in cases:
            rendering = _rendering(case, kind)
            yield Prompt(token_ids=rendering.token_ids, regions=_regions(rendering))


def _rendering(case: Case, kind: str) -> Rendering:
    return case.system if kind == SYSTEM else case.neutral


def _regions(rendering: Rendering) -> dict[str, tuple[int, int]]:
    assert rendering.system is not None
    n = len(rendering.token_ids)
    return {"system": rendering.system, "user": rendering.question, "last_five": (max(0, n - _LAST), n)}


def records(name: str, cases: Sequence[Case], results: Iterator[ScoreResult | Rejected]) -> Iterator[dict[str, Any]]:
    """Make a record (see `schema`) of each result of `make_prompts`; none of what the engine rejected."""
    for kind in KINDS:
        for case, result in zip(cases, results):
            if isinstance(result, Rejected):
                continue
            rendering = _rendering(case, kind)
            tokens = {region: end - start for region, (start, end) in _regions(rendering).items()}
            tokens["template"] = len(rendering.token_ids) - tokens["system"] - tokens["user"]
            mass, entropy = region_masses(result), result.attention_entropy
            assert entropy is not None
            yield {
                "system": name,
                "prompt": case.question.number,
                "id": case.question.id,
                "kind": kind,
                "prompt_tokens": len(rendering.token_ids),
                "region_tokens": [tokens[region] for region in REGIONS[:-1]],
                "steps": len(mass),
                "mass": mass.astype(np.float16).ravel(),
                "entropy": entropy.astype(np.float16).ravel(),
            }


def region_masses(result: ScoreResult) -> Floats:
    """A result's masses [steps, layers, heads, REGIONS]."""
    assert result.mass is not None
    by_name = {name: result.mass[..., i].astype(np.float64) for i, name in enumerate(result.region_names)}
    by_name["template"] = by_name["prompt"] - by_name["system"] - by_name["user"]
    by_name["generated"] = 1 - by_name["prompt"]
    return np.stack([by_name[region] for region in REGIONS], -1)


def schema(layers: int, heads: int, windows: Sequence[int | None]) -> pa.Schema:
    """Columns of a part, step 0 first. windows: the most keys that a layer's queries see, None for all."""
    scalars = columns("system string, prompt int32, id string, kind string, prompt_tokens int32")
    halfs = pa.list_(pa.float16())
    lists = [("region_tokens", pa.list_(pa.int32())), ("steps", pa.int16()), ("mass", halfs), ("entropy", halfs)]
    shapes = {"mass": "steps, layers, heads, regions", "entropy": "steps, layers, heads"}
    metadata = {"layers": layers, "heads": heads, "windows": windows, "regions": REGIONS, "shapes": shapes}
    return pa.schema([*scalars, *lists], metadata={b"headrift": json.dumps(metadata).encode()})


@dataclass(frozen=True, slots=True)
class RegionSummary:
    """Attention to regions; CHECK is left out."""

    rows: int
    mass: dict[str, Estimates]  # by kind, mean over steps and heads [layers, REGIONS]
    per_token: dict[str, Estimates]  # the same relative to the average token, without `generated`
    by_step: dict[str, Floats]  # mean over layers and heads [steps, REGIONS], of the answers that reach the step
    answers: dict[str, list[int]]  # how many answers reach each step
    by_head: dict[str, Floats]  # mass on the system prompt, mean over steps [layers, heads]
    difference: Estimates  # of the system prompt's `per_token`, less neutral text's; mean over layers


def summarise_regions(table: pa.Table, bootstrap: PromptBootstrap) -> RegionSummary:
    """Summarise the masses of all parts."""
    metadata = json.loads(table.schema.metadata[b"headrift"])
    layers, heads = metadata["layers"], metadata["heads"]
    kinds, own = column(table, "kind"), column(table, "system") != CHECK
    number, tokens = column(table, "prompt"), column(table, "region_tokens").astype(float)
    lengths, masses = column(table, "prompt_tokens").astype(float), list_column(table, "mass")
    n_steps = int(column(table, "steps").max())
    mass, per_token, by_step, by_head, answers = ({} for _ in range(5))
    rows = 0
    for kind in KINDS:
        mass_sum, per_token_sum = (np.zeros((bootstrap.n, layers, n)) for n in (len(REGIONS), _PER_TOKEN))
        counts, step_sum, step_counts = np.zeros(bootstrap.n), np.zeros((n_steps, len(REGIONS))), np.zeros(n_steps, int)
        head_sum = np.zeros((layers, heads))
        for i in np.flatnonzero(own & (kinds == kind)):
            one = masses[i].astype(np.float64).reshape(-1, layers, heads, len(REGIONS))
            keys = lengths[i] + np.arange(len(one))
            mass_sum[number[i]] += one.mean((0, 2))
            per_token_sum[number[i]] += (one[..., :_PER_TOKEN] * keys[:, None, None, None] / tokens[i]).mean((0, 2))
            counts[number[i]] += 1
            head_sum += one[..., 0].mean(0)
            step_sum[: len(one)] += one.mean((1, 2))
            step_counts[: len(one)] += 1
        rows += int(counts.sum())
        n = np.where(counts > 0, counts, np.nan)[:, None, None]
        mass[kind], per_token[kind] = mass_sum / n, per_token_sum / n
        answers[kind] = [int(count) for count in step_counts if count]
        by_step[kind] = step_sum[: len(answers[kind])] / np.array(answers[kind])[:, None]
        by_head[kind] = head_sum / counts.sum()
    system, neutral = (per_token[kind][..., 0].mean(1) for kind in KINDS)
    return RegionSummary(
        rows=rows,
        mass={kind: bootstrap.mean(values, rows // 2) for kind, values in mass.items()},
        per_token={kind: bootstrap.mean(values, rows // 2) for kind, values in per_token.items()},
        by_step=by_step,
        answers=answers,
        by_head=by_head,
        difference=bootstrap.mean(system - neutral, rows),
    )


@dataclass(frozen=True, slots=True)
class EntropySummary:
    """Entropy of attention, mean over heads; CHECK is left out."""

    rows: int
    nats: dict[str, Estimates]  # by kind [layers, WHEN]
    relative: dict[str, Estimates]  # to the logarithm of the number of keys
    difference: Estimates  # of `relative`, system prompt less neutral text; mean over layers [WHEN]
    systems: list[str]
    by_system: Estimates  # the same by system prompt [systems, WHEN]


def summarise_entropy(table: pa.Table, bootstrap: PromptBootstrap) -> EntropySummary:
    """Summarise the entropies of all parts."""
    metadata = json.loads(table.schema.metadata[b"headrift"])
    windows = np.array([np.inf if window is None else window for window in metadata["windows"]])
    names = [name for name in dict.fromkeys(column(table, "system").tolist()) if name != CHECK]
    shape = (2, bootstrap.n, len(names), metadata["layers"], len(WHEN))  # nats and relative
    entropy = {kind: np.full(shape, np.nan) for kind in KINDS}
    rows = 0
    parts = (column(table, name) for name in ("system", "kind", "prompt", "prompt_tokens"))
    for values, system, kind, number, tokens in zip(list_column(table, "entropy"), *parts):
        if system == CHECK:
            continue
        nats = values.astype(np.float64).reshape(-1, metadata["layers"], metadata["heads"]).mean(-1)
        keys = np.minimum(tokens + np.arange(len(nats))[:, None], windows)
        for i, steps in enumerate((nats, nats / np.log(keys))):
            answer = steps[1:].mean(0) if len(steps) > 1 else np.full(len(windows), np.nan)
            entropy[kind][i, number, names.index(system)] = np.stack([steps[0], answer], -1)
        rows += 1
    system, neutral = (entropy[kind][1].mean(2) for kind in KINDS)
    nats, relative = ({kind: bootstrap.mean(nan_mean(entropy[kind][i]), rows // 2) for kind in KINDS} for i in range(2))
    return EntropySummary(
        rows=rows,
        nats=nats,
        relative=relative,
        difference=bootstrap.mean(nan_mean(system - neutral), rows),
        systems=names,
        by_system=bootstrap.mean(system - neutral, rows // len(names)),
    )
