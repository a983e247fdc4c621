"""Which heads of a request are ablated and how: the kinds, their checks, and the request's own part of the cache.

An ablation applies at every position of its request, prompt and answer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

EPSILON = 1e-5
UNDIFFERENTIATED, SCALING, MEAN_QUERY, MEAN_OUTPUT = "undifferentiated", "scaling", "mean_query", "mean_output"
# What a kind changes. undifferentiated: the head's query, after norm and rotary, times epsilon, so that it attends to
# all keys it may see alike. scaling: the head's output, after softmax(q k) v, times epsilon. mean_query, mean_output:
# either becomes the mean over the layer's query heads, each as it would be without the ablations of its layer.
SIDES = {UNDIFFERENTIATED: "query", SCALING: "output", MEAN_QUERY: "query", MEAN_OUTPUT: "output"}
MEANS = frozenset({MEAN_QUERY, MEAN_OUTPUT})

# Layer, query head and kind.
HeadAblation = tuple[int, int, str]


def check(ablate: Sequence[Any], epsilon: Any) -> None:
    """Raise ValueError unless this is a list of (layer, head, kind) and the factor of their queries and outputs."""
    changed = set()
    for entry in ablate:
        if not isinstance(entry, (list, tuple)) or len(entry) != 3:
            raise ValueError(f"an ablation is [layer, head, kind], as in [3, 0, '{UNDIFFERENTIATED}'], not {entry!r}")
        layer, head, kind = entry
        if kind not in SIDES:
            raise ValueError(f"there is no kind of ablation {kind!r}; choose {', '.join(SIDES)}")
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (layer, head)):
            raise ValueError(f"layers and heads are numbers from 0 on, not {entry!r}")
        side = SIDES[kind]
        if (layer, head, side) in changed:
            raise ValueError(f"the {side} of layer {layer} head {head} is ablated twice in one request; leave one out")
        changed.add((layer, head, side))
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not math.isfinite(epsilon):
        raise ValueError(f"epsilon is a number such as 1e-5, not {epsilon!r}")


def check_heads(heads: Sequence[Sequence[Any]], n_layers: int, n_heads: int) -> None:
    """Raise ValueError if a (layer, head, ...) does not exist in the model."""
    for layer, head, *_ in heads:
        if not 0 <= layer < n_layers or not 0 <= head < n_heads:
            raise ValueError(
                f"the model has no layer {layer} head {head}: it has layers 0 to {n_layers - 1}, each with "
                f"query heads 0 to {n_heads - 1}"
            )


def salt(ablate: Sequence[HeadAblation], epsilon: float) -> str | None:
    """What sets keys and values of an ablated request apart in the prefix cache; None without an ablation."""
    if not ablate:
        return None
    entries = json.dumps([sorted(map(list, ablate)), float(epsilon)])
    return "headrift ablation " + hashlib.sha256(entries.encode()).hexdigest()
