"""What a training trains on: pairs, checked and rendered before any model is loaded, and their order."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrift.consistency.pairs import Pair, PairRenderer, PairText, RejectedPair
from headrift.consistency.reading import read
from headrift.consistency.split import Split, split
from headrift.consistency.wrappers import wrap
from headrift.corpus.sources import InputError
from headrift.model_facts import ModelFacts
from headrift.preparing import load_tokenizer


@dataclass(frozen=True, slots=True)
class DataAsked:
    """Which pairs. inputs, columns: as reading.read has them; system_prompt: of pairs that bring none. The rest is what
    `split` holds out. limit: the first so many questions only."""

    inputs: tuple[str, ...]
    model: Path
    system_prompt: str
    columns: Mapping[str, str] | None = None
    split_seed: int = 0
    held_out_questions: float = 0.2
    held_out_families: tuple[str, ...] | None = None
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Data:
    """texts: all pairs; split: what is held out of them; renderer: makes them token ids; rejected: rows of the inputs
    that are no pair and no question."""

    texts: list[PairText]
    split: Split
    renderer: PairRenderer
    rejected: list[RejectedPair]

    def trained(self) -> tuple[list[Pair], list[RejectedPair]]:
        """The pairs to train on, and those of them that cannot be rendered or have no common core. InputError where
        none can be used."""
        pairs, rejected = self.rendered([text for text in self.texts if self.split.is_trained(text)])
        if not pairs:
            first = rejected[0]
            raise InputError(f"none of {len(rejected)} pairs can be trained on; {first.id}: {first.detail}")
        return pairs, rejected

    def rendered(self, texts: Sequence[PairText]) -> tuple[list[Pair], list[RejectedPair]]:
        """These pairs as token ids, and those that cannot be used."""
        pairs: list[Pair] = []
        rejected: list[RejectedPair] = []
        for made in self.renderer.render_all(texts):
            if isinstance(made, Pair):
                pairs.append(made)
            else:
                rejected.append(made)
        return pairs, rejected


def load(asked: DataAsked, facts: ModelFacts, answer_tokens: int) -> Data:
    """The pairs of the inputs. InputError or ValueError, which say what to do, where they cannot be used."""
    found = read(asked.inputs, asked.columns)
    if found.pairs and found.questions:
        raise InputError("the inputs hold both pairs and questions: give one or the other")
    texts = found.pairs or wrap(found.questions)
    if asked.limit is not None:
        first = set(list(dict.fromkeys(text.question for text in texts))[: asked.limit])
        texts = [text for text in texts if text.question in first]
    room = None if facts.context is None else facts.context - answer_tokens
    renderer = PairRenderer(load_tokenizer(str(asked.model), False), system_prompt=asked.system_prompt, max_tokens=room)
    held_out = split(texts, asked.split_seed, asked.held_out_questions, asked.held_out_families)
    return Data(texts, held_out, renderer, found.rejected)


def batches(n: int, size: int, seed: int, first: int = 0) -> Iterator[list[int]]:
    """Without end, lists of `size` of the numbers below n: all of them in an order of the seed's, then in another, and
    so on; from batch `first` on. What a batch holds hangs on nothing but n, size, seed and its number."""
    number = first
    while True:
        places = range(number * size, (number + 1) * size)
        yield [_order(n, seed, place // n)[place % n] for place in places]
        number += 1


def _order(n: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order
