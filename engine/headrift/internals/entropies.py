"""What the entropy of attention says: by layer, with the system prompt and with neutral text in its place.

In nats a longer prompt has more of it for its length alone. Over the logarithm of the number of keys that a head may
see (fewer where a layer has a sliding window), 1 is attention that is the same to every key.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from headrift.internals.attention import KINDS
from headrift.internals.cases import CHECK
from headrift.internals.estimates import Figures, Floats, Prompts
from headrift.internals.tables import arrays, column

# At the last prompt token (step 0), and at the tokens of the answer behind it.
WHEN = ("last prompt token", "answer")


@dataclass(frozen=True, slots=True)
class Entropies:
    """rows: of the table, CHECK left out. nats and relative (over the logarithm of the keys): by kind means over heads,
    [layers, WHEN]. difference: of `relative`, system prompt less neutral text, mean over layers, [WHEN]; by_system: the
    same by system prompt, [systems, WHEN]."""

    rows: int
    nats: dict[str, Figures]
    relative: dict[str, Figures]
    difference: Figures
    systems: list[str]
    by_system: Figures


def entropies(table: pa.Table, n_prompts: int, prompts: Prompts) -> Entropies:
    """Of the rows of all parts."""
    about = json.loads(table.schema.metadata[b"headrift"])
    windows = np.array([np.inf if window is None else window for window in about["windows"]])
    names = [name for name in dict.fromkeys(column(table, "system")) if name != CHECK]
    found = {kind: np.full((2, n_prompts, len(names), about["layers"], len(WHEN)), np.nan) for kind in KINDS}
    keys = ("system", "kind", "prompt", "prompt_tokens")
    rows = 0
    for values, system, kind, number, tokens in zip(arrays(table, "entropy"), *(column(table, key) for key in keys)):
        if system == CHECK:
            continue
        of_steps = values.astype(np.float64).reshape(-1, about["layers"], about["heads"]).mean(-1)
        seen = np.minimum(tokens + np.arange(len(of_steps))[:, None], windows)
        at = number, names.index(system)
        for into, each in zip(found[kind], (of_steps, of_steps / np.log(seen))):
            into[at] = np.stack([each[0], each[1:].mean(0) if len(each) > 1 else np.full(len(windows), np.nan)], -1)
        rows += 1
    system, neutral = (found[kind][1].mean(2) for kind in KINDS)
    nats, relative = (
        {kind: prompts.mean(_over_systems(found[kind][i]), rows // 2) for kind in KINDS} for i in range(2)
    )
    return Entropies(
        rows=rows,
        nats=nats,
        relative=relative,
        difference=prompts.mean(_over_systems(system - neutral), rows),
        systems=names,
        by_system=prompts.mean(system - neutral, rows // len(names)),
    )


def _over_systems(values: Floats) -> Floats:
    """Means over the second axis, NaN left out."""
    there = np.isfinite(values)
    n = there.sum(1)
    return np.divide(np.where(there, values, 0.0).sum(1), n, out=np.full(n.shape, np.nan), where=n > 0)
