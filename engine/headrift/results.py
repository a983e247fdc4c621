"""What scoring a prompt gives: its score with everything it came from, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """A prompt's score and what it came from. T = n_steps + 1 recorded steps, step 0 (the last prompt token) first.

    score: mean counted instability over the window's steps and the trimmed layers, 0 to 0.5, or None with `reason`.
    n_scored: steps that went into it. system_share, head_agreement, entropy (nats), top1, margin: means over the
    window; focus: at step 0. instability: [T, layers] float32, NaN where a layer is not counted. shares: [T, layers,
    heads] float32. focus_heads: [layers, heads] float32. logit_stats: [T, 3] entropy, top-1 probability, margin, or
    None. mass: [T, layers, heads, regions] float32 with the regions in the order of `region_names`, NaN for those that
    the prompt does not have, or None. attention_entropy: [T, layers, heads] float32, the entropy (nats) of each head's
    softmax over the keys that it may see (see `Recording.row_entropy` for sinks), or None. flags: those of `prompts`;
    `truncated` where the answer did not end by the last recorded step, or within max_new_tokens; `stopped` where
    `stop_if` ended it.
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
    system_share: float | None
    head_agreement: float | None
    focus: float | None
    entropy: float | None
    top1: float | None
    margin: float | None
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


@dataclass(frozen=True, slots=True)
class Rejected:
    """A prompt that could not be scored: `reason` is a code, `detail` says what is wrong and what to do."""

    index: int
    id: str | None
    reason: str
    detail: str
