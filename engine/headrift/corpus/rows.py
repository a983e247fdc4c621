"""Rows of an input: their fields, checked, make a Row to score or a BadRow with the reason why not."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

from headrift.near_duplicates import minhash
from headrift.prepare import Prompt

LABELS = ("attack", "benign")
PROMPTS = ("prompt", "messages", "token_ids")  # a row has exactly one of them
_TEXTS = ("prompt", "system", "response", "label", "category", "source_set")
_OBJECTS = ("messages", "tools")
_NUMBERS = ("token_ids", "response_ids")
NESTED = (*_OBJECTS, *_NUMBERS, "regions")  # in a column of a table these may be JSON text
KEYS = ("id", "group", *_TEXTS, *NESTED)
_PROMPT_KEYS = ("prompt", "system", "messages", "tools", "response", "token_ids", "regions", "response_ids")
_KINDS = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}

# Every reason why a row is rejected, with what to do. A reject's detail says more and may quote the row; with --redact
# it is the sentence from here.
REASONS = {
    # the file
    "bad_csv": "The record is not valid CSV: put cells with commas, quotes or line breaks in double quotes.",
    "bad_json": "The line, or a cell that should be JSON, is not: write one whole JSON object per line.",
    "damaged_file": "The file is damaged or cut off here; nothing after this row was read: restore it from a copy.",
    "invalid_utf8": "The row has bytes that are not UTF-8: convert the file to UTF-8.",
    "lone_surrogate": "A text has half a character (a lone surrogate): remove it or write the whole pair.",
    "not_an_object": "The line is JSON but not an object: write an object per line, with a key `prompt` or `messages`.",
    "nul_byte": "The row has a NUL byte: the file is not a text, or is UTF-16; convert it to UTF-8.",
    "row_too_big": "The line or cell is longer than 64 MiB: is the file one JSON list, or a quote left open?",
    "unreadable_rows": "This part of the Parquet file is damaged: write it again, or restore it from a copy.",
    "wrong_columns": "The record has more or fewer cells than the first line names: quote cells that contain commas.",
    # the row
    "bad_prompt": "The prompt is neither a text nor an object: give a text, messages or token ids.",
    "duplicate_id": "An earlier row has the same id: give each row its own.",
    "no_prompt": "The row has no prompt, messages or token_ids: add the one that was sent.",
    "no_response": "Replay past step 0 needs the logged answer: give it as `response`.",
    "several_prompts": "The row has more than one of prompt, messages and token_ids: keep the one that was sent.",
    "system_not_used": "`system` goes with `prompt`: put it first into messages, or name its tokens in regions.",
    "unknown_label": 'The label is unknown: write "attack" or "benign", or leave it out.',
    "wrong_type": "A field is of the wrong type: prompt is a text, messages and tools are lists of objects.",
    # the conversation
    "bad_messages": "The messages are malformed, or one has an unknown role: follow OpenAI's chat form.",
    "bad_tools": "The tools are not a list of JSON objects, each describing one tool.",
    "empty_system_prompt": "The system prompt is empty, or makes no token: give a text to measure attention on.",
    "invalid_text": "The rendered conversation is not valid Unicode: repair the encoding of the texts.",
    "not_rendered": "Rendering or tokenising the prompt fails: leave it out, and report the bug.",
    "no_system_prompt": "There is no system prompt: give `system`, a system message, or --system-prompt-file.",
    "no_user_message": "The conversation has no user message: add the prompt as one.",
    "prompt_too_long": "The prompt and its steps exceed the model's context: shorten it or record fewer steps.",
    "span_not_found": "The chat template changes the text, so its tokens are not known: give token ids and regions.",
    "template_rejected": "The model's chat template does not take this conversation: change the order of the roles.",
    "unsupported_content": "A message has a part that is not a text, such as an image: only text is scored.",
    # the engine
    "engine_died": "The engine died each time it got this row, at last alone: leave it out, and report the bug.",
    # token ids
    "bad_regions": "A region is not [start, end) within the prompt, or is given without token ids.",
    "bad_token_ids": "The token ids are not a list of numbers that the model's vocabulary has.",
    "unknown_region": "A region has a name that the run does not know: name it with --region.",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A row to score."""

    source: str  # the file, as it was named
    row: int  # its number in the file, from 1
    id: str  # its own, or `<stem>:<row>`
    label: str | None  # of LABELS
    category: str | None
    prompt: Prompt
    source_set: str | None = None  # where it comes from, if the file does not say it
    group: str | None = None  # what it has in common with others: a session, a user, a template

    def columns(self, *, text: bool = True, redact: bool = False, answer: bool | None = None) -> dict[str, Any]:
        """Return the columns of a part that are the row's own.

        Args:
            text: With `prompt`.
            redact: Without `minhash`.
            answer: Whether the logged answer is replayed past step 0; None without replay.
        """
        content = content_of(self.prompt, replay=answer is not None)
        prompt_hash = _hash(content)
        return {
            "id": self.id,
            "source": self.source,
            "row": self.row,
            "label": self.label,
            "category": self.category,
            "source_set": self.source_set,
            "group": prompt_hash if self.group is None else _hash(f"group\0{self.group}"),
            "prompt_hash": prompt_hash,
            "answer_hash": _hash(_answer_of(self.prompt)) if answer else None,
            "minhash": None if redact else minhash(content).tobytes(),
            **({"prompt": _text_of(self.prompt)} if text else {}),
        }


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read: `reason` is a key of REASONS, `detail` what is wrong and how to repair it."""

    source: str
    row: int
    id: str
    reason: str
    detail: str


class RowError(ValueError):
    """Why a row cannot be read: a key of REASONS, and what is wrong and how to repair it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


