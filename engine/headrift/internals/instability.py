"""What each sentence of a system prompt does to the inter-head instability: the score of `headrift score`.

The question is answered once, under the whole system prompt, and this answer is replayed behind the others: with the
sentence dropped, and with neutral text of as many tokens in its place. So the answer is the same, and what differs is
what the heads make of the system prompt.

    effect = score(whole) - score(neutral text for the sentence)
    effect_dropped = score(whole) - score(dropped)

Above 0, the heads disagree more with the sentence there. The first is the one that is tested: dropping a sentence also
makes the system prompt shorter, and its share of the attention with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import pyarrow as pa

from headrift.internals.renderings import Rendered
from headrift.internals.sentences import ABOUT, Drop, wholes
from headrift.preparing import Prompt
from headrift.results import ScoreResult
from headrift.scorer import Scorer

# The scores take as long as the KL of as many prompts, for which neutral text, another one for every prompt, has to run
# too: they are taken of the first so many of the prompts whose sentences are dropped.
MOST_PROMPTS = 4


def measured(drops: Sequence[Drop]) -> list[Drop]:
    """The drops that are scored: those of the first MOST_PROMPTS prompts."""
    some = sorted({drop.question.number for drop in drops})[:MOST_PROMPTS]
    return [drop for drop in drops if drop.question.number in some]


def measure(
    scorer: Scorer, name: str, drops: Sequence[Drop], on_rows: Callable[[int], None] | None = None
) -> list[dict[str, Any]]:
    """A record (see SCHEMA) of each drop; nothing for what the engine rejected. A score is null where the answer ended
    before its first step."""
    whole_ones = wholes(drops)
    said = dict(zip(whole_ones, _scored(scorer, map(_prompt, whole_ones.values()), False, on_rows)))
    drops = [drop for drop in drops if said[drop.question.number] is not None]

    def replayed() -> Iterator[Prompt]:
        for drop in drops:
            whole = said[drop.question.number]
            assert whole is not None
            for rendered in (drop.dropped, drop.neutral):
                yield _prompt(rendered, whole.answer_ids)

    scored = list(_scored(scorer, replayed(), True, on_rows))
    found = []
    for drop, dropped, neutral in zip(drops, scored[::2], scored[1::2]):
        whole = said[drop.question.number]
        if whole is None or dropped is None or neutral is None:
            continue
        scores = {"whole": whole.score, "dropped": dropped.score, "neutral": neutral.score}
        found.append(
            {
                **drop.about(name),
                **scores,
                "effect": _less(whole.score, neutral.score),
                "effect_dropped": _less(whole.score, dropped.score),
            }
        )
    return found


def _scored(
    scorer: Scorer, prompts: Iterator[Prompt], replay: bool, on_rows: Callable[[int], None] | None
) -> Iterator[ScoreResult | None]:
    """Results in order, None for what the engine rejected."""
    with closing(scorer.score(prompts, replay=replay)) as results:
        for result in results:
            if on_rows:
                on_rows(1)
            yield result if isinstance(result, ScoreResult) else None


def _prompt(rendered: Rendered, answer_ids: Sequence[int] | None = None) -> Prompt:
    assert rendered.system is not None
    regions = {"system": rendered.system, "user": rendered.question}
    return Prompt(token_ids=rendered.token_ids, regions=regions, response_ids=answer_ids)


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


SCHEMA = pa.schema(
    [*ABOUT, *((name, pa.float64()) for name in ("whole", "dropped", "neutral", "effect", "effect_dropped"))]
)
