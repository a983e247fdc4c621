"""From a prompt to an engine request: chat rendering, token ids, named spans, the logged answer.

Here, or ahead of the engine in worker processes: rendering takes a third of a millisecond a prompt, so that one process
feeds some 3,000 prompts/s. A worker takes 100 MB, and a second to start: it gets the tokenizer ready-made and needs no
torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from signal import SIGKILL
from typing import TYPE_CHECKING, Any

import numpy as np

from headrift import signal
from headrift.engine_setup import has_gpu, prepare_torch
from headrift.errors import EngineError
from headrift.prompts import ChatRenderer, PromptError, RenderedPrompt, chat_messages, from_token_ids
from headrift.requests import ProbeRequest
from headrift.results import Rejected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The first token, on which heads that attend to nothing park their attention: of every prompt that does not name one.
BOS = "bos"
# Regions that prompts from messages have: token ids may name them too, whether or not they are recorded.
_OF_MESSAGES = ("system", "user", "tool", BOS)
# Prompts that a worker gets at a time, and how many such batches are under way: requests that began together end
# together, and then as many prompts are wanted at once as an engine has slots.
_BATCH, _AHEAD = 16, 24
_MOST_WORKERS = 8
# Prompts that are prepared without workers, which would not be up before so few are done.
_BEFORE_WORKERS = 256
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt to score: a `prompt` with its `system` text, chat `messages`, or `token_ids` with named `regions`.

    response, or response_ids (token ids): the logged answer, needed for replay. A response as text is taken as whole:
    the model ended its turn after it. A trailing assistant message is continued; in replay it is the logged answer.
    regions: with token_ids, token ranges [start, end) by name, `system` among them; nothing else may name regions.
    """

    prompt: str | None = None
    system: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    response: str | None = None
    token_ids: Sequence[int] | None = None
    regions: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    response_ids: Sequence[int] | None = None
    id: str | None = None

    @classmethod
    def of(cls, given: str | Mapping[str, Any] | Prompt) -> Prompt:
        """A Prompt from a text, a row (keys that are no field of Prompt are left out), or a Prompt."""
        if isinstance(given, Prompt):
            return given
        if isinstance(given, str):
            return cls(prompt=given)
        if isinstance(given, Mapping):
            names = {f.name for f in fields(cls)}
            return cls(**{k: v for k, v in given.items() if k in names and v is not None})
        raise PromptError("bad_prompt", f"a prompt is a text, a mapping or a Prompt, not {type(given).__name__}")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt with its request. prefix: a hash of the tokens up to the end of the system region; key: of all that the
    result hangs on, so that two prompts with the same key have the same result."""

    index: int
    id: str | None
    rendered: RenderedPrompt
    request: ProbeRequest
    prefix: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class Rules:
    """What prompts are prepared for. tokenizer: a folder or name transformers can load. regions: names that may be
    given; vocabulary: tokens that the model knows; answer_tokens: the most that an answer has. The rest as Scorer has
    it."""

    tokenizer: str
    trust_remote_code: bool
    system_prompt: str | None
    steps: int
    regions: tuple[str, ...]
    vocabulary: int
    max_model_len: int
    answer_tokens: int
    attention_entropy: bool = False


class Preparer:
    """Prepares prompts, one at a time. TokenizerError where the model's tokenizer or chat template cannot be used.

    renderer: writes the chats.
    """

    def __init__(self, rules: Rules, tokenizer: PreTrainedTokenizerFast) -> None:
        self._rules, self._tokenizer = rules, tokenizer
        self.renderer = ChatRenderer(tokenizer, max_prompt_tokens=rules.max_model_len)

    def prepare(self, index: int, given: str | Mapping[str, Any] | Prompt, replay: bool) -> Prepared | Rejected:
        """The request that scores a prompt, or why there is none."""
        rules = self._rules
        name = given.get("id") if isinstance(given, Mapping) else getattr(given, "id", None)
        try:
            prompt = Prompt.of(given)
            rendered, answer_ids = self._render(prompt, replay)
            if BOS in rules.regions:
                rendered = replace(rendered, regions={BOS: (0, 1), **rendered.regions})
            if "system" not in rendered.regions or rendered.regions["system"][0] == rendered.regions["system"][1]:
                raise PromptError("no_system_prompt", "the prompt names no system region, or an empty one")
            answer = rules.answer_tokens
            if answer_ids is not None:
                answer = signal.n_steps(len(answer_ids), rules.steps) + 1
            if len(rendered.token_ids) + answer > rules.max_model_len:
                longer = rules.answer_tokens > rules.steps + 1
                what = f"{answer} tokens of answer" if longer else f"{rules.steps} steps"
                raise PromptError(
                    "prompt_too_long",
                    f"the prompt has {len(rendered.token_ids)} tokens; with {what} at most "
                    f"{rules.max_model_len - answer} fit the context of {rules.max_model_len}: shorten it or "
                    f"{'ask for shorter answers' if longer else 'record fewer steps'}",
                )
        except PromptError as error:
            return Rejected(index, name, error.reason, str(error))
        request = ProbeRequest(
            rendered.token_ids,
            rendered.regions,
            rules.steps,
            answer_ids,
            answer_tokens=rules.answer_tokens,
            row_entropy=rules.attention_entropy,
        )
        return Prepared(index, prompt.id, rendered, request, *_digests(rendered, answer_ids))

    def _render(self, prompt: Prompt, replay: bool) -> tuple[RenderedPrompt, list[int] | None]:
        """Token ids and regions of the prompt, and the answer to replay (None: the model is to answer)."""
        response = prompt.response
        if prompt.token_ids is not None:
            rendered = from_token_ids(prompt.token_ids, prompt.regions)
            self._check_vocabulary(rendered.token_ids)
            unknown = set(rendered.regions) - {*self._rules.regions, *_OF_MESSAGES}
            if unknown:
                raise PromptError(
                    "unknown_region", f"regions {sorted(unknown)} were not named to the run: --region, or regions=..."
                )
        else:
            messages, first_number = prompt.messages, 1
            if messages is None:
                if prompt.prompt is None:
                    raise PromptError("no_prompt", "a row needs a `prompt`, `messages` or `token_ids`")
                system = prompt.system if prompt.system is not None else self._rules.system_prompt
                messages = chat_messages(prompt.prompt, system)
            elif (
                not any(_role(m) in ("system", "developer") for m in messages) and self._rules.system_prompt is not None
            ):
                messages, first_number = [{"role": "system", "content": self._rules.system_prompt}, *messages], 0
            if replay and response is None and prompt.response_ids is None and messages:
                last = messages[-1]
                if _role(last) == "assistant" and isinstance(last.get("content"), str):
                    response, messages = last["content"], messages[:-1]
            rendered = self.renderer.render(messages, tools=prompt.tools, first_number=first_number)
        if not replay:
            return rendered, None
        if prompt.response_ids is not None:
            answer_ids = from_token_ids(prompt.response_ids, {}).token_ids if prompt.response_ids else []
            self._check_vocabulary(answer_ids)
            return rendered, answer_ids
        if not isinstance(response, str):
            raise PromptError("no_response", "replay needs the logged answer: a `response` text in the row")
        ids = self._tokenizer(response, add_special_tokens=False)["input_ids"]
        return rendered, [*ids, self._tokenizer.eos_token_id or 0]

    def _check_vocabulary(self, token_ids: Sequence[int]) -> None:
        n_tokens = self._rules.vocabulary
        if any(token >= n_tokens for token in token_ids):
            raise PromptError("bad_token_ids", f"token {max(token_ids)} is not one of the model's {n_tokens}")


def workers_for_machine() -> int:
    """How many processes should prepare prompts: one beside an engine on the CPU, which wants the cores for itself."""
    cores = os.cpu_count() or 1
    return min(_MOST_WORKERS, max(1, cores - 2)) if has_gpu() else int(cores > 1)


class Ahead:
    """Prepares streams of prompts in order, in so many worker processes, which start when a stream turns out long.

    The processes end with this one, if `close` does not end them.
    """

    def __init__(self, rules: Rules, tokenizer: PreTrainedTokenizerFast, workers: int) -> None:
        self._rules, self._tokenizer, self._workers = rules, tokenizer, workers
        self._open = ExitStack()

    @property
    def prompts_ahead(self) -> int:
        """How many prompts are taken, at most, before the first is handed back."""
        return _BATCH * _AHEAD

    def prepared(self, prompts: Iterable[Any], replay: bool, here: Preparer) -> Iterator[Prepared | Rejected]:
        """Each prompt's request, or why there is none, in order. here: prepares them until the workers are up."""
        numbered, under_way = enumerate(prompts), deque[Future[list[Prepared | Rejected]]]()
        for index, given in islice(numbered, _BEFORE_WORKERS):
            yield here.prepare(index, given, replay)
        nothing = self._pool.submit(_prepare_all, [], replay)  # is done when a worker is up, or failed to start
        while not (nothing.done() and nothing.exception() is None):
            one = next(numbered, None)
            if one is None:
                return
            yield here.prepare(*one, replay)
        while True:
            while len(under_way) < _AHEAD and (batch := list(islice(numbered, _BATCH))):
                under_way.append(self._pool.submit(_prepare_all, batch, replay))
            if not under_way:
                return
            yield from under_way.popleft().result()

    def close(self) -> None:
        """End the processes."""
        self._open.close()

    @cached_property
    def _pool(self) -> ProcessPoolExecutor:
        load = partial(load_tokenizer, self._rules.tokenizer, True)
        if not self._rules.trust_remote_code:  # whose classes cannot be found by their names in another process
            # In a file, for arguments are read while a process starts, and this one would wait until they are.
            file = os.memfd_create("tokenizer")
            self._open.callback(os.close, file)
            path = Path(f"/proc/{os.getpid()}/fd/{file}")
            path.write_bytes(pickle.dumps(self._tokenizer))
            load = partial(_unpickled, path)
        arguments = (self._rules, load)
        pool = ProcessPoolExecutor(self._workers, get_context("spawn"), initializer=_begin, initargs=arguments)
        self._open.callback(pool.shutdown, cancel_futures=True)
        return pool


