"""Chat rendering: messages -> token ids and the named token regions of the prompt.

The model's own chat template writes the prompt, as vLLM's chat server would. Where it put a message's text is asked of
the template too: it renders once more with that text replaced by a mark, and the result must agree with the real
rendering. The text is never searched for: a user may quote the system prompt, and attacks do.

Flags of a rendered prompt:

- `merged_system`: the leading system and developer messages became one system message, joined by a blank line.
- `folded_system`: the template takes no system message; its text and a blank line stand before the first user text.
- `assistant_prefill`: the conversation ends with an assistant message, which the model continues.
- `control_tokens`: a user or tool text spells a control token; it is tokenised as one, as a server does.
- `tool_not_found`: where the tool messages' text went is unknown; there is no `tool` region.
"""

from __future__ import annotations

import json
import operator
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROLES = ("system", "developer", "user", "assistant", "tool")
_KEPT_KEYS = ("name", "tool_call_id", "reasoning", "reasoning_content")
_MAX_KNOWN_SHAPES = 4096
# Characters of texts up to and with a system prompt whose tokens are remembered: some 30 MB.
_MAX_HEADS = 1 << 20
_TOO_LONG = "the prompt has {n} and at most {limit} tokens fit; shorten it or take a model with a longer context"

Message = dict[str, Any]
Span = tuple[int, int]
_Apply = Callable[[list[Message]], str]


class PromptError(ValueError):
    """A prompt that cannot be scored: `reason` is a snake_case code, `str(error)` what is wrong and what to do."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason

    def __str__(self) -> str:
        return self.args[1]


class TokenizerError(ValueError):
    """A model whose tokenizer cannot be used at all: nothing that a prompt could change."""


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A prompt as the model gets it.

    Attributes:
        token_ids: The P token ids.
        regions: Named half-open token ranges, 0 <= start <= end <= P: always `prompt` = (0, P); from a conversation
            also `system`, `user` (the last user message) and, if there are any, `tool` (the last run of tool messages).
        flags: See the module.
        text: What was tokenised, None for given token ids.
    """

    token_ids: list[int]
    regions: dict[str, Span]
    flags: tuple[str, ...] = ()
    text: str | None = None


@dataclass(frozen=True, slots=True)
class _Slot:
    """A text to find: message `index` has the content `before + text + after`."""

    index: int
    text: str
    before: str = ""
    after: str = ""
    verbatim: bool = True  # False for tool messages, which templates may print as JSON


