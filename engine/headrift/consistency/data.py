"""Pairs from files, or from questions put into headrift's wrappers; and what of them a training holds out.

Files are .jsonl, .csv and .parquet. A row with `clean` and `wrapped` is a pair; `core` may name the text that both
contain word for word, and `question` what both ask, for pairs that ask the same. A row with only `question` is put into
the wrappers of wrappers.jsonl, and needs `answer` and `wrong`, the wrong answer that some wrappers hint at. Both may
have `id`, `system`, `answer`, `also` (a list of other spellings), `choices` (a list), `wrong`, `kind` (one of
answers.KINDS; by default inferred from the answer) and `family` or `topic`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from headrift.consistency.answers import KINDS, LETTERS, Key
from headrift.consistency.pairs import Pair, PairRenderer, PairText, RejectedPair
from headrift.corpus import sources
from headrift.corpus.readers import read_fields
from headrift.corpus.rows import RowError, kind_of, parse_json
from headrift.corpus.sources import InputError, Source
from headrift.model_facts import ModelFacts
from headrift.prepare import load_tokenizer

_TEXTS = ("clean", "wrapped", "question", "core", "system", "answer", "wrong", "kind", "family", "topic")
_LISTS = ("also", "choices")
KEYS = ("id", *_TEXTS, *_LISTS)
_QUESTION, _WRONG = "{question}", "{wrong}"
QUESTION_PART = 0.2


@dataclass(frozen=True, slots=True)
class Wrapper:
    """Words around a question. text: has {question} once, and {wrong} if it hints at a wrong answer."""

    name: str
    family: str
    text: str

    @property
    def hints(self) -> bool:
        return _WRONG in self.text


@dataclass(frozen=True, slots=True)
class Question:
    id: str
    text: str
    key: Key
    topic: str | None = None  # if the file says
    system: str | None = None
    source: str = ""
    row: int = 0

    @property
    def prompt(self) -> str:
        """The question as the model gets it: with its choices, one a line."""
        return "\n".join([self.text, *(f"{letter}) {text}" for letter, text in zip(LETTERS, self.key.choices))])


@dataclass(slots=True)
class PairInputs:
    """Rows of files in order."""

    pairs: list[PairText] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    rejected: list[RejectedPair] = field(default_factory=list)  # rows that are neither

    def texts(self) -> list[PairText]:
        return self.pairs + wrap(self.questions)


@cache
def library() -> tuple[Wrapper, ...]:
    lines = Path(__file__).with_name("wrappers.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(Wrapper(**json.loads(line)) for line in lines)


def wrap(questions: Sequence[Question]) -> list[PairText]:
    """Put each question into each wrapper of the library."""
    return [_wrapped(question, wrapper) for question in questions for wrapper in library()]


def _wrapped(question: Question, wrapper: Wrapper) -> PairText:
    before, after = (part.replace(_WRONG, question.key.wrong or "") for part in wrapper.text.split(_QUESTION))
    return PairText(
        id=f"{question.id}:{wrapper.name}",
        question=question.id,
        clean=question.prompt,
        wrapped=before + question.prompt + after,
        core=question.prompt,
        wrapped_at=len(before),
        system=question.system,
        key=question.key,
        family=wrapper.family,
        wrapper=wrapper.name,
        hints=wrapper.hints,
        source=question.source,
        row=question.row,
    )


def read_pairs(inputs: Sequence[str], columns: Mapping[str, str] | None = None) -> PairInputs:
    """Read the pairs and questions of files, globs and folders. columns: what the files call a key.

    InputError if a file cannot be used at all, or there is neither a pair nor a question.
    """
    unknown = set(columns or {}) - set(KEYS)
    if unknown:
        raise InputError(f"--column {sorted(unknown)[0]}: a pair has no such key; give one of {', '.join(KEYS)}")
    names = {(columns or {}).get(key, key): key for key in KEYS}
    result, ids = PairInputs(), set[str]()
    for source in sources.find(inputs):
        if source.kind == ".txt":
            raise InputError(f"{source.name} is plain text without keys: give pairs as .jsonl, .csv or .parquet")
        for number, fields in read_fields(source, names):
            name = f"{source.stem}:{number}"
            try:
                if isinstance(fields, RowError):
                    raise fields
                row = _checked(fields)
                name = str(row.get("id", name))
                if name in ids:
                    raise RowError("duplicate_id", f"an earlier row has the id {name!r} too; give each its own")
                ids.add(name)
                _add(result, row, name, source, number)
            except RowError as error:
                result.rejected.append(RejectedPair(name, source.name, number, error.reason, error.detail))
    if not result.pairs and not result.questions:
        why = f"; the first row: {result.rejected[0].detail}" if result.rejected else ""
        raise InputError(f"{', '.join(inputs)}: no pair and no question{why}")
    return result


def _add(result: PairInputs, row: dict[str, Any], name: str, source: Source, number: int) -> None:
    """Add a row as a pair or as a question. RowError if it is neither."""
    common: dict[str, Any] = {"system": row.get("system"), "source": source.name, "row": number}
    if "clean" in row or "wrapped" in row:
        missing = [key for key in ("clean", "wrapped") if not row.get(key, "").strip()]
        if missing:
            raise RowError("no_pair", f"the row has no `{missing[0]}`: a pair needs `clean` and `wrapped`")
        key = _key(row) if "answer" in row else None
        common |= {"core": row.get("core") or None, "key": key, "family": row.get("family")}
        hints = key is not None and key.wrong is not None
        question = row.get("question", row["clean"])
        result.pairs.append(PairText(name, question, row["clean"], row["wrapped"], hints=hints, **common))
    elif row.get("question", "").strip():
        for needed in ("answer", "wrong"):
            if not row.get(needed):
                raise RowError(
                    "no_answer_key",
                    f"the question has no `{needed}`: add the right answer and a wrong one for wrappers to hint at",
                )
        result.questions.append(Question(name, row["question"].strip(), _key(row), row.get("topic"), **common))
    else:
        raise RowError("no_pair", "the row has neither `clean` and `wrapped` nor a `question`: add them")


def _checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A row's fields without nulls. RowError if one has the wrong type."""
    row = {key: value for key, value in fields.items() if value is not None}
    for key in _TEXTS:
        if key in ("answer", "wrong") and isinstance(row.get(key), int | float) and not isinstance(row[key], bool):
            row[key] = str(row[key])
        if not isinstance(row.get(key, ""), str):
            raise RowError("wrong_type", f"`{key}` is {kind_of(row[key])}; it must be a text")
    for key in _LISTS:
        value = row.get(key, [])
        value = parse_json(value) if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise RowError("wrong_type", f"`{key}` is {kind_of(value)}; it must be a list of texts")
        row[key] = tuple(value)
    if not isinstance(row.get("id", ""), str | int):
        raise RowError("wrong_type", f"`id` is {kind_of(row['id'])}; it must be a text or a whole number")
    return row


