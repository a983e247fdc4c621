"""From a prompt to an engine request: chat rendering, token ids, named regions, the logged answer.

Rendering takes a third of a millisecond a prompt, so one process prepares about 3,000 prompts/s. A worker process takes
100 MB and a second to start: it gets the tokenizer ready-made and needs no torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
import signal as signals
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from headrift import signal
from headrift.errors import EngineError
from headrift.prompts import ChatRenderer, PromptError, RenderedPrompt, chat_messages, from_token_ids
from headrift.requests import ProbeRequest
from headrift.results import Rejected
from headrift.vllm_engine import has_gpu, prepare_torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The region of the first token, on which heads that attend to nothing park their attention; prompts may name another.
BOS = "bos"
# Regions that prompts from messages have: prompts of token ids may name them too, whether or not they are recorded.
_MESSAGE_REGIONS = ("system", "user", "tool", BOS)
# Prompts in a worker's batch, and batches in flight: requests that began together end together, and then an engine
# wants as many prompts at once as it has slots. The bytes bound batches of huge rows.
_BATCH, _BATCHES_AHEAD, _MOST_BYTES = 16, 24, 128 << 20
_MOST_WORKERS = 8
_BEFORE_WORKERS = 256  # prompts that are prepared in this process before workers start
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
# A prompt alone that kills its worker process this often is rejected, with this reason.
_TRIALS, NOT_RENDERED = 2, "not_rendered"
_MOST_IN_A_ROW = 8  # more of them with no result between are not the prompts' fault
SKIP = object()  # for a prompt: an item of a stream that has none

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt to score: a `prompt` with its `system` text, chat `messages`, or `token_ids` with named `regions`.

    Attributes:
        response: The logged answer as text, for replay; the model is taken to have ended its turn after it. Without one
            a trailing assistant message is the logged answer; without replay the model continues that message. Replay
            of step 0 alone needs none.
        response_ids: The logged answer as token ids.
        regions: With `token_ids`, token ranges [start, end) by name, `system` among them; for nothing else.
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
    def from_any(cls, given: str | Mapping[str, Any] | Prompt) -> Prompt:
        """A Prompt from a text, a row (keys that are not fields of Prompt are left out), or a Prompt."""
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
    """A prompt as an engine request.

    Attributes:
        index: Position in its stream of prompts.
        id: The prompt's own id.
        request: Token ids, regions (`prompt` among them) and, in replay, the answer.
        flags: Of the rendered prompt, see `headrift.prompts`.
        prefix: Digest of the tokens up to the end of the system region.
        key: Digest of all that the result depends on: prompts with the same key have the same result.
    """

    index: int
    id: str | None
    request: ProbeRequest
    flags: tuple[str, ...]
    prefix: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class PrepareConfig:
    """What prompts are prepared for: an engine, and the options of a scorer."""

    system_prompt: str | None  # for prompts that bring none
    steps: int  # N, steps 0 to N are recorded
    regions: tuple[str, ...]  # that the engine records; prompts may give them
    vocabulary: int  # number of the model's tokens
    max_model_len: int
    answer_tokens: int  # the most tokens of an answer
    attention_entropy: bool = False  # record the entropy of each head's attention


class Preparer:
    """Prepares prompts, one at a time. TokenizerError if the model's tokenizer or chat template cannot be used."""

    def __init__(self, config: PrepareConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.renderer = ChatRenderer(tokenizer, max_prompt_tokens=config.max_model_len)

    def prepare(self, index: int, given: str | Mapping[str, Any] | Prompt, replay: bool) -> Prepared | Rejected:
        """The request that scores a prompt, or the reason why there is none."""
        config = self.config
        name = given.get("id") if isinstance(given, Mapping) else getattr(given, "id", None)
        try:
            prompt = Prompt.from_any(given)
            rendered, answer_ids = self._render(prompt, replay)
            if BOS in config.regions:
                rendered = replace(rendered, regions={BOS: (0, 1), **rendered.regions})
            start, end = rendered.regions.get("system", (0, 0))
            if start == end:
                raise PromptError("no_system_prompt", "the prompt names no system region, or an empty one")
            self._check_length(len(rendered.token_ids), answer_ids)
        except PromptError as error:
            return Rejected(index, name, error.reason, str(error))
        except Exception as error:  # a tokenizer and a template run code of the model's, which can raise anything
            return Rejected(index, name, NOT_RENDERED, f"rendering it fails with {type(error).__name__}: {error}")
        request = ProbeRequest(
            rendered.token_ids,
            rendered.regions,
            config.steps,
            answer_ids,
            answer_tokens=config.answer_tokens,
            row_entropy=config.attention_entropy,
        )
        return Prepared(index, prompt.id, request, rendered.flags, *_digests(rendered, answer_ids))

    def _check_length(self, prompt_tokens: int, answer_ids: list[int] | None) -> None:
        config, answer = self.config, self.config.answer_tokens
        if answer_ids is not None:
            answer = signal.n_steps(len(answer_ids), config.steps) + 1
        if prompt_tokens + answer > config.max_model_len:
            what, fix = f"{config.steps} steps", "record fewer steps"
            if config.answer_tokens > config.steps + 1:
                what, fix = f"{answer} tokens of answer", "ask for shorter answers"
            most = f"at most {config.max_model_len - answer} fit the context of {config.max_model_len}"
            why = f"the prompt has {prompt_tokens} tokens; with {what} {most}: shorten it or {fix}"
            raise PromptError("prompt_too_long", why)

    def _render(self, prompt: Prompt, replay: bool) -> tuple[RenderedPrompt, list[int] | None]:
        """Token ids and regions of the prompt, and the answer to replay (None: the model answers)."""
        response = prompt.response
        if prompt.token_ids is not None:
            rendered = from_token_ids(prompt.token_ids, prompt.regions)
            self._check_vocabulary(rendered.token_ids)
            if unknown := sorted(set(rendered.regions) - {*self.config.regions, *_MESSAGE_REGIONS}):
                why = f"regions {unknown} were not named to the run: --region, or regions=..."
                raise PromptError("unknown_region", why)
        else:
            messages, first_number, default = prompt.messages, 1, self.config.system_prompt
            if messages is None:
                if prompt.prompt is None:
                    raise PromptError("no_prompt", "a row needs a `prompt`, `messages` or `token_ids`")
                messages = chat_messages(prompt.prompt, default if prompt.system is None else prompt.system)
            elif default is not None and not any(_role(m) in ("system", "developer") for m in messages):
                messages, first_number = [{"role": "system", "content": default}, *messages], 0
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
        if response is None and not self.config.steps:
            return rendered, []  # step 0 needs no answer
        if not isinstance(response, str):
            raise PromptError("no_response", "replay past step 0 needs the logged answer: a `response` text in the row")
        ids = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        return rendered, [*ids, self.tokenizer.eos_token_id or 0]

    def _check_vocabulary(self, token_ids: Sequence[int]) -> None:
        n_tokens = self.config.vocabulary
        if (highest := max(token_ids, default=0)) >= n_tokens:
            raise PromptError("bad_token_ids", f"token {highest} is not one of the model's {n_tokens}")


def workers_for_machine(*, engine_in_process: bool = True) -> int:
    """How many worker processes suit this machine.

    A process without the engine can prepare prompts itself for an engine on the CPU, which wants the cores.
    """
    cores = os.cpu_count() or 1
    return min(_MOST_WORKERS, max(1, cores - 2)) if has_gpu() else int(engine_in_process and cores > 1)


class StreamPreparer:
    """Prepares streams of prompts in order, in worker processes once a stream turns out long.

    The worker processes end with this process if `close` does not end them.

    Args:
        preparer: Prepares prompts in this process: all of them without workers, else the first ones.
        load: Loads the tokenizer in a worker; by default a worker gets a copy of this process's.
    """

    def __init__(
        self, preparer: Preparer, workers: int, load: Callable[[], PreTrainedTokenizerFast] | None = None
    ) -> None:
        self.preparer, self._workers, self._load = preparer, workers, load
        self._open = ExitStack()
        self._rejected_in_a_row = 0  # prompts that killed workers, since the last result

    @property
    def prompts_ahead(self) -> int:
        """How many prompts are taken, at most, before the first is returned."""
        return _BATCH * _BATCHES_AHEAD if self._workers else 0

    def stream(
        self, items: Iterable[T], prompt_of: Callable[[T], Any], replay: bool
    ) -> Iterator[tuple[T, Prepared | Rejected | None]]:
        """Prepare the prompt of each item; items are read as they are needed.

        Args:
            prompt_of: An item's prompt; SKIP if it has none and is only to keep its place.
            replay: Whether the prompts' logged answers are scored.

        Returns:
            Each item with its request, the reason why there is none, or None without a prompt; in order.
        """
        numbered = enumerate(items)

        def prepared_here(some: Iterable[tuple[int, T]]) -> Iterator[tuple[T, Prepared | Rejected | None]]:
            for index, item in some:
                prompt = prompt_of(item)
                yield item, None if prompt is SKIP else self.preparer.prepare(index, prompt, replay)

        yield from prepared_here(islice(numbered, _BEFORE_WORKERS) if self._workers else numbered)
        if not self._workers:
            return
        started = self._submit(b"", replay)  # done when a worker has started, or failed to
        while not (started.done() and started.exception() is None):
            if (one := next(numbered, None)) is None:
                return
            yield from prepared_here([one])
        # Items of a batch, their numbered prompts, how many bytes these are, and the results to come.
        in_flight = deque[tuple[list[T], list[tuple[int, Any]], int, Future[list[Prepared | Rejected]]]]()
        n_bytes = 0
        while True:
            while len(in_flight) < _BATCHES_AHEAD and n_bytes < _MOST_BYTES:
                batch = list(islice(numbered, _BATCH))
                if not batch:
                    break
                prompts = [(index, prompt) for index, item in batch if (prompt := prompt_of(item)) is not SKIP]
                data = pickle.dumps(prompts, pickle.HIGHEST_PROTOCOL)
                n_bytes += len(data)
                in_flight.append(([item for _, item in batch], prompts, len(data), self._submit(data, replay)))
            if not in_flight:
                return
            some, prompts, size, future = in_flight.popleft()
            n_bytes -= size
            try:
                results = future.result()
                self._rejected_in_a_row = 0
            except BrokenExecutor:  # a worker died with them: each alone, so that only the deadly are rejected
                results = [self._alone(index, prompt, replay) for index, prompt in prompts]
            remaining = iter(results)
            for item in some:
                yield item, None if prompt_of(item) is SKIP else next(remaining)

    def close(self) -> None:
        self._open.close()

    def _alone(self, index: int, prompt: Any, replay: bool) -> Prepared | Rejected:
        for _ in range(_TRIALS):
            try:
                (result,) = self._submit(pickle.dumps([(index, prompt)]), replay).result()
            except BrokenExecutor:
                continue
            self._rejected_in_a_row = 0
            return result
        self._rejected_in_a_row += 1
        if self._rejected_in_a_row >= _MOST_IN_A_ROW:
            raise EngineError("processes that render prompts die again and again: has the machine enough memory?")
        return Rejected(index, getattr(prompt, "id", None), NOT_RENDERED, "its rendering kills the process each time")

    def _submit(self, data: bytes, replay: bool) -> Future[list[Prepared | Rejected]]:
        # Workers inherit the mask: Ctrl-C in a terminal is for this process, which may finish what it is doing.
        before = signals.pthread_sigmask(signals.SIG_BLOCK, {signals.SIGINT})
        try:
            try:
                return self._pool.submit(_prepare_batch, data, replay)
            except BrokenExecutor:  # a worker died before: another pool
                del self._pool
                return self._pool.submit(_prepare_batch, data, replay)
        finally:
            signals.pthread_sigmask(signals.SIG_SETMASK, before)

    @cached_property
    def _pool(self) -> ProcessPoolExecutor:
        load = self._load
        if load is None:
            # In a file, because arguments are read while a process starts, and this one would wait until they are.
            file = os.memfd_create("tokenizer")
            self._open.callback(os.close, file)
            path = Path(f"/proc/{os.getpid()}/fd/{file}")
            path.write_bytes(pickle.dumps(self.preparer.tokenizer))
            load = partial(_unpickle, path)
        arguments = (self.preparer.config, load)
        pool = ProcessPoolExecutor(self._workers, get_context("spawn"), initializer=_start_worker, initargs=arguments)
        self._open.callback(pool.shutdown, cancel_futures=True)
        return pool


_worker: list[Preparer] = []  # a worker process's own


def _start_worker(config: PrepareConfig, load: Callable[[], PreTrainedTokenizerFast]) -> None:
    # If the main process is killed nothing tells its workers, which would wait for work for ever.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signals.SIGKILL)
    _worker.append(Preparer(config, load()))


def _unpickle(path: Path) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = pickle.loads(path.read_bytes())
    return tokenizer


def _prepare_batch(data: bytes, replay: bool) -> list[Prepared | Rejected]:
    prompts = pickle.loads(data) if data else []
    return [_worker[0].prepare(index, prompt, replay) for index, prompt in prompts]


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """Load a model's tokenizer, from a folder or by a name that transformers knows; EngineError if there is none."""
    prepare_torch()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises Exception itself for a malformed tokenizer.json
        raise EngineError(
            f"no tokenizer can be loaded from {name}: {error}; copy the model's tokenizer files again"
        ) from error


def _digests(rendered: RenderedPrompt, answer_ids: list[int] | None) -> tuple[bytes, bytes]:
    """`prefix` and `key` of a Prepared."""
    ids = np.asarray(rendered.token_ids, np.int64)
    prefix = hashlib.blake2b(ids[: rendered.regions["system"][1]].tobytes(), digest_size=16)
    key = prefix.copy()
    key.update(ids[rendered.regions["system"][1] :].tobytes())
    key.update(repr((sorted(rendered.regions.items()), rendered.flags, answer_ids)).encode())
    return prefix.digest(), key.digest()


def _role(message: object) -> object:
    return message.get("role") if isinstance(message, Mapping) else None
