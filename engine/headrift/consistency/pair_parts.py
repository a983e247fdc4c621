"""The Parquet files of scored pairs: a row a pair, and beside them the pairs that could not be scored.

`distance_l2`, `distance_tv` (steps x layers x heads, step 0 first, as many steps as `n_steps` + 1) and `clean_mass`,
`wrapped_mass` (each side's own steps x layers x heads x core, wrapper, system) are flattened; the metadata, JSON under
b"headrift", holds `layers`, `heads` and the `shapes`. `distance` is the mean of all of `distance_tv`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pyarrow as pa

from headrift.aligned_keys import L2, TV
from headrift.consistency.answers import flipped, is_hinted, is_right
from headrift.consistency.pairs import RejectedPair
from headrift.consistency.scoring import PairScore

_STRING, _BOOL, _COUNT, _FLOAT = pa.string(), pa.bool_(), pa.int32(), pa.float64()
_HEADS = pa.list_(pa.float32())
_COLUMNS = {
    "id": _STRING,
    "question": _STRING,
    "family": _STRING,
    "wrapper": _STRING,
    "clean_tokens": _COUNT,
    "wrapped_tokens": _COUNT,
    "core_tokens": _COUNT,
    "wrapper_tokens": _COUNT,
    "clean_answer": _STRING,
    "wrapped_answer": _STRING,
    "flipped": _BOOL,
    "clean_right": _BOOL,  # null, as wrapped_right, without an answer key
    "wrapped_right": _BOOL,
    "hinted": _BOOL,  # null where no wrong answer was hinted at
    "n_steps": _COUNT,
    "distance": _FLOAT,
    "clean_instability": _FLOAT,
    "wrapped_instability": _FLOAT,
    "clean_focus": _FLOAT,
    "wrapped_focus": _FLOAT,
    "distance_l2": _HEADS,
    "distance_tv": _HEADS,
    "clean_mass": _HEADS,
    "wrapped_mass": _HEADS,
}
_REJECTS = pa.schema([(name, _COUNT if name == "row" else _STRING) for name in (f.name for f in fields(RejectedPair))])


def schema(layers: int, heads: int, steps: int) -> pa.Schema:
    """Columns of a part, of a model's layers and heads, with steps 0..`steps` at most."""
    of_heads = ["n_steps + 1", "layers", "heads"]
    masses = {f"{side}_mass": ["steps of its answer, at most steps + 1", *of_heads[1:], "core, wrapper, system"]
              for side in ("clean", "wrapped")}  # fmt: skip
    about = {
        "layers": layers,
        "heads": heads,
        "steps": steps,
        "shapes": {"distance_l2": of_heads, "distance_tv": of_heads, **masses},
    }
    return pa.schema(list(_COLUMNS.items()), metadata={b"headrift": json.dumps(about).encode()})


def record(score: PairScore, decode: Callable[..., str]) -> dict[str, Any]:
    """A pair's row. decode: token ids to text, as tokenizers do it."""
    pair, key = score.pair, score.pair.key
    clean, wrapped = (
        decode(side.answer_ids, skip_special_tokens=True).strip() for side in (score.clean, score.wrapped)
    )
    return {
        "id": pair.id,
        "question": pair.question,
        "family": pair.family,
        "wrapper": pair.wrapper_name,
        "clean_tokens": len(pair.clean_ids),
        "wrapped_tokens": len(pair.wrapped_ids),
        "core_tokens": pair.core.length,
        "wrapper_tokens": sum(end - start for start, end in pair.wrapper),
        "clean_answer": clean,
        "wrapped_answer": wrapped,
        "flipped": flipped(clean, wrapped, key),
        "clean_right": None if key is None else is_right(clean, key),
        "wrapped_right": None if key is None else is_right(wrapped, key),
        "hinted": None if key is None or not pair.hints else is_hinted(wrapped, key),
        "n_steps": len(score.distance) - 1,
        "distance": float(score.distance[..., TV].mean(dtype=np.float64)),
        "clean_instability": score.clean.instability,
        "wrapped_instability": score.wrapped.instability,
        "clean_focus": score.clean.focus,
        "wrapped_focus": score.wrapped.focus,
        "distance_l2": score.distance[..., L2].ravel(),
        "distance_tv": score.distance[..., TV].ravel(),
        "clean_mass": score.clean.mass.ravel(),
        "wrapped_mass": score.wrapped.mass.ravel(),
    }


def rejects_table(rejected: Sequence[RejectedPair]) -> pa.Table:
    """Rows and pairs that cannot be scored: id, source, row, reason (a code), detail (what to do)."""
    return pa.Table.from_pylist([asdict(each) for each in rejected], schema=_REJECTS)
