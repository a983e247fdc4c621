"""What scoring a prompt gives: its score with everything it came from, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

_OPTIONAL = ("focus_heads", "logit_stats", "mass", "attention_entropy")
_NOTHING = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """A prompt's score and what it came from, over T = n_steps + 1 recorded steps; step 0 is the last prompt token.

    Attributes:
        score: mean counted instability over the window's steps and the trimmed layers, 0 to 0.5, or None with `reason`.
        n_scored: steps that went into it.
        signals: Every signal that is a column of scored parts, by name; None if the data does not have it. The ones
            that have been there from the start are attributes too.
        flags: those of `prompts`; `truncated` if the answer did not end by the last recorded step, or within
            max_new_tokens; `stopped` if `stop_if` ended it.
        instability: [T, layers] float32, NaN where a layer is not counted.
        shares: [T, layers, heads] float32.
        focus_heads: [layers, heads] float32 at step 0, or None.
        logit_stats: [T, 3] entropy (nats), top-1 probability, margin, or None.
        mass: [T, layers, heads, regions] float32 with the regions in the order of `region_names`, NaN for those that
            the prompt does not have, or None.
        attention_entropy: [T, layers, heads] float32, the entropy (nats) of each head's softmax over the keys that it
            may see (see `Recording.row_entropy` for sinks), or None.
        logit_shares: [1 or 2, layers, heads] float32 for detectors: the log-odds of the shares at step 0 and, unless
            only step 0 was recorded, their mean over the window's steps; NaN where there is none.
    """

    index: int
    id: str | None
    score: float | None
    reason: str | None
    n_steps: int
    n_scored: int
    prompt_tokens: int
    system_tokens: int
    answer_tokens: int
    system_hash: str
    signals: Mapping[str, float | None]
    flags: tuple[str, ...]
    answer_ids: list[int] = field(repr=False)
    text: str
    instability: np.ndarray = field(repr=False)
    shares: np.ndarray = field(repr=False)
    focus_heads: np.ndarray | None = field(repr=False)
    logit_stats: np.ndarray | None = field(repr=False)
    mass: np.ndarray | None = field(repr=False)
    region_names: tuple[str, ...]
    attention_entropy: np.ndarray | None = field(default=None, repr=False)
    logit_shares: np.ndarray | None = field(default=None, repr=False)

    @property
    def system_share(self) -> float | None:
        """Mean of the heads' share over the window and the trimmed layers, 0 to 1."""
        return self.signals.get("system_share")

    @property
    def head_agreement(self) -> float | None:
        """Mean pairwise correlation of the heads over the window, -1 to 1."""
        return self.signals.get("head_agreement")

    @property
    def focus(self) -> float | None:
        """Attention Tracker's focus score over all heads at step 0, 0 to 1."""
        return self.signals.get("focus")

    @property
    def entropy(self) -> float | None:
        """Mean next-token entropy over the window, in nats."""
        return self.signals.get("entropy")

    @property
    def top1(self) -> float | None:
        """Mean probability of the most likely next token over the window."""
        return self.signals.get("top1")

    @property
    def margin(self) -> float | None:
        """Mean over the window of that probability less the second most likely token's."""
        return self.signals.get("margin")

    def slim(self, keep: Collection[str]) -> ScoreResult:
        """A copy without arrays but `instability`, `logit_shares` and those named, for the way to another process."""
        dropped: dict[str, Any] = {name: None for name in _OPTIONAL if name not in keep}
        return replace(self, shares=self.shares if "shares" in keep else _NOTHING, **dropped)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A prompt that could not be scored: `reason` is a code, `detail` says what is wrong and what to do."""

    index: int
    id: str | None
    reason: str
    detail: str
