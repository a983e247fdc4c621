"""The same prompts answered, and the same text read, as the model is and with sets of heads ablated: rows of the same
batches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from headrift.ablation import EPSILON, HeadAblation
from headrift.probed_engine import ProbedEngine
from headrift.requests import Finished, ProbeRequest

Key = TypeVar("Key", bound=Hashable)
# The heads that are ablated, by the name of the arm; none for the model as it is.
Arms = Mapping[str, Sequence[HeadAblation]]


def answers(
    engine: ProbedEngine,
    prompts: Sequence[Sequence[int]],
    arms: Arms,
    tokens: int,
    epsilon: float = EPSILON,
    on_rows: Callable[[int], None] | None = None,
) -> list[dict[str, Finished]]:
    """For each prompt (token ids) its greedy answer of at most so many tokens in each arm.

    engine: started with `ablation=True`. on_rows: told how many rows have run, again and again. ValueError where the
    model has no such head, or prompt and answer do not fit the context.
    """
    asked = (
        ((number, arm), ProbeRequest(ids, {}, 0, answer_tokens=tokens, ablate=heads, epsilon=epsilon))
        for number, ids in enumerate(prompts)
        for arm, heads in arms.items()
    )
    found: list[dict[str, Finished]] = [{} for _ in prompts]
    for (number, arm), done in _run(engine, asked, on_rows):
        found[number][arm] = done
    return found


def log_likelihoods(
    engine: ProbedEngine,
    passages: Sequence[Sequence[int]],
    arms: Arms,
    epsilon: float = EPSILON,
    on_rows: Callable[[int], None] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """By arm the sum over each passage's tokens, from the second on, of their log-probability given those before
    [passages], in nats. As `answers`; RuntimeError where the engine gives no number for a token."""
    asked = (
        ((number, arm), ProbeRequest(ids, {}, 0, ignore_eos=True, ablate=heads, epsilon=epsilon, logprobs=True))
        for number, ids in enumerate(passages)
        for arm, heads in arms.items()
    )
    found = {arm: np.full(len(passages), np.nan) for arm in arms}
    for (number, arm), done in _run(engine, asked, on_rows):
        found[arm][number] = np.sum(done.logprobs or [])
    if not all(np.isfinite(sums).all() for sums in found.values()):
        raise RuntimeError("the engine gave no log-probability for some token of the text: it cannot be trusted")
    return found


def _run(
    engine: ProbedEngine, asked: Iterable[tuple[Key, ProbeRequest]], on_rows: Callable[[int], None] | None
) -> Iterator[tuple[Key, Finished]]:
    """The requests as they finish, with the keys they came with."""
    for key, done, _ in engine.run(asked):
        if on_rows is not None:
            on_rows(1)
        yield key, done