Fields = dict[str, Any] | RowError

# Takes the id that a row brought; False if an earlier row brought it too.
TakeId = Callable[[str], bool]


def make_row(
    source: str, number: int, name: str, label: str | None, fields: Fields, take_id: TakeId | None = None
) -> Row | BadRow:
    """Make a row of its fields, of which None is the same as nothing; `name` and `label` are for rows without one."""
    own_id = None
    try:
        if isinstance(fields, RowError):
            raise fields
        given = {key: fields[key] for key in KEYS if fields.get(key) is not None}
        own_id = _name(given, "id")
        _check_types(given)
        own_label, prompt = _own_label(given), _prompt(given)
        if own_id is not None and take_id is not None and not take_id(own_id):
            raise RowError("duplicate_id", f"an earlier row has the id {_quote(own_id)} too; give each row its own")
        return Row(
            source,
            number,
            own_id or name,
            own_label or label,
            given.get("category"),
            prompt,
            given.get("source_set"),
            _name(given, "group"),
        )
    except RowError as error:
        return BadRow(source, number, own_id or name, error.reason, error.detail)


def parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = f"{error.msg} at column {error.colno}"
        raise RowError("bad_json", f"not valid JSON: {what}; write one whole object per line") from error
    except RecursionError as error:
        raise RowError("bad_json", "the JSON is nested too deep; flatten it") from error
    except ValueError as error:  # a number of more digits than Python converts
        raise RowError("bad_json", f"the JSON cannot be read: {error}") from error


def check_characters(value: Any, text: str) -> Any:
    """Return a value that was parsed from a JSON text. RowError if it has half a character."""
    if "\\u" not in text:
        return value
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        lone = f"\\u{ord(error.object[error.start]):04x}"
        detail = f"a text has half a character ({lone}, a lone surrogate); remove it or write the whole pair"
        raise RowError("lone_surrogate", detail) from error
    except RecursionError as error:
        raise RowError("bad_json", "the JSON is nested too deep; flatten it") from error
    return value


