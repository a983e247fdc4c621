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
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrift.internals.cases import CHECK, Case, Rendering
from headrift.internals.comparing import NEUTRAL, SYSTEM, Record
from headrift.internals.estimates import column, over_prompts, over_systems
from headrift.prepare import Prompt
from headrift.prompts import Span
from headrift.results import ScoreResult
from headrift.runs.folder import OnRows, columns, ignore_rows, list_column
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


def score(
    scorer: Scorer, prompts: Iterable[Prompt], on_rows: OnRows = ignore_rows, *, replay: bool = False
) -> Generator[ScoreResult | None, None, None]:
    """Score prompts; results in order, None for what the engine rejected."""
    with closing(scorer.score(prompts, replay=replay)) as results:
        for result in results:
            on_rows(1)
            yield result if isinstance(result, ScoreResult) else None


def renderings(cases: Sequence[Case]) -> Iterator[tuple[str, Case, Rendering]]:
    """Each case with its system prompt, then each with neutral text: kind, case and rendering."""
    for kind in KINDS:
        for case in cases:
            yield kind, case, case.system if kind == SYSTEM else case.neutral


def make_prompts(cases: Sequence[Case]) -> Iterator[Prompt]:
    """The prompt of each of `renderings`."""
    return (Prompt(token_ids=one.token_ids, regions=_regions(one)) for _, _, one in renderings(cases))


def _regions(rendering: Rendering) -> dict[str, Span]:
    n = len(rendering.token_ids)
    return {"system": rendering.system, "user": rendering.question, "last_five": (max(0, n - _LAST), n)}


def records(name: str, cases: Sequence[Case], results: Iterator[ScoreResult | None]) -> Iterator[Record]:
    """Make a record (see `schema`) of each result of `make_prompts`; none of what the engine rejected."""
    for (kind, case, rendering), result in zip(renderings(cases), results):
        if result is None:
            continue
        tokens = {region: end - start for region, (start, end) in _regions(rendering).items()}
        tokens["template"] = len(rendering.token_ids) - tokens["system"] - tokens["user"]
        mass, entropy = region_masses(result), result.attention_entropy
        assert entropy is not None
        yield case.question.record(name) | {
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


# A row of a table of all parts: kind; numbers of the prompt and, without CHECK, of the system prompt; keys that a query
# sees [steps]; tokens of REGIONS, without `generated`; values [steps, layers, heads, ...].
_Row = tuple[str, tuple[int, int], Floats, NDArray[np.int32], Floats]


def _read_rows(table: pa.Table, name: str, *shape: int) -> tuple[list[str], int, Iterator[_Row]]:
    """Names of system prompts, number of rows, and the rows with a column's values [steps, *shape]; without CHECK's."""
    table = table.filter(pa.array(column(table, "system") != CHECK))
    kinds, prompts, systems, tokens = (table[one].to_pylist() for one in ("kind", "prompt", "system", "prompt_tokens"))
    names = list(dict.fromkeys(systems))
    values = [one.reshape(-1, *shape) for one in list_column(table, name)]
    keys = (n + np.arange(float(len(steps))) for n, steps in zip(tokens, values))
    places = zip(prompts, map(names.index, systems))
    as_floats = (one.astype(np.float64) for one in values)
    return names, len(values), zip(kinds, places, keys, list_column(table, "region_tokens"), as_floats)


def summarise_regions(table: pa.Table, n_prompts: int) -> dict[str, Any]:
    """Summarise the masses of all parts, without CHECK's, by kind."""
    metadata = json.loads(table.schema.metadata[b"headrift"])
    layers, heads = metadata["layers"], metadata["heads"]
    names, n_rows, rows = _read_rows(table, "mass", layers, heads, len(REGIONS))
    mass, per_token = (
        {kind: np.full((n_prompts, len(names), layers, n), np.nan) for kind in KINDS}
        for n in (len(REGIONS), _PER_TOKEN)
    )
    steps: dict[str, list[Floats]] = {kind: [] for kind in KINDS}
    by_head = {kind: np.zeros((layers, heads)) for kind in KINDS}
    for kind, place, keys, tokens, one in rows:
        mass[kind][place] = one.mean((0, 2))
        per_token[kind][place] = (one[..., :_PER_TOKEN] * keys[:, None, None, None] / tokens).mean((0, 2))
        steps[kind].append(one.mean((1, 2)))
        by_head[kind] += one[..., 0].mean(0)
    reaching = {
        kind: [[one[i] for one in own if i < len(one)] for i in range(max(map(len, own), default=0))]
        for kind, own in steps.items()
    }
    system, neutral = (per_token[kind][..., 0].mean(2) for kind in KINDS)
    return {
        "rows": n_rows,
        # Mean over steps and heads [layers, REGIONS]; and relative to the average token, without `generated`.
        "mass": {kind: over_systems(values) for kind, values in mass.items()},
        "per_token": {kind: over_systems(values) for kind, values in per_token.items()},
        # Mean over layers and heads [steps, REGIONS], of the answers that reach the step, and how many do.
        "by_step": {kind: np.array([np.mean(one, 0) for one in own]) for kind, own in reaching.items()},
        "answers": {kind: [len(one) for one in own] for kind, own in reaching.items()},
        "by_head": {kind: by_head[kind] / len(own) for kind, own in steps.items()},  # on the system prompt
        # Of `per_token` of the system prompt, less that of neutral text; mean over layers.
        "difference": over_systems(system - neutral, rows=n_rows),
    }


def summarise_entropy(table: pa.Table, n_prompts: int) -> dict[str, Any]:
    """Summarise the entropies of all parts, without CHECK's, mean over heads."""
    metadata = json.loads(table.schema.metadata[b"headrift"])
    windows = np.array([np.inf if window is None else window for window in metadata["windows"]])
    names, n_rows, rows = _read_rows(table, "entropy", metadata["layers"], metadata["heads"])
    shape = 2, n_prompts, len(names), metadata["layers"], len(WHEN)
    entropy = {kind: np.full(shape, np.nan) for kind in KINDS}
    for kind, place, keys, _, values in rows:
        nats = values.mean(-1)
        relative = nats / np.log(np.minimum(keys[:, None], windows))
        for i, steps in enumerate((nats, relative)):
            answer = steps[1:].mean(0) if len(steps) > 1 else np.full(len(windows), np.nan)
            entropy[kind][i, *place] = np.stack([steps[0], answer], -1)
    system, neutral = (entropy[kind][1].mean(2) for kind in KINDS)
    return {
        "rows": n_rows,
        # By kind [layers, WHEN]; relative to ln(keys).
        "nats": {kind: over_systems(values[0]) for kind, values in entropy.items()},
        "relative": {kind: over_systems(values[1]) for kind, values in entropy.items()},
        # Of `relative`, system prompt less neutral text, mean over layers [WHEN]; and by system prompt.
        "difference": over_systems(system - neutral, rows=n_rows),
        "systems": names,
        "by_system": over_prompts(system - neutral, n_rows // len(names)),
    }
