"""Scores a stream of prompts: drives the engine, keeps it full, and hands results back in input order."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from headrift import signal
from headrift.preparing import Ahead, Prepared, Preparer, Prompt, Rules, load_tokenizer, workers_for_machine
from headrift.probed_engine import REGIONS, ProbedEngine
from headrift.requests import Finished, ProbeRequest, Recording, Ticket
from headrift.results import Rejected, ScoreResult
from headrift.scheduling import Repeats, Waiting
from headrift.signal import ScoreRange, Window
from headrift.signals import PromptData, measure_columns
from headrift.terminal import progress_bar

if TYPE_CHECKING:
    from headrift.prompts import ChatRenderer

T = TypeVar("T")

# Results that wait for an earlier, slower prompt, as a multiple of the requests in flight.
_REORDER = 4
# Memory for results of prompts that may come again, in bytes.
REPEAT_BYTES = 64 << 20
# Finished requests that are collected together.
_DRAIN = 8
_NEVER_COMPUTED = "the engine never computed steps {steps}, even without cached prefixes"


class Scorer:
    """Scores prompts for inter-head instability inside vLLM. A context manager; not to be shared between threads.

    model: a folder or name vLLM can load. system_prompt: for prompts that bring none. steps: N, steps 0..N are
    recorded. window: the steps that are scored, `Window(1, 12)` or "1:12" (1-based, inclusive), all of 1..N by default.
    drop_shallow, drop_deep: the fractions of layers left out at either end. logit_stats: record next-token entropy,
    top-1 probability and margin too. keep_mass: results hold the masses. attention_entropy: they hold the entropy of
    each head's attention (not with FlashAttention, and without CUDA graphs). regions: names of further key ranges that
    prompts given as token ids bring. attention_backend: auto, cpu, triton or flash. engine_args: passed to vLLM as they
    are, over the defaults chosen for this machine. verbose: let vLLM log. max_new_tokens: answers go on past step N, to
    so many tokens, in the same request. stop_if: is given each result as soon as its last step is recorded, and ends
    the answer there where it says True.

    How it is made fast, which changes no number beyond rounding: group: prompts with the same system prompt go one
    after another; prime: what several that wait begin with is prefilled first; repeat_bytes: memory for results
    of prompts that may come again, token for token, 0 to score each anew; prepare_workers: processes that render and
    tokenise ahead of the engine, 0 to do so in this one, None for what suits the machine.

    seconds_waited: how long `score` waited for prompts to be read and prepared.

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
    ):
        self.window = check_settings(steps, window, drop_shallow, drop_deep)
        if max_new_tokens is not None and max_new_tokens <= steps:
            raise ValueError(
                f"an answer of {max_new_tokens} tokens ends before step {steps}: raise max_new_tokens to {steps + 1} "
                "or record fewer steps"
            )
        self.model = str(model)
        self.system_prompt = system_prompt
        self.steps = steps
        self.trims = {"drop_shallow": drop_shallow, "drop_deep": drop_deep}
        self.logit_stats = logit_stats
        self.keep_mass = keep_mass
        self.seconds_waited = 0.0
        self._stop_if = stop_if
        self._waiting = partial(Waiting, group=group, prime=prime)
        self._primed: set[bytes] = set()
        self._repeats = Repeats(repeat_bytes) if repeat_bytes else None
        self.engine = ProbedEngine(
            model,
            steps=steps,
            regions=(*REGIONS, *(name for name in regions if name not in REGIONS)),
            logit_stats=logit_stats,
            attention_backend=attention_backend,
            engine_args=engine_args,
            verbose=verbose,
            row_entropy=attention_entropy,
        )
        try:
            args = engine_args or {}
            rules = Rules(
                tokenizer=str(args.get("tokenizer") or model),
                trust_remote_code=bool(args.get("trust_remote_code", False)),
                system_prompt=system_prompt,
                steps=steps,
                regions=tuple(self.engine.regions),
                vocabulary=self.engine.vocabulary,
                max_model_len=self.engine.max_model_len,
                answer_tokens=max_new_tokens or steps + 1,
                attention_entropy=attention_entropy,
            )
            self.tokenizer = load_tokenizer(rules.tokenizer, rules.trust_remote_code)
            self._preparer: Preparer | None = None
            self._rules = rules
            n_workers = workers_for_machine() if prepare_workers is None else prepare_workers
            self._ahead = Ahead(rules, self.tokenizer, n_workers) if n_workers else None
        except BaseException:
            self.engine.close()
            raise

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        if self._ahead is not None:
            self._ahead.close()
        self.engine.close()

    @property
    def in_flight(self) -> int:
        """How many prompts `score` takes, at most, before it hands back the first result."""
        return (_REORDER + 1) * self.engine.slots + (self._ahead.prompts_ahead if self._ahead else 0)

    @property
    def renderer(self) -> ChatRenderer:
        """Renders chats as the model's own template does; TokenizerError where its tokenizer or template cannot."""
        return self.preparer.renderer

    @property
    def preparer(self) -> Preparer:
        """Makes engine requests of prompts, in this process. TokenizerError as with `renderer`."""
        if self._preparer is None:
            self._preparer = Preparer(self._rules, self.tokenizer)
        return self._preparer

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
        return with_progress(results, len(prompts) if isinstance(prompts, Sized) else None)

    def _run(
        self, prompts: Iterator[str | Mapping[str, Any] | Prompt], replay: bool
    ) -> Generator[ScoreResult | Rejected, None, None]:
        engine, waiting = self.engine, self._waiting(primed=self._primed)
        running: dict[int, Prepared] = {}
        finished: list[Finished] = []
        collected: Ticket | None = None
        ready: dict[int, ScoreResult | Rejected] = {}
        repeats: dict[bytes, list[Prepared]] = {}  # of prompts that wait or run, by their keys
        source, taken, emitted, exhausted = self._prepared(prompts, replay), 0, 0, False
        try:
            while True:
                while not exhausted and taken - emitted < _REORDER * engine.slots and len(waiting) < engine.slots:
                    prepared = self._next(source)
                    if prepared is None:
                        exhausted = True
                        break
                    taken += 1
                    if isinstance(prepared, Rejected):
                        ready[prepared.index] = prepared
                    elif (known := self._known(prepared)) is not None:
                        ready[prepared.index] = known
                    elif self._repeats is not None and prepared.key in repeats:
                        repeats[prepared.key].append(prepared)
                    else:
                        repeats[prepared.key] = []
                        waiting.add(prepared)
                while len(waiting) and engine.free_slots:
                    prepared = waiting.pop()
                    finished += self._prime(prepared, waiting.to_prime(prepared))
                    running[engine.submit(prepared.request)] = prepared
                if engine.running:
                    finished += self._step()
                if collected is not None:
                    # Their numbers have left the device while this step ran.
                    for prepared, result in self._results(collected, running):
                        if result is None:
                            waiting.add(prepared, first=True)
                            continue
                        if self._repeats is not None:
                            self._repeats.keep(prepared.key, result)
                        for same in (prepared, *repeats.pop(prepared.key, ())):
                            ready[same.index] = replace(result, index=same.index, id=same.id)
                    collected = None
                urgent = not engine.free_slots or not engine.running or any(done.answering for done in finished)
                if finished and (len(finished) >= _DRAIN or urgent):
                    collected = engine.collect(finished, self.keep_mass)
                    finished = []
                while emitted in ready:
                    yield ready.pop(emitted)
                    emitted += 1
                if exhausted and not (len(waiting) or running or ready or collected):
                    return
        finally:
            if running or finished or collected or engine.running:
                engine.abort()

    def _prime(self, prepared: Prepared, tokens: int) -> list[Finished]:
        """Prefill so many tokens of a prompt, for it and others to find cached; what there is to collect by then."""
        if not tokens:
            return []
        # A request leaves all of its prompt but the last token for others.
        ids = prepared.request.prompt_ids[: tokens + 1]
        request_id = self.engine.submit(ProbeRequest(ids, {}, steps=0, probed=False))
        finished: list[Finished] = []
        while True:
            found = self._step()
            finished += [done for done in found if done.request_id != request_id]
            primed = [done for done in found if done.request_id == request_id]
            if primed:
                self.engine.collect(primed)  # its slot is free again
                return finished

    def _step(self) -> list[Finished]:
        """Run the engine once; what there is to collect."""
        return [done for done in self.engine.step() if not done.answering or self._stop_if is not None]

    def _prepared(self, prompts: Iterator[Any], replay: bool) -> Iterator[Prepared | Rejected]:
        if self._ahead is not None:
            return self._ahead.prepared(prompts, replay, self.preparer)
        prepare = self.preparer.prepare
        return (prepare(index, given, replay) for index, given in enumerate(prompts))

    def _next(self, source: Iterator[Prepared | Rejected]) -> Prepared | Rejected | None:
        """The next prompt, None after the last; the time that it takes is time in which the engine waits."""
        begun = time.monotonic()
        prepared = next(source, None)
        self.seconds_waited += time.monotonic() - begun
        return prepared

    def _known(self, prepared: Prepared) -> ScoreResult | None:
        """The result of a prompt that was scored before, token for token."""
        known = self._repeats.get(prepared.key) if self._repeats is not None else None
        return None if known is None else replace(known, index=prepared.index, id=prepared.id)

    def _results(
        self, collected: Ticket, running: dict[int, Prepared]
    ) -> Iterator[tuple[Prepared, ScoreResult | None]]:
        """Results of collected requests; None where a step lay in a cached prefix and the prompt must run again.

        A request that answers on has a result here only if it is stopped, and if it is, no other when it has ended.
        """
        for done, recording in zip(collected.finished, self.engine.recordings(collected), strict=True):
            if done.answering:
                stopped = self._stopped(running[done.request_id], done, recording)
                if stopped is not None:
                    yield running.pop(done.request_id), stopped
                continue
            if done.request_id not in running:
                continue
            prepared = running.pop(done.request_id)
            if not recording.missing_steps:
                yield prepared, self._result(prepared, done, recording)
            elif not done.request.skip_prefix_cache:
                yield replace(prepared, request=replace(prepared.request, skip_prefix_cache=True)), None
            else:
                raise RuntimeError(_NEVER_COMPUTED.format(steps=recording.missing_steps))

    def _stopped(self, prepared: Prepared, done: Finished, recording: Recording) -> ScoreResult | None:
        """The result of a request that answers on, which is then stopped; None where it may answer on."""
        result = self._result(prepared, done, recording)
        if self._stop_if is None or not self._stop_if(result):
            return None
        self.engine.stop(done.request_id)
        return replace(result, flags=(*result.flags, "stopped"))

    def _result(self, prepared: Prepared, done: Finished, recording: Recording) -> ScoreResult:
        regions, share = prepared.rendered.regions, recording.share
        start, end = regions["system"]
        counted = signal.covered(len(share), self.engine.windows, start, len(prepared.rendered.token_ids))
        instability = np.where(counted, signal.instability(share), np.nan)
        score_range, steps = ScoreRange(self.window, **self.trims), done.n_steps
        scored = score_range.score(instability, steps)
        names = self.engine.regions
        focus_heads = None
        if "user" in regions:
            without_prompt = [name for name in names if name != "prompt"]
            system_mass, user_mass = (recording.first[..., without_prompt.index(name)] for name in ("system", "user"))
            focus_heads = signal.focus_heads(system_mass, user_mass)
        replayed = done.request.answer_ids is not None
        truncated = len(done.answer_ids) > self.steps + 1 if replayed else done.finish_reason == "length"
        mass = recording.mass
        if mass is not None:
            mass = np.where([name in regions for name in names], mass, np.float32(np.nan))
        stats = recording.stats if self.logit_stats and not replayed else None
        data = PromptData(
            score_range=score_range,
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
            prompt_tokens=len(prepared.rendered.token_ids),
            system_tokens=end - start,
            answer_tokens=len(done.answer_ids),
            system_hash=hashlib.sha256(np.asarray(prepared.rendered.token_ids[start:end]).tobytes()).hexdigest()[:16],
            signals=measure_columns(data),
            flags=(*prepared.rendered.flags, *(["truncated"] if truncated else [])),
            answer_ids=done.answer_ids,
            text=self.tokenizer.decode(done.answer_ids, skip_special_tokens=True),
            instability=instability.astype(np.float32),
            shares=share,
            focus_heads=None if focus_heads is None else focus_heads.astype(np.float32),
            logit_stats=stats,
            mass=mass,
            region_names=names,
            attention_entropy=recording.row_entropy,
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


def with_progress(results: Iterator[T], total: int | None, done: int = 0) -> Generator[T, None, None]:
    """The results, with a bar on standard error. total: how many there will be; done: how many of them came before."""
    with progress_bar("scoring", total, done, unit="prompts/s") as advance:
        for result in results:
            advance(1)
            yield result
