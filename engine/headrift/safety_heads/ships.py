"""SHIPS, the safety head importance score: how far one head's ablation moves the first token of the answer.

For a prompt and a head it is KL(p || p_ablated) in nats, where p and p_ablated are the next-token distributions at the
last prompt token without and with the ablation. A prompt runs once clean; its distribution stays on the device, and
every head's ablation is a request that is compared with it there: one number per head leaves the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from headrift import ablation
from headrift.probed_engine import ProbedEngine
from headrift.requests import ProbeRequest
from headrift.runs.folder import OnRows, ignore_rows
from headrift.stats import Floats

# Prompts in flight at a time: while the last heads of one run, the clean request of the next is done.
IN_FLIGHT = 4
TOP_OF_QUERY = 10

Head = tuple[int, int]


def all_heads(layers: int, heads: int) -> list[Head]:
    """Every (layer, head) of a model."""
    return [(layer, head) for layer in range(layers) for head in range(heads)]


def sampled_heads(layers: int, heads: int, n: int, seed: int = 0) -> list[Head]:
    """n heads drawn at random, in order; all of them if there are no more."""
    every = all_heads(layers, heads)
    chosen = np.random.default_rng(seed).choice(len(every), min(n, len(every)), replace=False)
    return [every[i] for i in sorted(chosen.tolist())]


def ships(
    engine: ProbedEngine,
    prompts: Iterable[Sequence[int]],
    heads: Sequence[Head] | None = None,
    kind: str = ablation.UNDIFFERENTIATED,
    epsilon: float = ablation.EPSILON,
    on_rows: OnRows = ignore_rows,
) -> Generator[Floats, None, None]:
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
    return _run(engine, iter(prompts), chosen, kind, epsilon, on_rows)


@dataclass(slots=True)
class _Prompt:
    """A prompt in flight."""

    ids: Sequence[int]
    reference: int
    scores: Floats  # [layers, heads]
    todo: deque[Head]  # not yet submitted
    left: int  # heads without a score
    is_clean_done: bool = False

    def request(self, **fields: object) -> ProbeRequest:
        return ProbeRequest(self.ids, {"prompt": (0, len(self.ids))}, 0, ignore_eos=True, **fields)  # type: ignore[arg-type]


def _run(
    engine: ProbedEngine,
    prompts: Iterator[Sequence[int]],
    heads: list[Head],
    kind: str,
    epsilon: float,
    on_rows: OnRows,
) -> Generator[Floats, None, None]:
    free = list(range(engine.options["references"]))
    in_flight: deque[_Prompt] = deque()

    def requests() -> Iterator[tuple[tuple[_Prompt, Head | None], ProbeRequest] | None]:
        """Clean prompts while there are free references, else heads of the prompts whose clean request is done."""
        exhausted = False
        while True:
            if free and not exhausted:
                ids = next(prompts, None)
                exhausted = ids is None
                if ids is not None:
                    scores = np.full((engine.layers, engine.heads), np.nan)
                    prompt = _Prompt(ids, free.pop(), scores, deque(heads), len(heads))
                    in_flight.append(prompt)
                    yield (prompt, None), prompt.request(keep_as=prompt.reference)
                continue
            ready = next((prompt for prompt in in_flight if prompt.is_clean_done and prompt.todo), None)
            if ready is not None:
                head = ready.todo.popleft()
                how = {"ablate": [(*head, kind)], "epsilon": epsilon}
                yield (ready, head), ready.request(compare_with=ready.reference, **how)
            elif exhausted and not any(prompt.todo for prompt in in_flight):
                return
            else:
                yield None

    done = 0
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
                missing = [head for head in heads if np.isnan(finished.scores[head])]
                if missing:
                    raise RuntimeError(
                        f"prompt {done}: the engine gave no score for {len(missing)} heads, the first layer "
                        f"{missing[0][0]} head {missing[0][1]}; do not trust its numbers"
                    )
                yield finished.scores
                done += 1


@dataclass(frozen=True, slots=True)
class RankedHead:
    """A head's scores over the queries, in nats: mean, population sd and quartiles."""

    rank: int
    layer: int
    head: int
    mean: float
    sd: float
    low: float
    median: float
    high: float
    first_of: int  # queries for which the head is among the first TOP_OF_QUERY


def rank(scores: Floats) -> list[RankedHead]:
    """Order heads by their mean score, highest first. scores: [queries, layers, heads], NaN if not ablated."""
    heads = np.argwhere(np.isfinite(scores[0]))
    by_head = scores[:, heads[:, 0], heads[:, 1]]
    leading = np.argsort(-by_head, axis=1, kind="stable")[:, :TOP_OF_QUERY]
    first_of = np.bincount(leading.ravel(), minlength=len(heads))
    quartiles = np.quantile(by_head, (0.25, 0.5, 0.75), axis=0)
    ranked = []
    for place, i in enumerate(np.argsort(-by_head.mean(axis=0), kind="stable"), 1):
        own, (layer, head), (low, median, high) = by_head[:, i], heads[i].tolist(), quartiles[:, i].tolist()
        mean, sd = float(own.mean()), float(own.std())
        ranked.append(RankedHead(place, layer, head, mean, sd, low, median, high, int(first_of[i])))
    return ranked


def agreement(scores: Floats) -> float | None:
    """Mean Spearman correlation of the heads' scores over all pairs of queries; None with fewer than two queries.

    Queries whose heads all have the same score are left out.
    """
    from scipy.stats import rankdata

    ranks = rankdata(scores[:, np.isfinite(scores[0])], axis=1)
    ranks = ranks[ranks.std(axis=1) > 0]
    if len(ranks) < 2:
        return None
    return float(np.corrcoef(ranks)[np.triu_indices(len(ranks), 1)].mean())


def table(ranked: Sequence[RankedHead], queries: int, top: int) -> str:
    """The first `top` heads as text of at most 80 columns."""
    lines = ["rank  layer  head  mean KL (nats)        sd    median  among the first ten of"]
    lines += [
        f"{h.rank:>4}  {h.layer:>5}  {h.head:>4}  {h.mean:>14.6f}  {h.sd:>8.6f}  {h.median:>8.6f}  "
        f"{h.first_of} of {queries} queries"
        for h in ranked[:top]
    ]
    return "\n".join(lines)
