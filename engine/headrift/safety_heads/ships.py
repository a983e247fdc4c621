"""SHIPS, the safety head importance score: how far one head's ablation moves the first token of the answer.

For a prompt and a head it is KL(p || p_ablated) in nats, where p and p_ablated are the next-token distributions at the
last prompt token without and with the ablation. A prompt runs once clean; its distribution stays on the device, and
every head's ablation is a request that is compared with it there: one number per head leaves the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from headrift import ablation
from headrift.probed_engine import ProbedEngine
from headrift.requests import ProbeRequest

# Prompts in flight at a time: while the last heads of one run, the clean request of the next is done.
IN_FLIGHT = 4

Head = tuple[int, int]


@dataclass(slots=True)
class _Prompt:
    """A prompt in flight. todo: heads not yet submitted. left: heads without a score. scores: [layers, heads]."""

    index: int
    ids: Sequence[int]
    reference: int
    todo: deque[Head]
    left: int
    scores: NDArray[np.float64] = field(repr=False)
    is_clean_done: bool = False


def all_heads(layers: int, heads: int) -> list[Head]:
    """Every (layer, head) of a model."""
    return [(layer, head) for layer in range(layers) for head in range(heads)]


def sampled_heads(layers: int, heads: int, n: int, seed: int = 0) -> list[Head]:
    """n heads drawn at random, in order; all of them if there are no more."""
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
    """Score heads by how far their ablation moves the first token of the answer.

    Args:
        engine: started with `ablation=True` and `references`.
        prompts: token ids; taken as they are needed.
        heads: (layer, head) to ablate one by one; default: all.
        kind: how heads are ablated, see `headrift.ablation`.
        epsilon: factor of an ablated query or output.
        on_rows: called with the number of requests that finished, as they finish.

    Yields:
        The scores [layers, heads] of each prompt in nats, in order; NaN for heads that were not ablated.

    Raises:
        ValueError: engine, heads or kind cannot be used, or a prompt exceeds the context.
        RuntimeError: the engine left out a score.
    """
    chosen = all_heads(engine.layers, engine.heads) if heads is None else list(heads)
    if not engine.options["ablation"] or not engine.options["references"]:
        raise ValueError("SHIPS needs an engine that was started with ablation=True and references=1 or more")
    if not chosen:
        raise ValueError("no head to ablate")
    ablation.check([(*head, kind) for head in chosen], epsilon)
    ablation.check_heads(chosen, engine.layers, engine.heads)
    return _run(engine, iter(prompts), chosen, kind, epsilon, on_rows or (lambda rows: None))


def _run(
    engine: ProbedEngine,
    prompts: Iterator[Sequence[int]],
    heads: list[Head],
    kind: str,
    epsilon: float,
    on_rows: Callable[[int], None],
) -> Generator[NDArray[np.float64], None, None]:
    free = list(range(engine.options["references"]))
    in_flight: deque[_Prompt] = deque()

    def requests() -> Iterator[tuple[tuple[_Prompt, Head | None], ProbeRequest] | None]:
        """Clean prompts while there are free references, else heads of the prompts whose clean request is done."""
        index, exhausted = 0, False
        while True:
            if free and not exhausted:
                ids = next(prompts, None)
                exhausted = ids is None
                if ids is not None:
                    scores = np.full((engine.layers, engine.heads), np.nan)
                    prompt = _Prompt(index, ids, free.pop(), deque(heads), len(heads), scores)
                    in_flight.append(prompt)
                    index += 1
                    yield (prompt, None), _request(ids, keep_as=prompt.reference)
                continue
            ready = next((prompt for prompt in in_flight if prompt.is_clean_done and prompt.todo), None)
            if ready is not None:
                head = ready.todo.popleft()
                how = {"ablate": [(*head, kind)], "epsilon": epsilon}
                yield (ready, head), _request(ready.ids, compare_with=ready.reference, **how)
            elif exhausted and not any(prompt.todo for prompt in in_flight):
                return
            else:
                yield None

    with closing(engine.run(requests())) as results:
        for (prompt, head), _, recording in results:
            if head is None:
                prompt.is_clean_done = True
            else:
                assert recording is not None
                prompt.scores[head] = recording.divergence
                prompt.left -= 1
            on_rows(1)
            while in_flight and not in_flight[0].left:
                finished = in_flight.popleft()
                free.append(finished.reference)
                yield _checked(finished, heads)


def _request(ids: Sequence[int], **fields: object) -> ProbeRequest:
    return ProbeRequest(ids, {"prompt": (0, len(ids))}, 0, ignore_eos=True, **fields)  # type: ignore[arg-type]


def _checked(prompt: _Prompt, heads: Sequence[Head]) -> NDArray[np.float64]:
    missing = [head for head in heads if np.isnan(prompt.scores[head])]
    if missing:
        layer, head = missing[0]
        raise RuntimeError(
            f"prompt {prompt.index}: the engine gave no score for {len(missing)} heads, the first layer {layer} head "
            f"{head}; do not trust its numbers"
        )
    return prompt.scores