_of_process: list[Preparer] = []  # a worker's own


def _begin(rules: Rules, load: Callable[[], PreTrainedTokenizerFast]) -> None:
    # Where the main process is killed nothing tells its workers, which would wait for work for ever.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, SIGKILL)
    _of_process.append(Preparer(rules, load()))


def _unpickled(path: Path) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = pickle.loads(path.read_bytes())
    return tokenizer


def _prepare_all(batch: Sequence[tuple[int, Any]], replay: bool) -> list[Prepared | Rejected]:
    prepared = [_of_process[0].prepare(index, given, replay) for index, given in batch]
    # The text is of no more use, and would be the most of what travels.
    return [p if isinstance(p, Rejected) else replace(p, rendered=replace(p.rendered, text=None)) for p in prepared]


def load_tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerFast:
    """A model's tokenizer; EngineError where there is none."""
    prepare_torch()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise EngineError(f"no tokenizer can be loaded from {name}: {error}") from error


def _digests(rendered: RenderedPrompt, answer_ids: list[int] | None) -> tuple[bytes, bytes]:
    """Prepared.prefix and Prepared.key."""
    ids = np.asarray(rendered.token_ids, np.int64)
    prefix = hashlib.blake2b(ids[: rendered.regions["system"][1]].tobytes(), digest_size=16)
    key = prefix.copy()
    key.update(ids[rendered.regions["system"][1] :].tobytes())
    key.update(repr((sorted(rendered.regions.items()), rendered.flags, answer_ids)).encode())
    return prefix.digest(), key.digest()


def _role(message: object) -> object:
    return message.get("role") if isinstance(message, Mapping) else None
