"""Scores prompts on an engine: keeps it full, and returns results in input order."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import closing
from contextvars import ContextVar
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from headrift import signal
from headrift.prepare import (
    PrepareConfig,
    Prepared,
    Preparer,
    Prompt,
    StreamPreparer,
    load_tokenizer,
    workers_for_machine,
)
from headrift.probed_engine import REGIONS, ProbedEngine
from headrift.requests import Finished, ProbeRequest, Recording
from headrift.results import Rejected, ScoreResult
from headrift.scheduling import PromptQueue, ResultCache
from headrift.signal import ScoreRange, Window
from headrift.signals import PromptData, measure_columns
from headrift.terminal import progress_bar

if TYPE_CHECKING:
    from headrift.prompts import ChatRenderer

T = TypeVar("T")

# Makes every scorer's engine; `headrift.testing.fake_engines` puts a double here. A replaced factory is known in its
# own process only, so a job then runs its engine there.
engine_factory: ContextVar[Callable[..., Any]] = ContextVar("engine_factory", default=ProbedEngine)

# Results that wait for an earlier, slower prompt, as a multiple of the requests in flight.
_REORDER = 4
# Memory for results of prompts that may come again, in bytes.
REPEAT_BYTES = 64 << 20


class RequestScorer:
    """Scores prepared prompts on an engine of its own.

    Args:
        decode: Makes an answer's text of its token ids.
        engine: Further options of ProbedEngine. The others are as Scorer has them.

    Attributes:
        seconds_waited: How long `score_requests` has waited for requests.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        steps: int,
        score_range: ScoreRange,
        decode: Callable[[list[int]], str],
        regions: Sequence[str] = (),
        logit_stats: bool = False,
        keep_mass: bool = False,
        group: bool = True,
        prime: bool = True,
        repeat_bytes: int = REPEAT_BYTES,
        stop_if: Callable[[ScoreResult], bool] | None = None,
        **engine: Any,
    ) -> None:
        names = (*REGIONS, *(name for name in regions if name not in REGIONS))
        self.engine: ProbedEngine = engine_factory.get()(
            model, steps=steps, regions=names, logit_stats=logit_stats, **engine
        )
        self.score_range, self.logit_stats, self.keep_mass = score_range, logit_stats, keep_mass
        self.seconds_waited = 0.0
        self._decode, self._stop_if = decode, stop_if
        self._stopped: dict[int, ScoreResult] = {}  # of answers that `stop_if` ended, by index
        self._primed: set[bytes] = set()
        self._new_queue = partial(PromptQueue, group=group, prime=prime, primed=self._primed)
        self._cache = ResultCache(repeat_bytes) if repeat_bytes else None

    def close(self) -> None:
        self.engine.close()

    @property
    def in_flight(self) -> int:
        """How many requests are taken, at most, before the first result is returned."""
        return (_REORDER + 1) * self.engine.slots

    def score_requests(self, prepared: Iterable[Prepared | Rejected]) -> Generator[ScoreResult | Rejected, None, None]:
        """Score requests; results in their order, as they are ready, with rejected prompts in their places.

        They are read as they are needed. Their indexes are distinct and rise.
        """
        self._stopped.clear()
        stream = _Stream(self, iter(prepared))
        stop_if = None if self._stop_if is None else self._stop_early
        while stream.fill():
            yield from stream.ready()
            with closing(self.engine.run(stream.requests(), want_mass=self.keep_mass, stop_if=stop_if)) as outcomes:
                for one, done, recording in outcomes:
                    if recording is None:
                        stream.primed()
                        continue
                    stopped = self._stopped.pop(one.index, None)
                    stream.add(one, stopped or self._result(one, done, recording))
                    yield from stream.ready()
        yield from stream.ready()

    def _stop_early(self, prepared: Prepared, done: Finished, recording: Recording) -> bool:
        assert self._stop_if is not None
        result = self._result(prepared, done, recording)
        if not self._stop_if(result):
            return False
        self._stopped[prepared.index] = result
        return True

    def _result(self, prepared: Prepared, done: Finished, recording: Recording) -> ScoreResult:
        prompt_ids, regions, share = done.request.prompt_ids, done.request.regions, recording.share
        start, end = regions["system"]
        counted = signal.covered(len(share), self.engine.windows, start, len(prompt_ids))
        instability = np.where(counted, signal.instability(share), np.nan)
        steps = done.n_steps
        scored = self.score_range.score(instability, steps)
        names = self.engine.regions
        focus_heads = None
        if "user" in regions:
            without_prompt = [name for name in names if name != "prompt"]
            system_mass, user_mass = (recording.first[..., without_prompt.index(name)] for name in ("system", "user"))
            focus_heads = signal.focus_heads(system_mass, user_mass)
        replayed = done.request.answer_ids is not None
        truncated = len(done.answer_ids) > done.request.steps + 1 if replayed else done.finish_reason == "length"
        ends = {"truncated": truncated, "stopped": done.answering}
        mass = recording.mass
        if mass is not None:
            mass = np.where([name in regions for name in names], mass, np.float32(np.nan))
        stats = recording.stats if self.logit_stats and not replayed else None
        data = PromptData(
            score_range=self.score_range,
            n_steps=steps,
            instability=instability,
            share=share,
            focus_heads=focus_heads,
            logit_stats={} if stats is None else dict(zip(("entropy", "top1", "margin"), stats.T)),
        )
        return ScoreResult(
            index=prepared.index,
            id=prepared.id,
            score=scored.value,
            reason=scored.reason,
            n_steps=steps,
            n_scored=scored.n_scored,
            prompt_tokens=len(prompt_ids),
            system_tokens=end - start,
            answer_tokens=len(done.answer_ids),
            system_hash=hashlib.sha256(np.asarray(prompt_ids[start:end]).tobytes()).hexdigest()[:16],
            signals=measure_columns(data),
            flags=(*prepared.flags, *(flag for flag, is_set in ends.items() if is_set)),
            answer_ids=done.answer_ids,
            text=self._decode(done.answer_ids),
            instability=instability.astype(np.float32),
            shares=share,
            focus_heads=None if focus_heads is None else focus_heads.astype(np.float32),
            logit_stats=stats,
            mass=mass,
            region_names=names,
            attention_entropy=recording.measures.get("row_entropy"),
            logit_shares=data.logit_shares,
        )