class ChatRenderer:
    """Renders conversations with a model's chat template and finds the system prompt and the user's text in the tokens.

    Not for use by several threads at once.

    Args:
        tokenizer: A fast transformers tokenizer with a chat template.
        max_prompt_tokens: The longest prompt accepted, in tokens; None for any.

    Raises:
        TokenizerError: The tokenizer is not fast, or its chat template is missing or broken.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, max_prompt_tokens: int | None = None) -> None:
        from jinja2 import TemplateSyntaxError

        if not getattr(tokenizer, "is_fast", False):
            raise TokenizerError(
                f"the tokenizer ({type(tokenizer).__name__}) does not say which characters each token covers; "
                "use a model that ships a fast tokenizer (a tokenizer.json file)"
            )
        try:
            tokenizer.get_chat_template()
        except ValueError as error:
            raise TokenizerError(
                "the model has no (default) chat template, so headrift does not know how it is given a system prompt; "
                "use its instruction-tuned version, or give prompts as token ids with named spans"
            ) from error
        self._tokenizer = tokenizer
        self._max_prompt_tokens = max_prompt_tokens
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)
        self._known_shapes: dict[tuple, str] = {}
        # Random, so that no prompt can hold it on purpose; its one "h" comes first, so that two marks cannot overlap.
        self._mark = f"headrift{secrets.token_hex(8)}n{{}}x"
        special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._control_token = _any_of({token.content for token in special} | set(tokenizer.all_special_tokens))
        # Control tokens at which a text can be cut in two: not those that take the blanks before them.
        self._cut = _any_of({token.content for token in special if not token.lstrip})
        self._known_heads: dict[str, tuple[list[int], list[Span]]] = {}
        self._head_characters = 0
        try:
            self._apply([{"role": "user", "content": "x"}], None, False)
        except PromptError as error:
            if isinstance(error.__cause__, TemplateSyntaxError):
                raise TokenizerError(f"the model's chat template is broken: {error.__cause__}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        first_number: int = 1,
    ) -> RenderedPrompt:
        """Render a conversation into token ids and regions.

        Args:
            messages: In OpenAI's chat form, a leading system or developer message and a user message among them.
            tools: JSON schemas.
            first_number: What errors call the first message; 0 if the caller put one before those it was given.

        Raises:
            PromptError: With the reason `bad_messages`, `bad_tools`, `unsupported_content`, `invalid_text`,
                `no_user_message`, `no_system_prompt`, `empty_system_prompt`, `template_rejected`, `span_not_found` or
                `prompt_too_long`.
        """
        conversation = _clean_messages(messages, first_number)
        if tools is not None and not (_is_list(tools) and all(isinstance(tool, Mapping) for tool in tools)):
            raise PromptError("bad_tools", "tools must be a list of JSON objects, each describing one tool")
        schemas = [dict(tool) for tool in tools] if tools else None
        try:
            return self._render(conversation, schemas)
        except PromptError as error:
            if error.reason != "span_not_found":
                raise
        # Some templates print the date, so two renderings of one conversation can differ: once, at midnight.
        return self._render(conversation, schemas)

    def _render(self, conversation: list[Message], tools: list[dict] | None) -> RenderedPrompt:
        prefill = conversation[-1]["role"] == "assistant"
        apply = partial(self._apply, tools=tools, prefill=prefill)
        shape = self._shape(conversation, tools, apply)
        arranged, slots = _arrange(conversation, shape)
        text = apply(arranged)
        limit = self._max_prompt_tokens
        # What is far too long is not tokenised: 10 MB take 8 s, in which the engine stands still. The longest token's
        # length bounds the tokens from below; times 4, for normalisers that join characters.
        if limit is not None and len(text) > 4 * limit * self._longest_token:
            raise PromptError("prompt_too_long", _TOO_LONG.format(n=f"{len(text):,} characters", limit=limit))
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError("invalid_text", f"not valid Unicode text: {error}; repair its encoding") from error
        flags = [] if shape == "as_is" else [f"{shape}_system"]
        if prefill:
            flags.append("assistant_prefill")
        if any(m["role"] in ("user", "tool") and self._control_token.search(m["content"]) for m in conversation):
            flags.append("control_tokens")
        mark = next(mark for mark in map(self._mark.format, count()) if mark not in text)
        spans = {}
        for name, places in slots.items():
            try:
                texts = [_find(arranged, slot, text, mark, apply, name) for slot in places]
            except PromptError:
                if name != "tool":  # which the score does not need
                    raise
                flags.append("tool_not_found")
            else:
                spans[name] = min(start for start, _ in texts), max(end for _, end in texts)
        if spans["system"][0] < spans["user"][1] and spans["user"][0] < spans["system"][1]:
            raise PromptError("span_not_found", "the model's chat template puts the user text between system messages")
        token_ids, offsets = self._encode(text, spans["system"][1])
        n_tokens = len(token_ids)
        if limit is not None and n_tokens > limit:
            raise PromptError("prompt_too_long", _TOO_LONG.format(n=f"{n_tokens} tokens", limit=limit))
        regions = {"prompt": (0, n_tokens)} | {name: _token_range(offsets, *span) for name, span in spans.items()}
        if regions["system"][0] == regions["system"][1]:
            raise PromptError("empty_system_prompt", "the tokenizer makes no token of the system prompt; give another")
        return RenderedPrompt(token_ids, regions, tuple(flags), text)

    def _encode(self, text: str, system_end: int) -> tuple[list[int], list[Span]]:
        """Token ids and the characters of each; a system prompt's tokens are worked out once.

        A tokenizer cuts a text at its control tokens before it does anything else, so what follows one is tokenised
        alike whatever stands before. That is put to the test with the first prompt after each system prompt.
        """
        cut = self._cut.search(text, system_end)
        if cut is None:
            return self._encode_all(text)
        head, place = text[: cut.start()], cut.start()
        known = self._known_heads.get(head)
        if known is not None:
            ids, offsets = self._encode_all(text[place:])
            return known[0] + ids, known[1] + [(start + place, end + place) for start, end in offsets]
        whole, first = self._encode_all(text), self._encode_all(head)
        rest = self._encode_all(text[place:])
        if (first[0] + rest[0], first[1] + [(s + place, e + place) for s, e in rest[1]]) != whole:
            self._cut = _any_of(())
        else:
            self._head_characters += len(head)
            if self._head_characters > _MAX_HEADS:
                self._known_heads.clear()
                self._head_characters = len(head)
            self._known_heads[head] = first
        return whole

    def _encode_all(self, text: str) -> tuple[list[int], list[Span]]:
        # No special tokens are added: the template writes BOS where the model wants it.
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["input_ids"], encoded["offset_mapping"]

    def _apply(self, conversation: list[Message], tools: list[dict] | None, prefill: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                conversation,
                tools=tools,
                tokenize=False,
                add_generation_prompt=not prefill,
                continue_final_message=prefill,
            )
        except Exception as error:  # a template is a program: it can raise anything
            # transformers adds the whole rendered chat to its complaint about a prefill
            reason = str(error).partition("Final message to continue:")[0].strip()[:300]
            what = "a conversation ending with an assistant message to continue" if prefill else "this conversation"
            message = f"the model's chat template rejects {what}: {type(error).__name__}: {reason}"
            raise PromptError("template_rejected", message) from error

    def _shape(self, conversation: list[Message], tools: list[dict] | None, apply: _Apply) -> str:
        """How this template can be given the system prompt: `as_is`, `merged` or `folded`.

        Asked with marks for texts, so that the answer does not hang on any one prompt's words and can be remembered.
        """
        signature = tuple((m["role"], bool(m["content"].strip()), "tool_calls" in m) for m in conversation), bool(tools)
        if signature in self._known_shapes:
            return self._known_shapes[signature]
        marks = [self._mark.format(i) if m["content"].strip() else "" for i, m in enumerate(conversation)]
        marked = [{**m, "content": mark or m["content"]} for m, mark in zip(conversation, marks, strict=True)]
        roles = [m["role"] for m in conversation[: _n_leading(conversation)]]
        template = self._tokenizer.get_chat_template(tools=tools)
        shapes = ["as_is", "merged", "folded"]
        if roles == ["system"]:
            shapes.remove("merged")
        # vLLM's test too: a template that prints whatever role it is given would print one that its model never saw.
        elif "developer" in roles and not re.search("""["']developer["']""", template):
            shapes.remove("as_is")
        for shape in shapes:
            try:
                text = apply(_arrange(marked, shape)[0])
            except PromptError:
                continue
            if all(mark in text for mark in marks[: len(roles)]):
                if len(self._known_shapes) >= _MAX_KNOWN_SHAPES:
                    self._known_shapes.clear()
                self._known_shapes[signature] = shape
                return shape
        return "folded"  # nothing works: rendering the real texts so raises the error that says why


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern of any of these texts, the longest that fits; of none, one that matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True))) or "(?!)")