def _key(row: Mapping[str, Any]) -> Key:
    answer, choices = row["answer"].strip(), row["choices"]
    wrong = (row.get("wrong") or "").strip() or None
    given = [answer] if wrong is None else [answer, wrong]
    how = row.get("kind") or ("choice" if choices else "number" if _is_number(answer) else "text")
    letters = LETTERS[: len(choices)]
    if how not in KINDS:
        problem = f"`kind` is {how!r}; it must be one of {', '.join(KINDS)}"
    elif how == "choice" and not 2 <= len(choices) <= len(LETTERS):
        problem = f"`choices` has {len(choices)} texts; give 2 to {len(LETTERS)}"
    elif how == "choice" and not set(given) <= set(letters):
        problem = (
            f"`answer` and `wrong` are {' and '.join(map(repr, given))}; with choices they are letters of {letters}"
        )
    elif how == "number" and not all(map(_is_number, given)):
        problem = f"`kind` is number, and of {' and '.join(map(repr, given))} at least one is not a number"
    elif wrong is not None and wrong.casefold() == answer.casefold():
        problem = f"`wrong` is the right answer, {answer!r}; give another one"
    else:
        return Key(how, answer, row["also"], choices, wrong)
    raise RowError("bad_answer_key", problem)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?\d[\d,]*(\.\d+)?", text) is not None


@dataclass(frozen=True, slots=True)
class Split:
    """Questions and families that are held out.

    A pair with neither is trained on. A pair with both is for evaluation; if no family is held out, so is a pair with a
    held-out question.
    """

    questions: frozenset[str]
    families: frozenset[str]

    def is_trained(self, pair: PairText) -> bool:
        return pair.question not in self.questions and pair.family not in self.families

    def is_held_out(self, pair: PairText) -> bool:
        return pair.question in self.questions and (not self.families or pair.family in self.families)