class _Stream:
    """One stream of prompts through a scorer: what is queued and runs, and results that wait for earlier ones."""

    def __init__(self, scorer: RequestScorer, source: Iterator[Prepared | Rejected]) -> None:
        self._scorer, self._source = scorer, source
        self._slots = scorer.engine.slots
        self._queue = scorer._new_queue()
        self._order: deque[int] = deque()  # indexes of prompts that were taken and not returned
        self._ready: dict[int, ScoreResult | Rejected] = {}
        self._repeats: dict[bytes, list[Prepared]] = {}  # of prompts that are queued or run, by their keys
        self._running = 0
        self._priming = self._exhausted = False

    def fill(self) -> bool:
        """Take prompts as far as there is room for them; whether any are queued or there may be more."""
        while not self._exhausted and len(self._order) < _REORDER * self._slots and len(self._queue) < self._slots:
            begun = time.monotonic()
            one = next(self._source, None)
            self._scorer.seconds_waited += time.monotonic() - begun
            if one is None:
                self._exhausted = True
                break
            self._order.append(one.index)
            cache = self._scorer._cache
            if isinstance(one, Rejected):
                self._ready[one.index] = one
            elif cache is not None and (known := cache.get(one.key)) is not None:
                self._ready[one.index] = replace(known, index=one.index, id=one.id)
            elif cache is not None and one.key in self._repeats:
                self._repeats[one.key].append(one)
            else:
                self._repeats[one.key] = []
                self._queue.add(one)
        return bool(len(self._queue)) or not self._exhausted

    def requests(self) -> Iterator[tuple[Prepared, ProbeRequest] | None]:
        """What the engine is to run, until nothing is queued and nothing runs; None to wait for a result."""
        while self.fill() and (len(self._queue) or self._running):
            if not len(self._queue):
                yield None
                continue
            one = self._queue.pop()
            if tokens := self._queue.to_prime(one):
                # A request leaves all of its prompt but the last token in the cache for others.
                ids = one.request.prompt_ids[: tokens + 1]
                self._priming = True
                yield one, ProbeRequest(ids, {}, steps=0, probed=False)
                while self._priming:
                    yield None
            self._running += 1
            yield one, one.request

    def primed(self) -> None:
        self._priming = False

    def add(self, one: Prepared, result: ScoreResult) -> None:
        """Add the result of a prompt that ran, for it and for those that repeat it."""
        self._running -= 1
        if self._scorer._cache is not None:
            self._scorer._cache.add(one.key, result)
        for same in (one, *self._repeats.pop(one.key, ())):
            self._ready[same.index] = replace(result, index=same.index, id=same.id)

    def ready(self) -> Iterator[ScoreResult | Rejected]:
        """Results that no earlier prompt holds back."""
        while self._order and self._order[0] in self._ready:
            yield self._ready.pop(self._order.popleft())


