"""A row of an input: its fields, checked, make a Row to score or a BadRow that says why not."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

from headrift.scorer import Prompt

LABELS = ("attack", "benign")
PROMPTS = ("prompt", "messages", "token_ids")  # a row has exactly one of them
_TEXTS = ("prompt", "system", "response", "label", "category")
_OBJECTS = ("messages", "tools")
_NUMBERS = ("token_ids", "response_ids")
# These may also stand as JSON text in a column of a table.
NESTED = (*_OBJECTS, *_NUMBERS, "regions")
KEYS = ("id", *_TEXTS, *NESTED)
_OF_PROMPT = ("prompt", "system", "messages", "tools", "response", "token_ids", "regions", "response_ids")
_KINDS = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


@dataclass(frozen=True, slots=True)
class Row:
    """A row to score. source: the file as it was named; row: its number, from 1; id: its own or `<stem>:<row>`."""

    source: str
    row: int
    id: str
    label: str | None
    category: str | None
    prompt: Prompt

    def columns(self, *, replay: bool = False) -> dict[str, Any]:
        """Return the columns of a part that are the row's own; `replay` as in `group_of`."""
        return {
            "id": self.id,
            "source": self.source,
            "row": self.row,
            "label": self.label,
            "category": self.category,
            "group": group_of(self.prompt, replay=replay),
            "prompt": _text_of(self.prompt),
        }


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read. reason: a key of reasons.REASONS; detail: what is wrong and how to mend it."""

    source: str
    row: int
    id: str
    reason: str
    detail: str


class Unreadable(ValueError):
    """Why a row cannot be read: a key of reasons.REASONS, and what is wrong with how to mend it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


Fields = dict[str, Any] | Unreadable

# Takes the id that a row brought; False where an earlier row brought it too.
TakeId = Callable[[str], bool]


def make_row(
    source: str, number: int, name: str, label: str | None, fields: Fields, take_id: TakeId | None = None
) -> Row | BadRow:
    """A row of its fields, by key; None is the same as nothing. name, label: for a row that brings none."""
    own_id = None
    try:
        if isinstance(fields, Unreadable):
            raise fields
        given = {key: fields[key] for key in KEYS if fields.get(key) is not None}
        own_id = _own_id(given)
        _check_types(given)
        own_label, prompt = _own_label(given), _prompt(given)
        if own_id is not None and take_id is not None and not take_id(own_id):
            raise Unreadable("duplicate_id", f"an earlier row has the id {quoted(own_id)} too; give each row its own")
        return Row(source, number, own_id or name, own_label or label, given.get("category"), prompt)
    except Unreadable as error:
        return BadRow(source, number, own_id or name, error.reason, error.detail)


def parsed(text: str) -> Any:
    """A JSON text's value. Unreadable for what is not one."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = f"{error.msg} at column {error.colno}"
        raise Unreadable("bad_json", f"not valid JSON: {what}; write one whole object a line") from error
    except RecursionError as error:
        raise Unreadable("bad_json", "the JSON is nested too deep; flatten it") from error
    except ValueError as error:  # a number of more digits than Python converts
        raise Unreadable("bad_json", f"the JSON cannot be read: {error}") from error


def with_whole_characters(value: Any, text: str) -> Any:
    """The value (or a part of it) that was parsed of a JSON text; Unreadable where half a character is in it."""
    if "\\u" not in text:
        return value
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        lone = f"\\u{ord(error.object[error.start]):04x}"
        detail = f"half a character ({lone}, a lone surrogate) stands in a text; remove it or write the whole pair"
        raise Unreadable("lone_surrogate", detail) from error
    except RecursionError as error:
        raise Unreadable("bad_json", "the JSON is nested too deep; flatten it") from error
    return value


def with_nested(cells: Mapping[str, Any]) -> dict[str, Any]:
    """A table's cells, those of NESTED that hold JSON text parsed. Unreadable where one is not JSON."""
    texts = {key: value for key, value in cells.items() if key in NESTED and isinstance(value, str)}
    return {**cells, **{key: _nested(key, text) for key, text in texts.items()}}


def _nested(key: str, text: str) -> Any:
    try:
        return with_whole_characters(parsed(text), text)
    except Unreadable as error:
        raise Unreadable(error.reason, f"`{key}` is a text that should be JSON: {error.detail}") from error


def kind(value: object) -> str:
    """What a value is, in a user's words."""
    return "null" if value is None else _KINDS.get(type(value), f"of type {type(value).__name__}")


