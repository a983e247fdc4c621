"""Where a model looks while it answers, by layer, head and step: the engine's own masses (headrift.Scorer).

Regions: the system text (or the neutral text in its place), the question, the template around them, and the last five
tokens of the prompt, which are also in the template or the question; what is left to 1 went to the answer so far (and
to sinks, where a model has them). A long region gets more attention for its length alone, so each is also given per
token: 1 is what a token gets on average. And the entropy of each head's attention over all keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from headrift.internals.cases import Case
from headrift.internals.comparing import NEUTRAL, SYSTEM
from headrift.internals.renderings import Rendered
from headrift.preparing import Prompt
from headrift.results import Rejected, ScoreResult
from headrift.scorer import Scorer

REGIONS = ("system", "user", "template", "last_five", "generated")
LAST = 5
KINDS = (SYSTEM, NEUTRAL)


def scorer_of(model: Path, steps: int, dtype: str, verbose: bool) -> Scorer:
    """The engine that `measure` needs."""
    return Scorer(
        model,
        steps=steps,
        keep_mass=True,
        attention_entropy=True,
        regions=("last_five",),
        engine_args={} if dtype == "auto" else {"dtype": dtype},
        verbose=verbose,
    )


def prompts_of(cases: Sequence[Case]) -> Iterator[Prompt]:
    """Each case with its system text and with neutral text, in the order of `measure`'s results."""
    for kind in KINDS:
        for case in cases:
            rendered = case.system if kind == SYSTEM else case.neutral
            yield Prompt(token_ids=rendered.token_ids, regions=_regions(rendered))


def _regions(rendered: Rendered) -> dict[str, tuple[int, int]]:
    assert rendered.system is not None
    n = len(rendered.token_ids)
    return {"system": rendered.system, "user": rendered.question, "last_five": (max(0, n - LAST), n)}


def measure(name: str, cases: Sequence[Case], results: Iterator[ScoreResult | Rejected]) -> Iterator[dict[str, Any]]:
    """A record (see `schema`) of each result; nothing for what the engine rejected."""
    for kind in KINDS:
        for case, result in zip(cases, results):
            if isinstance(result, Rejected):
                continue
            rendered = case.system if kind == SYSTEM else case.neutral
            spans = _regions(rendered)
            lengths = {region: end - start for region, (start, end) in spans.items()}
            lengths["template"] = len(rendered.token_ids) - lengths["system"] - lengths["user"]
            mass, entropy = masses(result), result.attention_entropy
            assert entropy is not None
            yield {
                "system": name,
                "prompt": case.question.number,
                "id": case.question.id,
                "kind": kind,
                "prompt_tokens": len(rendered.token_ids),
                "region_tokens": [lengths[region] for region in REGIONS[:-1]],
                "steps": len(mass),
                "mass": mass.astype(np.float16).ravel(),
                "entropy": entropy.astype(np.float16).ravel(),
            }


def masses(result: ScoreResult) -> Any:
    """[steps, layers, heads, REGIONS] of a result."""
    assert result.mass is not None
    by_name = {name: result.mass[..., i].astype(np.float64) for i, name in enumerate(result.region_names)}
    by_name["template"] = by_name["prompt"] - by_name["system"] - by_name["user"]
    by_name["generated"] = 1 - by_name["prompt"]
    return np.stack([by_name[region] for region in REGIONS], -1)


def schema(layers: int, heads: int, windows: Sequence[int | None]) -> pa.Schema:
    """Columns of a part; `mass`, steps x layers x heads x regions, and `entropy` in nats, steps x layers x heads, are
    float16, step 0 (the last prompt token) first. windows: the most keys that a layer's queries see, None for all."""
    columns: list[tuple[str, Any]] = [
        ("system", pa.string()),
        ("prompt", pa.int32()),
        ("id", pa.string()),
        ("kind", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("region_tokens", pa.list_(pa.int32())),
        ("steps", pa.int16()),
        ("mass", pa.list_(pa.float16())),
        ("entropy", pa.list_(pa.float16())),
    ]
    shapes = {"mass": "steps, layers, heads, regions", "entropy": "steps, layers, heads"}
    about = {"layers": layers, "heads": heads, "windows": windows, "regions": REGIONS, "shapes": shapes}
    return pa.schema(columns, metadata={b"headrift": json.dumps(about).encode()})
