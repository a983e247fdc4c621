"""Files of pairs, or of questions to wrap: .jsonl, .csv and .parquet.

A row with `clean` and `wrapped` is a pair; `core` may name the text that both hold word for word, and `question` what
both ask, for pairs that ask the same. A row with `question` alone is put into the library's wrappers, and needs
`answer` and `wrong`, the wrong answer that is hinted at. Both may bring `id`, `system`, `answer`, `also` (a list of
other spellings), `choices` (a list), `wrong`, `kind` (of answers.KINDS, else told from the answer) and `family` or
`topic`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrift.consistency.answers import KINDS, LETTERS, Key
from headrift.consistency.pairs import PairText, RejectedPair
from headrift.consistency.wrappers import Question
from headrift.corpus import sources
from headrift.corpus.readers import fields_of
from headrift.corpus.rows import Unreadable, kind, parsed
from headrift.corpus.sources import InputError, Source

_TEXTS = ("clean", "wrapped", "question", "core", "system", "answer", "wrong", "kind", "family", "topic")
_LISTS = ("also", "choices")
KEYS = ("id", *_TEXTS, *_LISTS)


@dataclass(slots=True)
class Read:
    """What files held: pairs and questions in order, and the rows that are neither, with the reason."""

    pairs: list[PairText] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    rejected: list[RejectedPair] = field(default_factory=list)


def read(inputs: Sequence[str], columns: Mapping[str, str] | None = None) -> Read:
    """The pairs and questions of files, globs and folders. columns: the files' names of keys that they call otherwise.

    InputError where a file cannot be used at all, or where all of them hold neither a pair nor a question.
    """
    unknown = set(columns or {}) - set(KEYS)
    if unknown:
        raise InputError(f"a pair has no key {sorted(unknown)[0]!r}: --column KEY=NAME takes {', '.join(KEYS)}")
    names = {(columns or {}).get(key, key): key for key in KEYS}
    found, ids = Read(), set[str]()
    for source in sources.find(inputs):
        if source.kind == ".txt":
            raise InputError(
                f"{source.name} is a plain text, which has no keys: give pairs as .jsonl, .csv or .parquet"
            )
        for number, fields in fields_of(source, names):
            name = f"{source.stem}:{number}"
            try:
                if isinstance(fields, Unreadable):
                    raise fields
                row = _checked(fields)
                name = str(row.get("id", name))
                if name in ids:
                    raise Unreadable("duplicate_id", f"an earlier row has the id {name!r} too; give each its own")
                ids.add(name)
                _add(found, row, name, source, number)
            except Unreadable as error:
                found.rejected.append(RejectedPair(name, source.name, number, error.reason, error.detail))
    if not found.pairs and not found.questions:
        why = f"; the first row: {found.rejected[0].detail}" if found.rejected else ""
        raise InputError(f"there is no pair and no question in {', '.join(inputs)}{why}")
    return found


def _add(found: Read, row: dict[str, Any], name: str, source: Source, number: int) -> None:
    common: dict[str, Any] = {"system": row.get("system"), "source": source.name, "row": number}
    if "clean" in row or "wrapped" in row:
        missing = [key for key in ("clean", "wrapped") if not row.get(key, "").strip()]
        if missing:
            raise Unreadable("no_pair", f"the row has no `{missing[0]}`: a pair needs `clean` and `wrapped`")
        key = _key(row) if "answer" in row else None
        found.pairs.append(
            PairText(
                id=name,
                question=row.get("question", row["clean"]),
                clean=row["clean"],
                wrapped=row["wrapped"],
                core=row.get("core") or None,
                key=key,
                family=row.get("family"),
                hints=key is not None and key.wrong is not None,
                **common,
            )
        )
    elif row.get("question", "").strip():
        for needed in ("answer", "wrong"):
            if not row.get(needed):
                raise Unreadable(
                    "no_answer_key",
                    f"the question has no `{needed}`: the right answer tells whether a reply is right, and wrappers "
                    "hint at the wrong one",
                )
        found.questions.append(Question(name, row["question"].strip(), _key(row), row.get("topic"), **common))
    else:
        raise Unreadable("no_pair", "the row has neither `clean` and `wrapped` nor a `question`: add them")


def _checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A row's fields, those that are null left out. Unreadable where one is of another kind than it should be."""
    row = {key: value for key, value in fields.items() if value is not None}
    for key in _TEXTS:
        if key in ("answer", "wrong") and isinstance(row.get(key), int | float) and not isinstance(row[key], bool):
            row[key] = str(row[key])
        if not isinstance(row.get(key, ""), str):
            raise Unreadable("wrong_type", f"`{key}` is {kind(row[key])}; it must be a text")
    for key in _LISTS:
        value = row.get(key, [])
        value = parsed(value) if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise Unreadable("wrong_type", f"`{key}` is {kind(value)}; it must be a list of texts")
        row[key] = tuple(value)
    if not isinstance(row.get("id", ""), str | int):
        raise Unreadable("wrong_type", f"`id` is {kind(row['id'])}; it must be a text or a whole number")
    return row


def _key(row: Mapping[str, Any]) -> Key:
    answer, choices = row["answer"].strip(), row["choices"]
    wrong = (row.get("wrong") or "").strip() or None
    how = row.get("kind") or ("choice" if choices else "number" if _is_number(answer) else "text")
    if how not in KINDS:
        raise Unreadable("bad_answer_key", f"`kind` is {how!r}; it must be one of {', '.join(KINDS)}")
    if how == "choice":
        letters = LETTERS[: len(choices)]
        if not 2 <= len(choices) <= len(LETTERS):
            raise Unreadable("bad_answer_key", f"`choices` has {len(choices)} texts; give 2 to {len(LETTERS)}")
        for name, value in (("answer", answer), ("wrong", wrong)):
            if value is not None and value not in tuple(letters):
                raise Unreadable("bad_answer_key", f"`{name}` is {value!r}; with choices it is a letter of {letters}")
    if how == "number" and not all(_is_number(value) for value in (answer, wrong) if value is not None):
        raise Unreadable("bad_answer_key", f"`answer` {answer!r} or `wrong` {wrong!r} is no number, and `kind` says so")
    if wrong is not None and wrong.casefold() == answer.casefold():
        raise Unreadable("bad_answer_key", f"`wrong` is the right answer, {answer!r}; give another one")
    return Key(how, answer, row["also"], choices, wrong)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?\d[\d,]*(\.\d+)?", text) is not None