def chat_messages(prompt: str, system: str | None) -> list[Message]:
    """The conversation of a system prompt (None: there is none) and one user message."""
    user = {"role": "user", "content": prompt}
    return [user] if system is None else [{"role": "system", "content": system}, user]


def from_token_ids(token_ids: Iterable[int], regions: Mapping[str, Span]) -> RenderedPrompt:
    """A prompt given as token ids with named half-open token ranges, taken as they are; `prompt` = (0, P) is added.

    PromptError `bad_token_ids` or `bad_regions` if they are not that.
    """
    ids = _integers(token_ids)
    if not ids or min(ids) < 0:
        raise PromptError("bad_token_ids", "token ids must be a non-empty list of integers, none below 0")
    if not isinstance(regions, Mapping) or not all(isinstance(name, str) and name for name in regions):
        raise PromptError("bad_regions", 'regions must map names to [start, end), such as {"system": [1, 20]}')
    checked = {"prompt": (0, len(ids))}
    for name, span in regions.items():
        bounds = _integers(span)
        if not bounds or len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] <= len(ids):
            need = f"two integers [start, end) with 0 <= start <= end <= {len(ids)}, the number of tokens"
            raise PromptError("bad_regions", f"region {name!r} is {span!r}; it must be {need}")
        if name == "prompt" and tuple(bounds) != checked["prompt"]:
            raise PromptError("bad_regions", f"region 'prompt' is always [0, {len(ids)}) here; leave it out")
        checked[name] = (bounds[0], bounds[1])
    return RenderedPrompt(ids, checked)


