"""Features of a prompt's attention: the pattern of its heads' shares, of which instability keeps only the size.

From the log-odds x of each head's share (see `signal.log_odds`) come

- for each head, x minus the mean of x over the heads of its layer, at step 0 and, if steps were recorded, the same of
  the mean of x over the window's steps;
- for each layer, the log-odds of its mean share at step 0 minus those of a share by length alone (system tokens over
  prompt tokens), which is what attention spread evenly would give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headrift import signal
from headrift.results import ScoreResult
from headrift.signal import Window
from headrift.stats import Bools, Floats, Ints


def logit_shares(share: ArrayLike, counted: ArrayLike, window: Window, n_steps: int) -> NDArray[np.float32]:
    """Log-odds of the heads' shares: what is kept of a prompt for detectors.

    Args:
        share: [rows, layers, heads], step 0 first.
        counted: bool [rows, layers].
        window: the steps to average over, possibly none.
        n_steps: index of the answer's last recorded step.

    Returns:
        [1 or 2, layers, heads]: at step 0 and, if the answer has steps of the window, their mean; NaN for a layer that
        is not counted.
    """
    log_odds = np.where(np.asarray(counted, np.bool_)[..., None], signal.log_odds(share), np.nan)
    in_window = log_odds[window.start : min(window.end, n_steps) + 1]
    means = [in_window.mean(axis=0)] if len(in_window) else []
    return np.stack([log_odds[0], *means]).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Prompts:
    """What detectors read of n prompts.

    Attributes:
        values: [n] by name of the signal, NaN for none.
        uniform: [n] system tokens over prompt tokens.
        logit_shares: [n, 1 or 2, layers, heads] of `logit_shares`, NaN for what a prompt does not have; or None.
        focus_heads: [n, layers, heads] system / (system + user) at step 0; or None.
    """

    values: Mapping[str, Floats]
    uniform: Floats
    logit_shares: NDArray[np.float32] | None = None
    focus_heads: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.uniform)

    @classmethod
    def joined(cls, parts: Sequence[Prompts]) -> Prompts:
        """Several batches as one."""

        def join(name: str) -> NDArray[np.float32] | None:
            arrays = [getattr(part, name) for part in parts]
            return None if any(array is None for array in arrays) else np.concatenate(arrays)

        values = {name: np.concatenate([part.values[name] for part in parts]) for name in parts[0].values}
        uniform = np.concatenate([part.uniform for part in parts])
        return cls(values, uniform, join("logit_shares"), join("focus_heads"))

    def take(self, index: Ints) -> Prompts:
        """Some of the prompts."""
        return replace(
            self,
            values={name: column[index] for name, column in self.values.items()},
            uniform=self.uniform[index],
            logit_shares=None if self.logit_shares is None else self.logit_shares[index],
            focus_heads=None if self.focus_heads is None else self.focus_heads[index],
        )


def prompts_of(results: Sequence[ScoreResult]) -> Prompts:
    """What detectors read of results, all of one model and window."""

    names = results[0].signals
    scores = {name: [result.signals.get(name) for result in results] for name in names}
    scores["instability"] = [result.score for result in results]
    return Prompts(
        {name: np.array(column, np.float64) for name, column in scores.items()},
        np.array([result.system_tokens / result.prompt_tokens for result in results]),
        _stack([result.logit_shares for result in results]),
        _stack([result.focus_heads for result in results]),
    )


def _stack(arrays: Sequence[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    """Arrays as one, NaN for what one does not have; None if there is none."""
    largest = max((array for array in arrays if array is not None), key=len, default=None)
    if largest is None:
        return None
    stacked = np.full((len(arrays), *largest.shape), np.nan, np.float32)
    for row, array in zip(stacked, arrays):
        if array is not None:
            row[: len(array)] = array
    return stacked


def features(prompts: Prompts, layers: Ints, *, windowed: bool) -> Floats:
    """The features of prompts over the layers that count.

    Args:
        prompts: n prompts with `logit_shares`.
        layers: [l] the layers to use.
        windowed: whether to add those of the window.

    Returns:
        [n, l * heads (twice if windowed) + l], heads fastest: step 0, the window, then the layers. NaN if a prompt does
        not have them.
    """
    assert prompts.logit_shares is not None
    blocks = prompts.logit_shares[:, : 1 + windowed, layers].astype(np.float64)
    if blocks.shape[1] == windowed:  # no prompt has steps of the window
        blocks = np.concatenate([blocks, np.full_like(blocks, np.nan)], axis=1)
    centred = (blocks - blocks.mean(axis=3, keepdims=True)).reshape(len(prompts), -1)
    mean_share = (1 / (1 + np.exp(-blocks[:, 0]))).mean(axis=2)
    return np.concatenate([centred, signal.log_odds(mean_share) - signal.log_odds(prompts.uniform)[:, None]], axis=1)


def counted_layers(prompts: Prompts) -> Ints:
    """The layers that count in every prompt that has shares."""
    assert prompts.logit_shares is not None
    missing: Bools = np.asarray(np.isnan(prompts.logit_shares[:, 0]).any(axis=2))
    return np.flatnonzero(~missing[~missing.all(axis=1)].any(axis=0))
