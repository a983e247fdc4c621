"""Input files, read a line at a time: every line that is not skipped is a Row to score or a BadRow that says why not.

.txt: a prompt a line; lines that begin with # are comments. .jsonl: a JSON object a line, with `prompt` (and `system`)
or `messages` (OpenAI chat form), and `tools`, `id`, `label`, `category`, `response` where there are any. Blank lines
are skipped in both, keys that have no meaning here are ignored, and null is the same as nothing.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrift.scorer import Prompt

LABELS = ("attack", "benign")
_TEXTS = ("prompt", "system", "response", "label", "category")
_LISTS = ("messages", "tools")
_KINDS = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


class InputError(ValueError):
    """An input or its label cannot be used at all. The message names it and says what to do."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row to score. source: the file as it was named; row: line number, from 1; id: its own or `<stem>:<line>`."""

    source: str
    row: int
    id: str
    label: str | None
    category: str | None
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read. reason: a snake_case code; detail: what is wrong and how to mend it."""

    source: str
    row: int
    id: str
    reason: str
    detail: str


class _Unreadable(ValueError):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail
        self.id: str | None = None


def check_inputs(inputs: Sequence[Path], labels: Sequence[str] | None = None) -> None:
    """InputError unless there are inputs, each a readable file of a known kind, and the labels, if any, fit them."""
    if not inputs:
        raise InputError("no input file: name at least one .txt or .jsonl file")
    for path in inputs:
        if path.is_dir():
            raise InputError(f"{path} is a folder: name the files in it")
        if path.suffix.lower() not in _READERS:
            raise InputError(
                f"{path} has a name of no known kind: use .txt (a prompt a line) or .jsonl (an object a line)"
            )
        try:
            path.open("rb").close()
        except FileNotFoundError:
            raise InputError(f"{path} does not exist: check the name") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if len({path.resolve() for path in inputs}) < len(inputs):
        raise InputError(f"an input is named twice: {', '.join(map(str, inputs))}; name each file once")
    if labels is None:
        return
    for label in labels:
        if label not in LABELS:
            raise InputError(
                f"unknown label {label!r}: labels are {' and '.join(LABELS)}, as in --labels attack,benign"
            )
    if len(labels) != len(inputs):
        given, files = _plural(len(labels), "label"), _plural(len(inputs), "input")
        raise InputError(f"{given} for {files}: give each input its label, in order, as in --labels attack,benign")


def read_rows(inputs: Sequence[Path], labels: Sequence[str] | None = None) -> Iterator[Row | BadRow]:
    """The rows of the inputs in order, a line at a time. labels: one per input, for the rows that bring none.

    InputError at the call, before anything is read (see check_inputs); OSError where a file cannot be read on.
    """
    check_inputs(inputs, labels)
    return _rows(inputs, labels or [None] * len(inputs))


def count_rows(inputs: Sequence[Path]) -> int:
    """How many rows read_rows makes of the inputs, good and bad, without looking into them."""
    return sum(1 for path in inputs for _ in _lines(path))


def _rows(inputs: Sequence[Path], labels: Sequence[str | None]) -> Iterator[Row | BadRow]:
    for path, label in zip(inputs, labels, strict=True):
        read = _READERS[path.suffix.lower()]
        # File names need not be valid Unicode; what is written to Parquet has to be.
        source, stem = (name.encode(errors="backslashreplace").decode() for name in (str(path), path.stem))
        for number, line in _lines(path):
            name = f"{stem}:{number}"
            try:
                own_id, own_label, category, prompt = read(_text(line))
                yield Row(source, number, own_id or name, own_label or label, category, prompt)
            except _Unreadable as error:
                yield BadRow(source, number, error.id or name, error.reason, error.detail)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without their ends; neither blank ones nor, in .txt, comments."""
    has_comments = path.suffix.lower() == ".txt"
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).rstrip(b"\r\n")
            text = line.strip()
            if text and not (has_comments and text.startswith(b"#")):
                yield number, line


