"""The ranks of one engine put together: each holds some of the model's layers and heads, and says which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import load

# The axis of the layers, after which comes that of the heads, by the array's name.
_LAYER_AXIS = {"share": 2, "first": 1, "mass": 2, "distance": 2, "row_entropy": 2}
# What comes from the one rank that has the logits.
_OF_LOGITS = {"stats", "divergence"}


class RanksError(RuntimeError):
    """The ranks' answers do not make up one model: an error in headrift or in vLLM, never in the input."""


def merge_descriptions(described: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The whole model and its recorder, from each rank's `headrift_describe`.

    layers, heads: how many the model has. windows: of each layer. sinks: whether any head has one. recorder_bytes: over
    all ranks. dtype. RanksError where layers and heads of the ranks do not add up, or the ranks disagree.
    """
    layers = 1 + max(max(rank["layers"]) for rank in described)
    heads = 1 + max(max(rank["heads"]) for rank in described)
    _check_cover(described, layers, heads)
    dtypes = {rank["dtype"] for rank in described}
    windows: dict[int, set[int | None]] = {}
    for rank in described:
        for layer, window in zip(rank["layers"], rank["windows"], strict=True):
            windows.setdefault(layer, set()).add(window)
    if len(dtypes) > 1 or any(len(found) > 1 for found in windows.values()):
        raise RanksError(f"ranks of one engine differ in dtype or in the layers' windows: {list(described)}")
    return {
        "layers": layers,
        "heads": heads,
        "windows": [windows[layer].pop() for layer in range(layers)],
        "sinks": any(rank["sinks"] for rank in described),
        "recorder_bytes": sum(rank["recorder_bytes"] for rank in described),
        "dtype": dtypes.pop(),
    }


def merge_recordings(answers: Sequence[bytes], layers: int, heads: int) -> dict[str, np.ndarray]:
    """All ranks' `headrift_fetch` of one ticket as the arrays of one rank with the whole model, by name.

    share: [n, rows, layers, heads]; first: [n, layers, heads, regions - 1]; astray: [n]; stats: [n, rows, 3]; mass: [n,
    rows, layers, heads, regions], where it was asked for; divergence: [n], where references are kept; distance: [n,
    rows, layers, heads, 2], where attention rows are; row_entropy: [n, rows, layers, heads], where it is taken.
    RanksError where the answers are not of the same requests, or a layer and head is missing or there twice.
    """
    parts = [load(answer) for answer in answers]
    kinds = {(frozenset(part) - _OF_LOGITS, *part["share"].shape[:2], part["tenants"].tobytes()) for part in parts}
    if len(kinds) > 1:
        raise RanksError(f"the {len(parts)} ranks answered with different requests, steps or arrays")
    stats = [{name: part[name] for name in _OF_LOGITS & part.keys()} for part in parts if "stats" in part]
    if len(stats) != 1:
        raise RanksError(f"{len(stats)} ranks answered with next-token statistics; one of them has the logits")
    _check_cover(parts, layers, heads)
    whole = stats[0] | {"astray": np.max([part["astray"] for part in parts], axis=0)}
    for name, axis in _LAYER_AXIS.items():
        if name not in parts[0]:
            continue
        shape = list(parts[0][name].shape)
        shape[axis : axis + 2] = layers, heads
        whole[name] = np.empty(shape, np.float32)
        for part in parts:
            whole[name][(*[slice(None)] * axis, *np.ix_(part["layers"], part["heads"]))] = part[name]
    return whole


def _check_cover(parts: Sequence[Mapping[str, Any]], layers: int, heads: int) -> None:
    """Every layer and head lies in exactly one of the parts."""
    cells = [np.add.outer(np.multiply(part["layers"], heads), part["heads"]).ravel() for part in parts]
    if not np.array_equal(np.sort(np.concatenate(cells)), np.arange(layers * heads)):
        ranks = "; ".join(f"layers {[*map(int, part['layers'])]} heads {[*map(int, part['heads'])]}" for part in parts)
        raise RanksError(f"the ranks do not make up {layers} layers of {heads} heads: {ranks}")
