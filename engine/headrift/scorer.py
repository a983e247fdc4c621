"""Scores a stream of prompts: drives the engine, keeps it full, and hands results back in input order."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headrift import signal
from headrift.probed_engine import REGIONS, EngineError, Finished, ProbedEngine, ProbeRequest, Recording
from headrift.prompts import ChatRenderer, PromptError, RenderedPrompt, chat_messages, from_token_ids
from headrift.signal import Window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Results that wait for an earlier, slower prompt, as a multiple of the requests in flight.
_REORDER = 4
# Finished requests that are drained together.
_DRAIN = 8
# System prompts remembered as prefilled; a log with more than these in turn prefills some again.
_PRIMED = 1024
# Regions that prompts from messages have: token ids may name them too, whether or not they are recorded.
_OF_MESSAGES = ("system", "user", "tool")
_NEVER_COMPUTED = "the engine never computed steps {steps}, even without cached prefixes"


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
class ScoreResult:
    """A prompt's score and what it came from. T = n_steps + 1 recorded steps, step 0 (the last prompt token) first.

    score: mean counted instability over the window's steps and the trimmed layers, 0 to 0.5, or None with `reason`.
    n_scored: steps that went into it. system_share, head_agreement, entropy (nats), top1, margin: means over the
    window; focus: at step 0. instability: [T, layers] float32, NaN where a layer is not counted. shares: [T, layers,
    heads] float32. focus_heads: [layers, heads] float32. logit_stats: [T, 3] entropy, top-1 probability, margin, or
    None. mass: [T, layers, heads, regions] float32 with the regions in the order of `region_names`, NaN for those that
    the prompt does not have, or None. flags: those of `prompts`, and `truncated` where the answer did not end by the
    last recorded step.
    """

    index: int
    id: str | None
    score: float | None
    reason: str | None
    n_steps: int
    n_scored: int
    prompt_tokens: int
    system_tokens: int
    answer_tokens: int
    system_hash: str
    system_share: float | None
    head_agreement: float | None
    focus: float | None
    entropy: float | None
    top1: float | None
    margin: float | None
    flags: tuple[str, ...]
    answer_ids: list[int] = field(repr=False)
    text: str
    instability: np.ndarray = field(repr=False)
    shares: np.ndarray = field(repr=False)
    focus_heads: np.ndarray | None = field(repr=False)
    logit_stats: np.ndarray | None = field(repr=False)
    mass: np.ndarray | None = field(repr=False)
    region_names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A prompt that could not be scored: `reason` is a code, `detail` says what is wrong and what to do."""

    index: int
    id: str | None
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class _Prepared:
    index: int
    id: str | None
    rendered: RenderedPrompt
    request: ProbeRequest

    @property
    def shared_prefix(self) -> tuple[int, ...]:
        return tuple(self.rendered.token_ids[: self.rendered.regions["system"][1]])


