"""SHIPS, the safety head importance score: how far one head's ablation moves the first token of the answer.

For a prompt and a head it is KL(p || p_ablated) in nats, p and p_ablated being the next-token distributions at the last
prompt token without and with the ablation. A prompt runs once clean; its distribution stays on the device, and every
head's ablation is a row of a batch that is compared with it there: one number per head leaves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from headrift import ablation
from headrift.probed_engine import ProbedEngine
from headrift.requests import Finished, ProbeRequest

# Prompts under way at a time: while the rows of one run out, the next one's clean row is through already.
IN_FLIGHT = 4

Head = tuple[int, int]


@dataclass(slots=True)
class _Prompt:
    """A prompt under way. todo: heads whose rows have not run; scores: [layers, heads], NaN where none is asked for."""

    index: int
    ids: Sequence[int]
    reference: int
    todo: deque[Head]
    left: int
    scores: NDArray[np.float64] = field(repr=False)
    clean_has_run: bool = False


def all_heads(layers: int, heads: int) -> list[Head]:
    """Every (layer, head) of a model."""
    return [(layer, head) for layer in range(layers) for head in range(heads)]


def sampled_heads(layers: int, heads: int, n: int, seed: int = 0) -> list[Head]:
    """n heads drawn at random, in order; all of them where there are no more."""
    every = all_heads(layers, heads)
    if n >= len(every):
        return every
    chosen = np.random.default_rng(seed).choice(len(every), n, replace=False)
    return [every[i] for i in sorted(chosen.tolist())]


def ships(
    engine: ProbedEngine,
    prompts: Iterable[Sequence[int]],
    heads: Sequence[Head] | None = None,
    kind: str = ablation.UNDIFFERENTIATED,
    epsilon: float = ablation.EPSILON,
    on_rows: Callable[[int], None] | None = None,
) -> Generator[NDArray[np.float64], None, None]:
    """The scores [layers, heads] of each prompt, in order, in nats; NaN for heads that were not asked for.

    engine: started with `ablation=True` and `references`. prompts: token ids. heads: (layer, head), all by default.
    kind, epsilon: see `headrift.ablation`. on_rows: told how many rows have run, again and again. ValueError where the
    engine, the heads or the kind will not do, and where a prompt does not fit the context; RuntimeError where a score
    is missing in the end, which is an error of the engine.
    """
    wanted = all_heads(engine.layers, engine.heads) if heads is None else list(heads)
    if not engine.ablates or not engine.references:
        raise ValueError("SHIPS needs an engine that was started with ablation=True and references=1 or more")
    if not wanted:
        raise ValueError("no head is given to ablate")
    ablation.check([(*head, kind) for head in wanted], epsilon)
    ablation.check_heads(wanted, engine.layers, engine.heads)
    return _run(engine, iter(prompts), wanted, kind, epsilon, on_rows or (lambda rows: None))


def _run(
    engine: ProbedEngine,
    prompts: Iterator[Sequence[int]],
    heads: list[Head],
    kind: str,
    epsilon: float,
    on_rows: Callable[[int], None],
) -> Generator[NDArray[np.float64], None, None]:
    free = list(range(engine.references))
    under_way: deque[_Prompt] = deque()
    running: dict[int, tuple[_Prompt, Head | None]] = {}
    index, exhausted = 0, False

    def begin(ids: Sequence[int]) -> None:
        nonlocal index
        scores = np.full((engine.layers, engine.heads), np.nan)
        prompt = _Prompt(index, ids, free.pop(), deque(heads), len(heads), scores)
        under_way.append(prompt)
        running[engine.submit(_request(prompt, keep_as=prompt.reference))] = prompt, None
        index += 1

    def submit_rows() -> None:
        for prompt in under_way:
            while prompt.clean_has_run and prompt.todo and engine.free_slots:
                head = prompt.todo.popleft()
                request = _request(prompt, compare_with=prompt.reference, ablate=[(*head, kind)], epsilon=epsilon)
                running[engine.submit(request)] = prompt, head

    try:
        while True:
            while not exhausted and free and engine.free_slots:
                ids = next(prompts, None)
                if ids is None:
                    exhausted = True
                    break
                begin(ids)
            if not under_way:
                return
            submit_rows()
            rows = _take(engine, engine.step(), running)
            if rows:
                on_rows(rows)
            while under_way and not under_way[0].left:
                done = under_way.popleft()
                free.append(done.reference)
                yield _checked(done, heads)
    finally:
        if engine.running:
            engine.abort()


def _request(prompt: _Prompt, **fields: object) -> ProbeRequest:
    n = len(prompt.ids)
    return ProbeRequest(prompt.ids, {"prompt": (0, n)}, 0, ignore_eos=True, **fields)  # type: ignore[arg-type]


def _take(engine: ProbedEngine, finished: Sequence[Finished], running: dict[int, tuple[_Prompt, Head | None]]) -> int:
    """Write finished rows' scores into their prompts; how many rows there were."""
    for done, recording in zip(finished, engine.drain(finished), strict=True):
        prompt, head = running.pop(done.request_id)
        if head is None:
            prompt.clean_has_run = True
        else:
            prompt.scores[head] = recording.divergence
            prompt.left -= 1
    return len(finished)


def _checked(prompt: _Prompt, heads: Sequence[Head]) -> NDArray[np.float64]:
    missing = [head for head in heads if np.isnan(prompt.scores[head])]
    if missing:
        raise RuntimeError(
            f"prompt {prompt.index}: the engine gave no score for {len(missing)} heads, layer {missing[0][0]} head "
            f"{missing[0][1]} the first; its numbers cannot be trusted"
        )
    return prompt.scores