class Scorer(RequestScorer):
    """Scores prompts for inter-head instability inside vLLM. A context manager; not to be shared between threads.

    Args:
        model: A folder or name that vLLM can load.
        system_prompt: For prompts that bring none.
        steps: N, steps 0 to N are recorded.
        window: The steps that are scored, `Window(1, 12)` or "1:12" (1-based, inclusive); 1 to N by default.
        drop_shallow: Fraction of the layers that is left out at the input end.
        drop_deep: Fraction of the layers that is left out at the output end.
        logit_stats: Record next-token entropy, top-1 probability and margin too.
        keep_mass: Results hold the masses.
        attention_entropy: Results hold the entropy of each head's attention (not with FlashAttention, and without CUDA
            graphs).
        regions: Names of further key ranges that prompts of token ids bring.
        attention_backend: auto, cpu, triton or flash.
        engine_args: For vLLM, over the defaults for this machine.
        verbose: Let vLLM log.
        group: Submit prompts with the same system prompt one after another. This and the next three make it fast and
            change no number beyond rounding.
        prime: Prefill first what several queued prompts begin with.
        repeat_bytes: Memory for results of prompts that may come again, token for token; 0 to score each again.
        prepare_workers: Processes that render and tokenise ahead of the engine; 0 to do so in this process, None for
            what suits the machine.
        max_new_tokens: The most tokens of an answer, which may continue past step N in the same request.
        stop_if: Called with each result as soon as its last step is recorded; ends the answer there if it returns True.

    Attributes:
        seconds_waited: How long `score` has waited for prompts to be read and prepared.

    Raises:
        ValueError: If options contradict each other.
        EngineError, RefusedError: If the engine cannot be started.
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
        attention_entropy: bool = False,
        regions: Sequence[str] = (),
        attention_backend: str = "auto",
        engine_args: Mapping[str, Any] | None = None,
        verbose: bool = False,
        group: bool = True,
        prime: bool = True,
        repeat_bytes: int = REPEAT_BYTES,
        prepare_workers: int | None = 0,
        max_new_tokens: int | None = None,
        stop_if: Callable[[ScoreResult], bool] | None = None,
    ) -> None:
        score_range = ScoreRange.within(steps, window, drop_shallow, drop_deep)
        if max_new_tokens is not None and max_new_tokens <= steps:
            raise ValueError(
                f"an answer of {max_new_tokens} tokens ends before step {steps}: raise max_new_tokens to {steps + 1} "
                "or record fewer steps"
            )
        super().__init__(
            model,
            steps=steps,
            score_range=score_range,
            decode=lambda token_ids: self.tokenizer.decode(token_ids, skip_special_tokens=True),
            regions=regions,
            logit_stats=logit_stats,
            keep_mass=keep_mass,
            group=group,
            prime=prime,
            repeat_bytes=repeat_bytes,
            stop_if=stop_if,
            attention_backend=attention_backend,
            engine_args=engine_args,
            verbose=verbose,
            row_entropy=attention_entropy,
        )
        try:
            args = engine_args or {}
            name, remote = str(args.get("tokenizer") or model), bool(args.get("trust_remote_code", False))
            self.tokenizer = load_tokenizer(name, remote)
            self._prepare_config = PrepareConfig(
                system_prompt=system_prompt,
                steps=steps,
                regions=tuple(self.engine.regions),
                vocabulary=self.engine.vocabulary,
                max_model_len=self.engine.max_model_len,
                answer_tokens=max_new_tokens or steps + 1,
                attention_entropy=attention_entropy,
            )
            self._workers = workers_for_machine() if prepare_workers is None else prepare_workers
            # The classes of remote code cannot be found by their names in another process.
            self._load = partial(load_tokenizer, name, True) if remote else None
        except BaseException:
            self.close()
            raise
        self.model, self.system_prompt, self.steps, self.window = str(model), system_prompt, steps, score_range.window

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and the worker processes, and free their memory."""
        if "_prompts" in self.__dict__:
            self._prompts.close()
        super().close()

    @cached_property
    def _prompts(self) -> StreamPreparer:
        return StreamPreparer(Preparer(self._prepare_config, self.tokenizer), self._workers, self._load)

    @property
    def in_flight(self) -> int:
        """How many prompts `score` takes, at most, before it returns the first result."""
        return super().in_flight + self._prompts.prompts_ahead

    @property
    def preparer(self) -> Preparer:
        """Makes engine requests of prompts; TokenizerError if the model's tokenizer or chat template cannot be used."""
        return self._prompts.preparer

    @property
    def renderer(self) -> ChatRenderer:
        """Renders chats as the model's own template does; TokenizerError as with `preparer`."""
        return self.preparer.renderer

    def score(
        self,
        prompts: Iterable[str | Mapping[str, Any] | Prompt],
        *,
        replay: bool = False,
        progress: bool = False,
    ) -> Generator[ScoreResult | Rejected, None, None]:
        """Score prompts; results in input order, as they are ready, a Rejected in the place of a prompt without one.

        Args:
            prompts: Read as they are needed: neither they nor the results pile up.
            replay: Take the prompts' logged answers through the model in one prefill instead of decoding new ones (with
                steps 0 they need none). There are no logit statistics then, because only the last token's logits are
                computed.
            progress: Show a bar on standard error with rate and, if the number of prompts is known, time left.
        """
        stream = self._prompts.stream(prompts, lambda prompt: prompt, replay)
        results = self.score_requests(one for _, one in stream if one is not None)
        if not progress:
            return results
        return with_progress(results, len(prompts) if isinstance(prompts, Sized) else None)


def with_progress(results: Iterator[T], total: int | None, done: int = 0) -> Generator[T, None, None]:
    """Show a bar on standard error while results come: of `total`, of which `done` came before."""
    with progress_bar("scoring", total, done, unit="prompts/s") as advance:
        for result in results:
            advance(1)
            yield result