class Scorer:
    """Scores prompts for inter-head instability inside vLLM. A context manager; not to be shared between threads.

    model: a folder or name vLLM can load. system_prompt: for prompts that bring none. steps: N, steps 0..N are
    recorded. window: the steps that are scored, `Window(1, 12)` or "1:12" (1-based, inclusive), all of 1..N by
    default. drop_shallow, drop_deep: the fractions of layers left out at either end. logit_stats: record next-token
    entropy, top-1 probability and margin too. keep_mass: results hold the masses. regions: names of further key
    ranges that prompts given as token ids bring. engine_args: passed to vLLM as they are, over the defaults chosen
    for this machine. verbose: let vLLM log.

    ValueError for settings that contradict each other, EngineError and RefusedError where the engine cannot be started.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        system_prompt: str | None = None,
        steps: int = 12,
        window: Window | str | None = None,
        drop_shallow: float = signal.DROP_SHALLOW,
        drop_deep: float = signal.DROP_DEEP,
        logit_stats: bool = False,
        keep_mass: bool = False,
        regions: Sequence[str] = (),
        engine_args: Mapping[str, Any] | None = None,
        verbose: bool = False,
    ):
        self.window = check_settings(steps, window, drop_shallow, drop_deep)
        self.model = str(model)
        self.system_prompt = system_prompt
        self.steps = steps
        self.trims = {"drop_shallow": drop_shallow, "drop_deep": drop_deep}
        self.logit_stats = logit_stats
        self.keep_mass = keep_mass
        self._primed: set[tuple[int, ...]] = set()
        self.engine = ProbedEngine(
            model,
            steps=steps,
            regions=(*REGIONS, *(name for name in regions if name not in REGIONS)),
            logit_stats=logit_stats,
            engine_args=engine_args,
            verbose=verbose,
        )
        try:
            self.tokenizer = _tokenizer(self.model, engine_args or {})
            self._renderer: ChatRenderer | None = None
        except BaseException:
            self.engine.close()
            raise

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        self.engine.close()

    def score(
        self,
        prompts: Iterable[str | Mapping[str, Any] | Prompt],
        *,
        replay: bool = False,
        progress: bool = False,
    ) -> Generator[ScoreResult | Rejected, None, None]:
        """Results in input order, as they are ready; a prompt that cannot be scored comes as a Rejected in its place.

        prompts are read as they are needed: neither they nor the results pile up. replay: take the prompts' logged
        answers through the model in one prefill instead of decoding new ones; there are no logit statistics then,
        because only the last token's logits are computed. progress: show a bar on standard error with rate and, where
        the number of prompts is known, time left.
        """
        results = self._run(iter(prompts), replay)
        if not progress:
            return results
        return _with_progress(results, len(prompts) if isinstance(prompts, Sized) else None)

    def _run(
        self, prompts: Iterator[str | Mapping[str, Any] | Prompt], replay: bool
    ) -> Generator[ScoreResult | Rejected, None, None]:
        engine, waiting = self.engine, deque[_Prepared]()
        running: dict[int, _Prepared] = {}
        finished: list[Finished] = []
        ready: dict[int, ScoreResult | Rejected] = {}
        source, emitted, exhausted = enumerate(prompts), 0, False
        try:
            while True:
                while not exhausted and len(waiting) + len(running) + len(ready) < _REORDER * engine.slots:
                    if len(waiting) >= engine.slots:
                        break
                    item = next(source, None)
                    if item is None:
                        exhausted = True
                        break
                    prepared = self._prepare(*item, replay)
                    if isinstance(prepared, Rejected):
                        ready[prepared.index] = prepared
                    else:
                        waiting.append(prepared)
                while waiting and engine.free_slots:
                    prepared = waiting.popleft()
                    running[engine.submit(prepared.request)] = prepared
                    if self._should_prime(prepared, waiting):
                        finished += engine.step()
                if engine.running:
                    finished += engine.step()
                if finished and (len(finished) >= _DRAIN or not engine.free_slots or not engine.running):
                    for prepared, result in self._collect(finished, running):
                        if result is None:
                            waiting.appendleft(prepared)
                        else:
                            ready[prepared.index] = result
                    finished = []
                while emitted in ready:
                    yield ready.pop(emitted)
                    emitted += 1
                if exhausted and not (waiting or running or finished or ready):
                    return
        finally:
            if running:
                engine.abort()

    def _should_prime(self, prepared: _Prepared, waiting: Sequence[_Prepared]) -> bool:
        """Whether to prefill this prompt before the next is queued, so that the next finds their prefix cached."""
        prefix = prepared.shared_prefix
        if prefix in self._primed or not waiting or waiting[0].shared_prefix != prefix:
            return False
        if len(self._primed) >= _PRIMED:
            self._primed.clear()
        self._primed.add(prefix)
        return True

    def _prepare(self, index: int, given: str | Mapping[str, Any] | Prompt, replay: bool) -> _Prepared | Rejected:
        name = given.get("id") if isinstance(given, Mapping) else getattr(given, "id", None)
        try:
            prompt = Prompt.of(given)
            rendered, answer_ids = self._render(prompt, replay)
            if "system" not in rendered.regions or rendered.regions["system"][0] == rendered.regions["system"][1]:
                raise PromptError("no_system_prompt", "the prompt names no system region, or an empty one")
            fed = len(rendered.token_ids)
            if answer_ids is not None:
                fed += signal.n_steps(len(answer_ids), self.steps) - self.steps
            longest = self.engine.most_prompt_tokens(self.steps)
            if fed > longest:
                raise PromptError(
                    "prompt_too_long",
                    f"the prompt has {len(rendered.token_ids)} tokens; with {self.steps} steps at most {longest} fit "
                    f"the context of {self.engine.max_model_len}: shorten it or record fewer steps",
                )
        except PromptError as error:
            return Rejected(index, name, error.reason, str(error))
        request = ProbeRequest(rendered.token_ids, rendered.regions, self.steps, answer_ids)
        return _Prepared(index, prompt.id, rendered, request)

    def _render(self, prompt: Prompt, replay: bool) -> tuple[RenderedPrompt, list[int] | None]:
        """Token ids and regions of the prompt, and the answer to replay (None: the model is to answer)."""
        response = prompt.response
        if prompt.token_ids is not None:
            rendered = from_token_ids(prompt.token_ids, prompt.regions)
            self._check_vocabulary(rendered.token_ids)
            unknown = set(rendered.regions) - {*self.engine.regions, *_OF_MESSAGES}
            if unknown:
                raise PromptError(
                    "unknown_region", f"regions {sorted(unknown)} were not named to the run: --region, or regions=..."
                )
        else:
            messages, first_number = prompt.messages, 1
            if messages is None:
                if prompt.prompt is None:
                    raise PromptError("no_prompt", "a row needs a `prompt`, `messages` or `token_ids`")
                system = prompt.system if prompt.system is not None else self.system_prompt
                messages = chat_messages(prompt.prompt, system)
            elif not any(_role(m) in ("system", "developer") for m in messages) and self.system_prompt is not None:
                messages, first_number = [{"role": "system", "content": self.system_prompt}, *messages], 0
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
        ids = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        return rendered, [*ids, self.tokenizer.eos_token_id or 0]

    def _check_vocabulary(self, token_ids: Sequence[int]) -> None:
        n_tokens = self.engine.vocabulary
        if any(token >= n_tokens for token in token_ids):
            raise PromptError("bad_token_ids", f"token {max(token_ids)} is not one of the model's {n_tokens}")

    @property
    def renderer(self) -> ChatRenderer:
        """Renders chats as the model's own template does; TokenizerError where its tokenizer or template cannot."""
        if self._renderer is None:
            self._renderer = ChatRenderer(self.tokenizer, max_prompt_tokens=self.engine.max_model_len)
        return self._renderer

    def _collect(
        self, finished: Sequence[Finished], running: dict[int, _Prepared]
    ) -> Iterator[tuple[_Prepared, ScoreResult | Rejected | None]]:
        """Results of finished requests; None where a step lay in a cached prefix and the prompt must run again."""
        for done, recording in zip(finished, self.engine.drain(finished, self.keep_mass), strict=True):
            prepared = running.pop(done.tenant)
            if not recording.unwritten:
                yield prepared, self._result(prepared, done, recording)
            elif not done.request.reread:
                again = ProbeRequest(
                    prepared.request.prompt_ids,
                    prepared.request.regions,
                    self.steps,
                    prepared.request.answer_ids,
                    reread=True,
                )
                yield _Prepared(prepared.index, prepared.id, prepared.rendered, again), None
            else:
                raise RuntimeError(_NEVER_COMPUTED.format(steps=recording.unwritten))

    def _result(self, prepared: _Prepared, done: Finished, recording: Recording) -> ScoreResult:
        regions, share = prepared.rendered.regions, recording.share
        start, end = regions["system"]
        counted = signal.covered(len(share), self.engine.windows, start, len(prepared.rendered.token_ids))
        instability = np.where(counted, signal.instability(share), np.nan)
        window, steps = self.window, done.n_steps
        scored = signal.score(instability, window, n_steps=steps, **self.trims)
        over: dict[str, Any] = {"n_steps": steps, "counted": counted, **self.trims}
        names = self.engine.regions
        focus_heads = None
        if "user" in regions:
            system_mass, user_mass = (recording.first[..., names.index(name)] for name in ("system", "user"))
            focus_heads = signal.focus_heads(system_mass, user_mass)
        replayed = done.request.answer_ids is not None
        truncated = len(done.answer_ids) > self.steps + 1 if replayed else done.finish_reason == "length"
        mass = recording.mass
        if mass is not None:
            mass = np.where([name in regions for name in names], mass, np.float32(np.nan))
        stats = recording.stats if self.logit_stats and not replayed else None
        entropy, top1, margin = (
            (None, None, None) if stats is None else (signal.window_mean(s, window, steps) for s in stats.T)
        )
        return ScoreResult(
            index=prepared.index,
            id=prepared.id,
            score=scored.value,
            reason=scored.reason,
            n_steps=steps,
            n_scored=scored.n_scored,
            prompt_tokens=len(prepared.rendered.token_ids),
            system_tokens=end - start,
            answer_tokens=len(done.answer_ids),
            system_hash=hashlib.sha256(np.asarray(prepared.rendered.token_ids[start:end]).tobytes()).hexdigest()[:16],
            system_share=signal.mean_share(share, window, **over),
            head_agreement=signal.head_agreement(share, window, **over),
            focus=None if focus_heads is None else signal.focus(focus_heads),
            entropy=entropy,
            top1=top1,
            margin=margin,
            flags=(*prepared.rendered.flags, *(["truncated"] if truncated else [])),
            answer_ids=done.answer_ids,
            text=self.tokenizer.decode(done.answer_ids, skip_special_tokens=True),
            instability=instability.astype(np.float32),
            shares=share,
            focus_heads=None if focus_heads is None else focus_heads.astype(np.float32),
            logit_stats=stats,
            mass=mass,
            region_names=names,
        )