def _text(line: bytes) -> str:
    if b"\0" in line:
        raise _Unreadable("nul_byte", "the line holds a NUL byte: the file is no text, or UTF-16; convert it to UTF-8")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} of the line (0x{line[error.start]:02x})"
        raise _Unreadable("invalid_utf8", f"{where} is not valid UTF-8; convert the file to UTF-8") from error


_Fields = tuple[str | None, str | None, str | None, Prompt]  # id, label, category, prompt


def _read_txt(text: str) -> _Fields:
    return None, None, None, Prompt(prompt=text)


def _read_json(text: str) -> _Fields:
    given = _parsed(text)
    if not isinstance(given, dict):
        fix = """write one object a line, as in {"prompt": "..."}"""
        raise _Unreadable("not_an_object", f"the line is {_kind(given)}, not a JSON object; {fix}")
    fields = {key: given[key] for key in ("id", *_TEXTS, *_LISTS) if given.get(key) is not None}
    if "\\u" in text:
        _check_characters(fields)
    own_id = _own_id(fields)
    try:
        _check_types(fields)
        return own_id, _own_label(fields), fields.get("category"), _prompt(fields)
    except _Unreadable as error:
        error.id = own_id
        raise


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = f"{error.msg} at column {error.colno}"
        raise _Unreadable("bad_json", f"not valid JSON: {what}; write one whole object a line") from error
    except RecursionError as error:
        raise _Unreadable("bad_json", "the JSON is nested too deep; flatten it") from error
    except ValueError as error:  # a number of more digits than Python converts
        raise _Unreadable("bad_json", f"the JSON cannot be read: {error}") from error


def _check_characters(fields: dict[str, Any]) -> None:
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        lone = f"\\u{ord(error.object[error.start]):04x}"
        detail = f"half a character ({lone}, a lone surrogate) stands in a text; remove it or write the whole pair"
        raise _Unreadable("lone_surrogate", detail) from error


def _check_types(fields: dict[str, Any]) -> None:
    for key in _TEXTS:
        if key in fields and not isinstance(fields[key], str):
            raise _Unreadable("wrong_type", f"`{key}` is {_kind(fields[key])}; it must be a text in quotes")
    for key in _LISTS:
        value = fields.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            found = "a list with other things in it" if isinstance(value, list) else _kind(value)
            raise _Unreadable(
                "wrong_type", f"`{key}` is {found}; it must be a list of objects, as in OpenAI's chat API"
            )


def _own_id(fields: dict[str, Any]) -> str | None:
    value = fields.get("id")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise _Unreadable("wrong_type", f"`id` is {_kind(value)}; it must be a text or a whole number")


def _own_label(fields: dict[str, Any]) -> str | None:
    label = fields.get("label") or None
    if label is None or label in LABELS:
        return label
    known = " or ".join(f'"{known}"' for known in LABELS)
    raise _Unreadable("unknown_label", f"the label {_quoted(label)} is unknown; write {known}, or leave it out")


def _prompt(fields: dict[str, Any]) -> Prompt:
    if "prompt" in fields and "messages" in fields:
        raise _Unreadable("prompt_and_messages", "the row has both `prompt` and `messages`; keep the one that was sent")
    if "prompt" not in fields and "messages" not in fields:
        raise _Unreadable("no_prompt", "the row has no `prompt` and no `messages`; add the one that was sent")
    if "system" in fields and "messages" in fields:
        fix = "put the system prompt into `messages`, first"
        raise _Unreadable("system_and_messages", f"`system` goes with `prompt`, and the row has `messages`; {fix}")
    return Prompt(
        **{key: fields[key] for key in ("prompt", "system", "messages", "tools", "response") if key in fields}
    )


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "null")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


_READERS: dict[str, Callable[[str], _Fields]] = {".txt": _read_txt, ".jsonl": _read_json}
