"""What the language-model head reads at the last prompt token, kept on the device: of it only angles leave."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch

from headrift import subspace
from headrift.vllm_plugin.recorder import Recorder


def install(model: Any, recorder: Recorder) -> None:
    """Have the model's `compute_logits` keep the hidden states of the rows that ask for it.

    Both of vLLM's runners call it, outside any captured graph, once a step with the rows of the batch in order: the
    last hidden state of each, after the final norm. Later calls of a step are for prompt log-probabilities.
    """
    compute_logits = model.compute_logits
    seen: np.ndarray | None = None

    @wraps(compute_logits)
    def keeping(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        if recorder.slots is not seen:  # every published step has an array of its own
            seen = recorder.slots
            keep(recorder, hidden)
        return compute_logits(hidden, *args, **kwargs)

    model.compute_logits = keeping


def keep(recorder: Recorder, hidden: torch.Tensor) -> None:
    """Keep the hidden states [rows of the running step, width] of rows at step 0 whose request asks for it.

    Rows of a prompt's earlier chunks are told apart on the device. Enqueues its work and waits for nothing.
    """
    slots = recorder.slots
    rows = np.flatnonzero((slots >= 0) & (recorder.hiddens[slots] >= 0))
    if not len(rows):
        return
    at = recorder.index(np.stack([rows, recorder.hiddens[slots[rows]]]))
    step = recorder.row_step.index_select(0, at[0]).unsqueeze(1)
    before = recorder.hidden.index_select(0, at[1])
    recorder.hidden.index_copy_(0, at[1], torch.where(step == 0, hidden.index_select(0, at[0]).float(), before))


def turned(
    recorder: Recorder, clean: Sequence[int], ablated: Sequence[Sequence[int]], r_main: int
) -> list[list[float]]:
    """`subspace.turned` of kept hidden states, by the numbers of their rows; a row that was not kept gives NaN."""
    at = recorder.index(np.array([clean, *ablated]))
    states = recorder.hidden.index_select(0, at.flatten()).view(*at.shape, -1)
    found: list[list[float]] = subspace.turned(states[0], states[1:], r_main).tolist()
    return found