def _integers(values: Any) -> list[int] | None:
    try:
        values = list(values)
        return None if any(isinstance(value, bool) for value in values) else [operator.index(value) for value in values]
    except TypeError:
        return None


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _clean_messages(messages: Any, first_number: int) -> list[Message]:
    """Checked copies of the messages, in the form in which vLLM's chat server hands them to a template."""
    if not _is_list(messages) or not messages:
        raise PromptError("bad_messages", "messages must be a non-empty list of {role, content} objects")
    cleaned = [_clean_message(message, f"message {n}") for n, message in enumerate(messages, first_number)]
    if not any(m["role"] == "user" for m in cleaned):
        raise PromptError("no_user_message", "the conversation has no user message; add the prompt as one")
    leading = cleaned[: _n_leading(cleaned)]
    if not leading:
        fix = "give `system` in the row (or begin `messages` with a system message), or --system-prompt-file"
        raise PromptError("no_system_prompt", f"there is no system prompt to measure attention on; {fix}")
    if not any(m["content"].strip() for m in leading):
        raise PromptError("empty_system_prompt", "the system prompt is empty; give a text to measure attention on")
    if "tool_calls" in cleaned[-1]:
        raise PromptError("bad_messages", "the conversation ends with a tool call; add the tool's answer or drop it")
    return cleaned


