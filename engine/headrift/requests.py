"""Requests to a probed engine, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from headrift import ablation, signal

# Prompt tokens in common: [other, other + length) of the other prompt are [own, own + length) of this one.
Run = tuple[int, int, int]
L2, TV = 0, 1  # indices of the distances of attention rows in an array of both


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """One request: the model answers greedily, or (with `answer_ids`) a logged answer is replayed in one prefill.

    Attributes:
        prompt_ids: P token ids.
        regions: Token ranges [start, end) by region name, of the engine's regions; `prompt` is always [0, P).
        steps: N; steps 0..N are recorded.
        answer_ids: The answer to replay; nothing is decoded.
        ignore_eos: Answer on past the end-of-text token.
        skip_prefix_cache: Compute every prompt token instead of reading cached ones.
        probed: False: answer, measure nothing.
        answer_tokens: Answer on past the recorded steps, to at most this many tokens (N + 1 or more).
        ablate: (layer, head, kind) of heads to ablate at every position, see `headrift.ablation`.
        epsilon: Factor of an ablated query or output.
        keep_as: Keep the next-token distribution at the last prompt token under this reference number.
        compare_with: Record how far that distribution is from the one kept under this reference number.
        hidden_as: Keep the last hidden state of the last prompt token, as the language-model head reads it, under this
            number; no other request in flight may use it.
        rows_as: Keep the attention rows of all heads at the recorded steps under this reference number.
        rows_against: Record how far the attention rows are from those kept under this reference number.
        aligned: The prompt tokens that both have, for `rows_against`: runs (start in the reference, start in this one,
            length), see `instruments.attention_rows`.
        row_entropy: Record the entropy of each head's attention row.
        logprobs: Return the log-probability of each prompt token.
    """

    prompt_ids: Sequence[int]
    regions: Mapping[str, tuple[int, int]]
    steps: int
    answer_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    skip_prefix_cache: bool = False
    probed: bool = True
    answer_tokens: int | None = None
    ablate: Sequence[ablation.HeadAblation] = ()
    epsilon: float = ablation.EPSILON
    keep_as: int | None = None
    compare_with: int | None = None
    hidden_as: int | None = None
    rows_as: int | None = None
    rows_against: int | None = None
    aligned: Sequence[Run] = ()
    row_entropy: bool = False
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that has run.

    Attributes:
        request_id: Its number, as `ProbedEngine.submit` returned it.
        request: What was submitted.
        answer_ids: The model's answer or the replayed one; its last token was never fed.
        finish_reason: vLLM's: "stop", "length", ...
        cached_tokens: Prompt tokens that were read from the prefix cache.
        answering: It has not finished: its steps are all recorded, and it answers on; answer_ids are those so far.
        logprobs: Log-probability (nats) of each prompt token from the second on, given those before it; None unless
            the request says `logprobs`.
    """

    request_id: int
    request: ProbeRequest
    answer_ids: list[int]
    finish_reason: str | None
    cached_tokens: int
    answering: bool = False
    logprobs: list[float] | None = None

    @property
    def n_steps(self) -> int:
        """The last recorded step: n answer tokens have steps 0..n-1, of which the first N+1 are kept."""
        return signal.n_steps(len(self.answer_ids), self.request.steps)


@dataclass(frozen=True, slots=True)
class Recording:
    """What was recorded of one request: T = n_steps + 1 steps, NaN for a step that was never computed.

    Attributes:
        share: [T, layers, heads], mass on the system region per mass on the prompt.
        first: [layers, heads, regions - 1], masses of step 0, without the prompt's.
        mass: [T, layers, heads, regions], or None.
        measures: What the engine's instruments measured, by name; each is an attribute too. Those of headrift:
            stats: [T, 3] next-token entropy (nats), top-1 probability and margin. Engine option `logit_stats`.
            divergence: KL in nats of the reference's next-token distribution to this one's at step 0. Request field
                `compare_with`.
            distance: [T, layers, heads, 2], L2 and total variation of the attention rows from the reference's. Request
                field `rows_against`.
            row_entropy: [T, layers, heads], -sum p ln p over the keys of each head's attention row, in nats. A sink's
                share is no key's: it adds no term, and the p then sum to less than 1. Request field `row_entropy`.
    """

    share: np.ndarray
    first: np.ndarray
    mass: np.ndarray | None
    measures: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        if name != "measures" and name in self.measures:
            return self.measures[name]
        raise AttributeError(f"this recording has no {name!r}: it was not measured")

    @property
    def missing_steps(self) -> list[int]:
        """Steps that were never computed, because a cached prefix block covered them."""
        return np.flatnonzero(np.isnan(self.share).any(axis=(1, 2))).tolist()


@dataclass(frozen=True, slots=True)
class Ticket:
    """Finished requests whose recordings are on their way off the device."""

    number: int
    finished: tuple[Finished, ...]

    @property
    def probed(self) -> list[Finished]:
        """Those that have a recording."""
        return [f for f in self.finished if f.request.probed]