def parse_nested(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Parse those of a table's cells that are JSON text in a column of NESTED. RowError if one is not JSON."""
    parsed = dict(cells)
    for key, text in cells.items():
        if key in NESTED and isinstance(text, str):
            try:
                parsed[key] = check_characters(parse_json(text), text)
            except RowError as error:
                raise RowError(error.reason, f"`{key}` is a text that should be JSON: {error.detail}") from error
    return parsed


def kind_of(value: object) -> str:
    """Say in a user's words what a value is."""
    return "null" if value is None else _KINDS.get(type(value), f"of type {type(value).__name__}")


def _quote(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _check_types(given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        actual = kind_of(value)
        if key in _TEXTS:
            right, needed = isinstance(value, str), "a text in quotes" if key == "prompt" else "a text"
        elif key in _OBJECTS:
            right, needed = isinstance(value, list), "a list of objects, as in OpenAI's chat API"
            if right and not all(isinstance(item, dict) for item in value):
                right, actual = False, "a list with other things in it"
        elif key in _NUMBERS:
            right, needed = isinstance(value, list), "a list of token ids"
        elif key == "regions":
            right, needed = isinstance(value, dict), 'an object, as in {"system": [1, 20]}'
        else:
            continue
        if not right:
            raise RowError("wrong_type", f"`{key}` is {actual}; it must be {needed}")


def _name(given: Mapping[str, Any], key: str) -> str | None:
    """An id or a group, a text or a whole number."""
    value = given.get(key)
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise RowError("wrong_type", f"`{key}` is {kind_of(value)}; it must be a text or a whole number")


def _own_label(given: Mapping[str, Any]) -> str | None:
    label = given.get("label") or None
    if label is None or label in LABELS:
        return label
    known = " or ".join(f'"{known}"' for known in LABELS)
    raise RowError("unknown_label", f"the label {_quote(label)} is unknown; write {known}, or leave it out")


def _prompt(given: Mapping[str, Any]) -> Prompt:
    forms = [key for key in PROMPTS if key in given]
    if not forms:
        raise RowError("no_prompt", f"the row has no {_list_keys(PROMPTS, 'and no')}; add the one that was sent")
    if len(forms) > 1:
        raise RowError("several_prompts", f"the row has {_list_keys(forms, 'and')}; keep the one that was sent")
    (form,) = forms
    if "system" in given and form != "prompt":
        fix = "put the system prompt into `messages`, first" if form == "messages" else "name its tokens in `regions`"
        raise RowError("system_not_used", f"`system` goes with `prompt`, and the row has `{form}`; {fix}")
    if "regions" in given and form != "token_ids":
        fix = "leave it out (headrift finds system, user and tool itself) or give token ids"
        raise RowError("bad_regions", f"`regions` goes with `token_ids`, and the row has `{form}`; {fix}")
    return Prompt(**{key: given[key] for key in _PROMPT_KEYS if key in given})


def _list_keys(keys: Iterable[str], word: str) -> str:
    return f" {word} ".join(f"`{key}`" for key in keys)


def content_of(prompt: Prompt, *, replay: bool = False) -> str:
    """Return what a prompt says without its system prompt, case, spacing and Unicode form.

    That is the prompt's text, all messages after the leading system ones (roles, texts, tool calls without their ids)
    as JSON, or the token ids outside the system region. `replay` leaves out a last assistant message that is the logged
    answer.
    """
    if prompt.token_ids is not None:
        start, end = prompt.regions.get("system", (0, 0))
        return json.dumps([*prompt.token_ids[:start], *prompt.token_ids[end:]])
    if prompt.messages is None:
        return _normalise(prompt.prompt or "")
    turns = [_turn(message) for message in dropwhile(_is_system, prompt.messages)]
    if replay and _answers_last(prompt):
        turns.pop()
    only_user = len(turns) == 1 and turns[0][0] == "user"  # the same as a prompt that is given as a text
    return turns[0][1] if only_user else json.dumps(turns, ensure_ascii=False)


def _answers_last(prompt: Prompt) -> bool:
    """Whether the logged answer is the last message."""
    given = prompt.response is not None or prompt.response_ids is not None
    return not given and bool(prompt.messages) and prompt.messages[-1].get("role") == "assistant"  # type: ignore[index]


def _answer_of(prompt: Prompt) -> str:
    """The logged answer, word for word."""
    if prompt.response_ids is not None:
        return json.dumps([*prompt.response_ids])
    if prompt.response is not None or not _answers_last(prompt):
        return prompt.response or ""
    return json.dumps(prompt.messages[-1], sort_keys=True, ensure_ascii=False)  # type: ignore[index]


def _hash(text: str) -> str:
    """16 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_system(message: Mapping[str, Any]) -> bool:
    return message.get("role") in ("system", "developer")


def _turn(message: Mapping[str, Any]) -> list[str]:
    """Return role, text, and each tool call's name and arguments, of a message that is known to be well formed."""
    content = message.get("content")
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content or [])
    functions = [call["function"] for call in message.get("tool_calls") or []]
    calls = [_normalise(f"{function['name']} {_arguments(function.get('arguments'))}") for function in functions]
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