def _clean_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise PromptError("bad_messages", f"{where} is not an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise PromptError("bad_messages", f"{where} has the role {role!r}; known roles are {', '.join(ROLES)}")
    where = f"{where} ({role})"
    cleaned = {"role": role} | {key: message[key] for key in _KEPT_KEYS if isinstance(message.get(key), str)}
    if role == "assistant" and message.get("tool_calls"):
        cleaned["tool_calls"] = _clean_tool_calls(message["tool_calls"], where)
        content = "" if content is None else content
    if _is_list(content):
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(kind, str) and kind != "text":
                raise PromptError("unsupported_content", f"{where} has a part of type {kind!r}; only text is scored")
            if kind != "text" or not isinstance(part.get("text"), str):
                raise PromptError("bad_messages", f'{where} has a part that is not {{"type": "text", "text": "..."}}')
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise PromptError("bad_messages", f"{where} has no text; content must be a string or a list of text parts")
    return {**cleaned, "content": content}


def _clean_tool_calls(calls: Any, where: str) -> list[dict]:
    cleaned = []
    for call in calls if _is_list(calls) else [None]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise PromptError("bad_messages", f"{where}: tool_calls must be a list of function calls with names")
        # Logs hold the arguments as JSON text, templates want the object. What is not one becomes {}, as in vLLM.
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                arguments = None
        arguments = dict(arguments) if isinstance(arguments, Mapping) else {}
        cleaned.append({**(call or {}), "function": {**function, "arguments": arguments}})
    return cleaned


def _n_leading(conversation: list[Message]) -> int:
    return next((i for i, m in enumerate(conversation) if m["role"] not in ("system", "developer")), len(conversation))


def _arrange(conversation: list[Message], shape: str) -> tuple[list[Message], dict[str, list[_Slot]]]:
    """The conversation in the given shape, and the texts that are to be found in it, by region name."""
    leading, rest = conversation[: _n_leading(conversation)], conversation[_n_leading(conversation) :]
    joined = "\n\n".join(m["content"] for m in leading if m["content"].strip())
    before_user = ""
    if shape == "as_is":
        arranged = conversation
        system = [_Slot(i, m["content"]) for i, m in enumerate(leading) if m["content"].strip()]
    elif shape == "merged":
        arranged = [{"role": "system", "content": joined}, *rest]
        system = [_Slot(0, joined)]
    else:
        arranged = rest
        first, *later = (i for i, m in enumerate(rest) if m["role"] == "user")
        user = rest[first]["content"]
        # A blank user text needs no blank line before it; a template that trims would trim that as well.
        joined, gap = (joined, "\n\n") if user.strip() else (joined.rstrip(), "")
        arranged[first] = {**rest[first], "content": joined + gap + user}
        system = [_Slot(first, joined, after=gap + user)]
        before_user = "" if later else joined + gap
    last = max(i for i, m in enumerate(arranged) if m["role"] == "user")
    user = _Slot(last, arranged[last]["content"].removeprefix(before_user), before=before_user)
    slots = {"system": system, "user": [user]}
    tools = [i for i, m in enumerate(arranged) if m["role"] == "tool"]
    if tools:
        first = next(i for i in reversed(tools) if arranged[i - 1]["role"] != "tool")
        slots["tool"] = [_Slot(i, arranged[i]["content"], verbatim=False) for i in sorted({first, tools[-1]})]
    return arranged, slots


def _find(arranged: list[Message], slot: _Slot, text: str, mark: str, apply: _Apply, name: str) -> Span:
    """The characters [start, end) of `text`, the rendering of `arranged`, that the template made of `slot`."""
    printed = set()

    def around(content: str) -> tuple[str, str] | None:
        """What is rendered before and after the mark in `content`, put in place of the slot's text."""
        changed = list(arranged)
        changed[slot.index] = {**arranged[slot.index], "content": slot.before + content + slot.after}
        try:
            head, *tails = apply(changed).split(mark)
        except PromptError:
            return None
        printed.add(len(tails))
        return (head, tails[0]) if len(tails) == 1 else None

    def between(head: str, tail: str) -> Span | None:
        start, end = len(head), len(text) - len(tail)
        if start > end or not text.startswith(head) or not text.endswith(tail):
            return None
        middle = text[start:end]  # the slot's text, but for whitespace that the template trims
        right = middle in slot.text and middle.strip() == slot.text.strip()
        return (start, end) if right or not slot.verbatim else None

    if (sides := around(mark)) and (span := between(*sides)):
        return span
    # The template looks at the text. Keep it: a mark before it shows the start, one after it the end.
    before, after = around(mark + slot.text), around(slot.text + mark)
    if before and after and (span := between(before[0], after[1])):
        return span
    # The template may test how the text begins and ends. A mark within leaves both alone.
    core = slot.text.strip()
    left, right = core[: len(core) // 2], core[len(core) // 2 :]
    sides = around(slot.text.replace(core, left + mark + right)) if left else None
    if sides and "".join(sides) == text and sides[0].endswith(left) and sides[1].startswith(right):
        return len(sides[0]) - len(left), len(sides[0]) + len(right)
    how = "changes it" if 1 in printed else "leaves it out" if printed <= {0} else "prints it more than once"
    raise PromptError(
        "span_not_found",
        f"cannot tell which tokens are the {name} text: the model's chat template {how}; "
        "give the prompt as token ids with named spans instead",
    )


def _token_range(offsets: list[Span], start: int, end: int) -> Span:
    """The tokens whose characters overlap [start, end), as a half-open range; an empty one where none do."""
    inside = [i for i, (s, e) in enumerate(offsets) if s < end and e > start and e > s]
    if inside:
        return inside[0], inside[-1] + 1
    place = next((i for i, (s, _) in enumerate(offsets) if s >= start), len(offsets))
    return place, place
