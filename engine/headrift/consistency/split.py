"""Which pairs are for what: questions and wrapper families that are kept from training, so that what is learnt can be
told from what is remembered, and a few wrappers of each family where all would be too many."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headrift.consistency.pairs import PairText

QUESTION_PART = 0.2


@dataclass(frozen=True, slots=True)
class Split:
    """questions, families: what is held out. A pair of neither is trained on; one of both (where no family is held
    out: of such a question) is for evaluation; so are held-out questions in families that were trained on, apart."""

    questions: frozenset[str]
    families: frozenset[str]

    def is_trained(self, pair: PairText) -> bool:
        return pair.question not in self.questions and pair.family not in self.families

    def is_held_out(self, pair: PairText) -> bool:
        return pair.question in self.questions and (not self.families or pair.family in self.families)


def split(
    pairs: Iterable[PairText],
    seed: int = 0,
    question_part: float = QUESTION_PART,
    families: Sequence[str] | None = None,
) -> Split:
    """Hold out this part of the questions and these families (None: one of them, where there are several), by seed.

    ValueError where a family is not among the pairs, or nothing would be left to train on or to evaluate with.
    """
    pairs = list(pairs)
    questions = sorted({pair.question for pair in pairs})
    known = sorted({pair.family for pair in pairs if pair.family is not None})
    if not 0 < question_part < 1:
        raise ValueError(f"--held-out-questions {question_part:g} is no part between 0 and 1")
    draw = random.Random(seed)
    # Drawn even where it is not wanted, so that the questions are the same.
    one = [draw.choice(known)] if len(known) > 1 else []
    families = one if families is None else families
    unknown = sorted(set(families) - set(known))
    if unknown:
        there = f"families there are: {', '.join(known)}" if known else "the pairs name no family"
        raise ValueError(f"--held-out-family {unknown[0]} is not among the pairs; {there}")
    n = round(question_part * len(questions))
    found = Split(frozenset(draw.sample(questions, n)), frozenset(families))
    for some, what in ((found.is_trained, "train on"), (found.is_held_out, "evaluate with")):
        if not any(map(some, pairs)):
            raise ValueError(
                f"of {len(questions)} questions in {len(known) or 'no'} families nothing is left to {what}: give more "
                "pairs, or hold out other families"
            )
    return found


def drawn(texts: Sequence[PairText], per_family: int, seed: int) -> list[PairText]:
    """Of each question and family so many pairs, drawn by the seed; pairs without a family are all kept."""
    groups: dict[tuple[str, str | None], list[PairText]] = {}
    for text in texts:
        groups.setdefault((text.question, text.family), []).append(text)
    found = []
    for (question, family), some in groups.items():
        draw = random.Random(f"{seed}:{question}:{family}")
        found += some if family is None else draw.sample(some, min(per_family, len(some)))
    return found