def quoted(text: str) -> str:
    """A text in quotes, cut off where it is long."""
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _check_types(given: Mapping[str, Any]) -> None:
    def wrong(key: str, found: str, need: str) -> Unreadable:
        return Unreadable("wrong_type", f"`{key}` is {found}; it must be {need}")

    for key in _TEXTS:
        if key in given and not isinstance(given[key], str):
            raise wrong(key, kind(given[key]), "a text in quotes" if key == "prompt" else "a text")
    for key in _OBJECTS:
        value = given.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            found = "a list with other things in it" if isinstance(value, list) else kind(value)
            raise wrong(key, found, "a list of objects, as in OpenAI's chat API")
    for key in _NUMBERS:
        if not isinstance(given.get(key, []), list):
            raise wrong(key, kind(given[key]), "a list of token ids")
    if not isinstance(given.get("regions", {}), dict):
        raise wrong("regions", kind(given["regions"]), 'an object, as in {"system": [1, 20]}')


def _own_id(given: Mapping[str, Any]) -> str | None:
    value = given.get("id")
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise Unreadable("wrong_type", f"`id` is {kind(value)}; it must be a text or a whole number")


def _own_label(given: Mapping[str, Any]) -> str | None:
    label = given.get("label") or None
    if label is None or label in LABELS:
        return label
    known = " or ".join(f'"{known}"' for known in LABELS)
    raise Unreadable("unknown_label", f"the label {quoted(label)} is unknown; write {known}, or leave it out")


def _prompt(given: Mapping[str, Any]) -> Prompt:
    forms = [key for key in PROMPTS if key in given]
    if not forms:
        raise Unreadable("no_prompt", f"the row has no {_named(PROMPTS, 'and no')}; add the one that was sent")
    if len(forms) > 1:
        raise Unreadable("several_prompts", f"the row has {_named(forms, 'and')}; keep the one that was sent")
    (form,) = forms
    if "system" in given and form != "prompt":
        fix = "put the system prompt into `messages`, first" if form == "messages" else "name its tokens in `regions`"
        raise Unreadable("system_not_used", f"`system` goes with `prompt`, and the row has `{form}`; {fix}")
    if "regions" in given and form != "token_ids":
        fix = "leave it out (system, user and tool are found by themselves) or give token ids"
        raise Unreadable("bad_regions", f"`regions` goes with `token_ids`, and the row has `{form}`; {fix}")
    return Prompt(**{key: given[key] for key in _OF_PROMPT if key in given})


def _named(keys: Iterable[str], word: str) -> str:
    return f" {word} ".join(f"`{key}`" for key in keys)


def group_of(prompt: Prompt, *, replay: bool = False) -> str:
    """Hash a prompt, without its system prompt, case, spacing and Unicode form.

    The hash is of the prompt's text, of all messages after the leading system ones (roles, texts, tool calls without
    their ids), or of the token ids outside the system region.

    Args:
        prompt: The prompt.
        replay: Leave out a last assistant message that is the logged answer.

    Returns:
        16 hex digits.
    """
    if prompt.token_ids is not None:
        start, end = prompt.regions.get("system", (0, 0))
        content = json.dumps([*prompt.token_ids[:start], *prompt.token_ids[end:]])
    elif prompt.messages is not None:
        turns = [_turn(message) for message in dropwhile(_is_system, prompt.messages)]
        if replay and prompt.response is None and prompt.response_ids is None and turns[-1][0] == "assistant":
            turns.pop()
        only_user = len(turns) == 1 and turns[0][0] == "user"  # the same as a prompt that is given as a text
        content = turns[0][1] if only_user else json.dumps(turns, ensure_ascii=False)
    else:
        content = _normalise(prompt.prompt or "")
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _is_system(message: Mapping[str, Any]) -> bool:
    return message.get("role") in ("system", "developer")


def _turn(message: Mapping[str, Any]) -> list[str]:
    """Return role, text, and each tool call's name and arguments, of a message that is known to be well formed."""
    content = message.get("content")
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content or [])
    functions = [call["function"] for call in message.get("tool_calls") or []]
    calls = [_normalise(f"{one['name']} {_arguments(one.get('arguments'))}") for one in functions]
    return [str(message.get("role")), _normalise(text), *calls]


def _arguments(given: Any) -> str:
    """Return a call's arguments, an object or a JSON text, as one text."""
    try:
        given = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        pass
    return json.dumps(given, sort_keys=True, ensure_ascii=False)


def _normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _text_of(prompt: Prompt) -> str:
    """Return the prompt as the row brought it: its text, or its messages or token ids as JSON."""
    if prompt.prompt is not None:
        return prompt.prompt
    return json.dumps(prompt.messages if prompt.messages is not None else prompt.token_ids, ensure_ascii=False)