def split(
    pairs: Sequence[PairText], seed: int = 0, fraction: float = QUESTION_PART, held_out: Iterable[str] | None = None
) -> Split:
    """Hold out a fraction of the questions, and families (default: one of them if there are several), by seed.

    ValueError if a family is not among the pairs, or nothing would be left to train on or to evaluate with.
    """
    questions = sorted({pair.question for pair in pairs})
    if not 0 < fraction < 1:
        raise ValueError(f"--held-out-questions {fraction:g} is not between 0 and 1")
    draw, known = random.Random(seed), pair_families(pairs)
    # Drawn even if it is not used, so that the same questions are drawn either way.
    one = [draw.choice(known)] if len(known) > 1 else []
    check_families("--held-out-family", held_out or (), pairs)
    n = round(fraction * len(questions))
    result = Split(frozenset(draw.sample(questions, n)), frozenset(one if held_out is None else held_out))
    for is_member, purpose in ((result.is_trained, "train on"), (result.is_held_out, "evaluate with")):
        if not any(map(is_member, pairs)):
            raise ValueError(
                f"of {len(questions)} questions in {len(known) or 'no'} families nothing is left to {purpose}: give "
                "more pairs, or hold out other families"
            )
    return result


def pair_families(pairs: Iterable[PairText]) -> list[str]:
    return sorted({pair.family for pair in pairs if pair.family is not None})


def check_families(option: str, names: Iterable[str], pairs: Iterable[PairText]) -> None:
    """Raise InputError if an option names a family that no pair has."""
    known = pair_families(pairs)
    unknown = sorted(set(names) - set(known))
    if unknown:
        choice = f"choose from {', '.join(known)}" if known else "the pairs name no family"
        raise InputError(f"{option} {unknown[0]} is not a family of the pairs: {choice}")


def first_questions(texts: Sequence[PairText], limit: int | None) -> list[PairText]:
    """The pairs of the first `limit` questions, or all."""
    first = set(list(dict.fromkeys(text.question for text in texts))[:limit])
    return [text for text in texts if text.question in first]


def sample_wrappers(texts: Sequence[PairText], per_family: int | None, seed: int) -> list[PairText]:
    """Draw `per_family` pairs of each question and family; None for all, as are pairs without a family."""
    if per_family is None:
        return list(texts)
    groups: dict[tuple[str, str | None], list[PairText]] = {}
    for text in texts:
        groups.setdefault((text.question, text.family), []).append(text)
    sample = []
    for (question, family), members in groups.items():
        draw = random.Random(f"{seed}:{question}:{family}")
        sample += members if family is None else draw.sample(members, min(per_family, len(members)))
    return sample


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which pairs a training reads, and what of them it holds out."""

    inputs: tuple[str, ...]
    model: Path
    system_prompt: str  # for pairs without one
    columns: Mapping[str, str] | None = None  # what the files call a key
    split_seed: int = 0
    held_out_questions: float = QUESTION_PART
    held_out_families: tuple[str, ...] | None = None
    limit: int | None = None  # first questions


@dataclass(frozen=True, slots=True)
class TrainingData:
    texts: list[PairText]  # all pairs
    split: Split  # what is held out
    renderer: PairRenderer
    rejected: list[RejectedPair]  # rows of the inputs that are neither pair nor question


def render(renderer: PairRenderer, texts: Sequence[PairText]) -> tuple[list[Pair], list[RejectedPair]]:
    """Render pairs: those that can be used, and those that cannot. InputError if none can be used."""
    rendered = list(renderer.render_all(texts))
    pairs = [pair for pair in rendered if isinstance(pair, Pair)]
    rejected = [pair for pair in rendered if isinstance(pair, RejectedPair)]
    if not pairs:
        raise InputError(f"none of {len(texts)} pairs can be used; {rejected[0].id}: {rejected[0].detail}")
    return pairs, rejected


def load_data(config: DataConfig, facts: ModelFacts, answer_tokens: int) -> TrainingData:
    """Read and split the pairs of a training. InputError if they cannot be used."""
    inputs = read_pairs(config.inputs, config.columns)
    if inputs.pairs and inputs.questions:
        raise InputError("the inputs have both pairs and questions: give one or the other")
    texts = first_questions(inputs.texts(), config.limit)
    room = None if facts.context is None else facts.context - answer_tokens
    tokenizer = load_tokenizer(str(config.model), False)
    renderer = PairRenderer(tokenizer, system_prompt=config.system_prompt, max_tokens=room)
    held_out = split(texts, config.split_seed, config.held_out_questions, config.held_out_families)
    return TrainingData(texts, held_out, renderer, inputs.rejected)


def batches(n: int, size: int, seed: int, first: int = 0) -> Iterator[list[int]]:
    """Yield lists of `size` numbers below n without end, from batch `first` on: every number once in an order drawn by
    the seed, then in another, and so on. A batch depends only on n, size, seed and its number."""
    for number in count(first):
        positions = range(number * size, (number + 1) * size)
        yield [_order(n, seed, position // n)[position % n] for position in positions]


def _order(n: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order