def check_settings(
    steps: int,
    window: Window | str | None,
    drop_shallow: float,
    drop_deep: float,
) -> Window:
    """The window to score; ValueError, before any model is loaded, where settings contradict each other."""
    if steps < 1:
        raise ValueError(
            f"steps must be at least 1, not {steps}: step 0 is the prompt's last token and is never scored"
        )
    parsed = Window.parse(window) if isinstance(window, str) else window or Window(1, steps)
    if parsed.end > steps:
        raise ValueError(f"window {parsed} reaches past step {steps}, the last one recorded; raise steps or shorten it")
    signal.layer_range(1, drop_shallow, drop_deep)
    return parsed


def _role(message: object) -> object:
    return message.get("role") if isinstance(message, Mapping) else None


def _tokenizer(model: str, engine_args: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    name = engine_args.get("tokenizer") or model
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=bool(engine_args.get("trust_remote_code", False)))
    except (OSError, ValueError) as error:
        raise EngineError(f"no tokenizer can be loaded from {name}: {error}") from error


def _with_progress(
    results: Iterator[ScoreResult | Rejected], total: int | None
) -> Generator[ScoreResult | Rejected, None, None]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("scoring", total=total, rate="")
        start = time.monotonic()
        for n, result in enumerate(results, 1):
            # Results come in bursts, so the rate is over all of the run.
            bar.update(task, advance=1, rate=f"{n / (time.monotonic() - start):.1f} prompts/s")
            yield result
