"""The ranks of one engine put together: each has some of the model's layers and heads, and says which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import load


class RanksError(RuntimeError):
    """The ranks' answers do not make up one model: an error in headrift or in vLLM, never in the input."""


def merge_descriptions(descriptions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge each rank's `headrift_describe` into the whole model's.

    Returns:
        layers, heads: how many the model has; windows: of each layer; sinks: whether any head has one; recorder_bytes:
        over all ranks; dtype.

    Raises:
        RanksError: layers and heads of the ranks do not add up, or the ranks disagree.
    """
    layers = 1 + max(max(rank["layers"]) for rank in descriptions)
    heads = 1 + max(max(rank["heads"]) for rank in descriptions)
    _check_cover(descriptions, layers, heads)
    dtypes = {rank["dtype"] for rank in descriptions}
    windows: dict[int, set[int | None]] = {}
    for rank in descriptions:
        for layer, window in zip(rank["layers"], rank["windows"], strict=True):
            windows.setdefault(layer, set()).add(window)
    if len(dtypes) > 1 or any(len(sizes) > 1 for sizes in windows.values()):
        raise RanksError(f"ranks of one engine differ in dtype or in the layers' windows: {list(descriptions)}")
    return {
        "layers": layers,
        "heads": heads,
        "windows": [windows[layer].pop() for layer in range(layers)],
        "sinks": any(rank["sinks"] for rank in descriptions),
        "recorder_bytes": sum(rank["recorder_bytes"] for rank in descriptions),
        "dtype": dtypes.pop(),
    }


def merge_recordings(answers: Sequence[bytes], layers: int, heads: int) -> dict[str, np.ndarray]:
    """Merge all ranks' `headrift_fetch` of one ticket into the arrays of `Recorder.gather` for the whole model.

    Raises:
        RanksError: the answers are not of the same requests, or a layer and head is missing or comes twice.
    """
    from headrift.vllm_plugin.instruments import recording_outputs

    parts, outputs = [load(answer) for answer in answers], recording_outputs()
    per_head = [{name for name in part if name in outputs and outputs[name].per_head} for part in parts]
    kinds = {
        (frozenset(names), *part["share"].shape[:2], part["requests"].tobytes()) for names, part in zip(per_head, parts)
    }
    if len(kinds) > 1:
        raise RanksError(f"the {len(parts)} ranks answered with different requests, steps or arrays")
    with_logits = [part for part in parts if part["logits"][0]]
    if len(with_logits) != 1:
        raise RanksError(f"{len(with_logits)} ranks have the logits; one of them has to")
    _check_cover(parts, layers, heads)
    merged = {name: array for name, array in with_logits[0].items() if name in outputs and not outputs[name].per_head}
    for name in per_head[0]:
        axis = 2 if outputs[name].per_step else 1
        shape = list(parts[0][name].shape)
        shape[axis : axis + 2] = layers, heads
        merged[name] = np.empty(shape, np.float32)
        for part in parts:
            merged[name][(*[slice(None)] * axis, *np.ix_(part["layers"], part["heads"]))] = part[name]
    return merged


def _check_cover(parts: Sequence[Mapping[str, Any]], layers: int, heads: int) -> None:
    """Check that every layer and head is in exactly one of the parts."""
    cells = [np.add.outer(np.multiply(part["layers"], heads), part["heads"]).ravel() for part in parts]
    if not np.array_equal(np.sort(np.concatenate(cells)), np.arange(layers * heads)):
        ranks = "; ".join(f"layers {[*map(int, part['layers'])]} heads {[*map(int, part['heads'])]}" for part in parts)
        raise RanksError(f"the ranks do not make up {layers} layers of {heads} heads: {ranks}")
