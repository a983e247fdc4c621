"""One engine of bench/overhead_gpu.py, in a process of its own: vLLM alone, or headrift's (see _children.serve)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from _children import serve

REGIONS = ("system", "user", "prompt")
COLLECT = 8  # finished requests whose recordings leave the device together


class Plain:
    """vLLM without headrift, driven as headrift drives it."""

    def __init__(self, settings: dict[str, Any]):
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self.llm_engine = LLMEngine.from_engine_args(EngineArgs(**settings))
        self.running = self.cached = self._requests = 0

    def add(self, ids: list[int], tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        final = RequestOutputKind.FINAL_ONLY
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=final
        )
        self.llm_engine.add_request(str(self._requests), TokensPrompt(prompt_token_ids=ids), params)
        self._requests += 1
        self.running += 1

    def step(self) -> None:
        for output in self.llm_engine.step():
            if output.finished:
                self.running -= 1
                self.cached += output.num_cached_tokens or 0

    def finish(self) -> dict[str, int]:
        """What was counted since the last call."""
        counts, self.cached = {"cached_tokens": self.cached}, 0
        return counts


class Probed:
    """headrift's engine. Recordings are collected a few requests at a time and read after the next ones finished."""

    def __init__(self, settings: dict[str, Any], attention: str, steps: int):
        from headrift.probed_engine import ProbedEngine

        settings = dict(settings)
        model = settings.pop("model")
        options: dict[str, Any] = {"regions": REGIONS, "attention_backend": attention, "engine_args": settings}
        self._engine = ProbedEngine(model, steps=steps, **options)
        self.llm_engine, self.recorder_bytes = self._engine.llm_engine, self._engine.recorder_bytes
        self.probed = self.replay = False
        self._finished: list[Any] = []
        self._ticket: Any = None
        self._counts = {"cached_tokens": 0, "values": 0, "bad_values": 0}

    @property
    def running(self) -> int:
        running: int = self._engine.running
        return running

    def add(self, ids: list[int], tokens: int) -> None:
        from headrift.requests import ProbeRequest

        prompt = ids[: len(ids) - tokens] if self.replay else ids
        answer = ids[len(prompt) :] if self.replay else None
        system = len(prompt) * 2 // 5
        regions = {"system": (0, system), "user": (system, len(prompt) - 4), "prompt": (0, len(prompt))}
        more: dict[str, Any] = {"answer_ids": answer, "ignore_eos": True, "probed": self.probed}
        self._engine.submit(ProbeRequest(prompt, regions, tokens - 1, **more))

    def step(self) -> None:
        self._finished += self._engine.step()
        if len(self._finished) >= COLLECT or not self._engine.running:
            self._read()
            self._counts["cached_tokens"] += sum(done.cached_tokens for done in self._finished)
            self._ticket, self._finished = self._engine.collect(self._finished), []

    def _read(self) -> None:
        if self._ticket is None:
            return
        for recording in self._engine.recordings(self._ticket):
            share = np.asarray(recording.share)
            self._counts["values"] += share.size
            # NaN fails both comparisons. A share is a quotient of float32 sums: 1e-3 is far above their rounding.
            self._counts["bad_values"] += int((~((share >= 0) & (share <= 1 + 1e-3))).sum())
        self._ticket = None

    def finish(self) -> dict[str, int]:
        self._read()
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        return counts


class Bench:
    """The functions that the parent can call."""

    def start(self, kind: str, settings: dict[str, Any], attention: str, steps: int) -> dict[str, Any]:
        """Start the engine, and describe it."""
        begin = time.perf_counter()
        self.engine: Any = Plain(settings) if kind == "plain" else Probed(settings, attention, steps)
        config = self.engine.llm_engine.vllm_config
        self.vocabulary = config.model_config.get_vocab_size()
        return {
            "start_seconds": round(time.perf_counter() - begin, 1),
            "dtype": str(config.model_config.dtype),
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "attention_backend": str(config.attention_config.backend),
            "model_runner_v2": bool(config.use_v2_model_runner),
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "recorder_bytes": getattr(self.engine, "recorder_bytes", 0),
        }

    def run(
        self,
        *,
        prompts: int,
        at_once: int,
        context: int,
        tokens: int,
        seed: Sequence[int],
        shared: int = 0,
        probed: bool = False,
        replay: bool = False,
    ) -> dict[str, Any]:
        """Answer prompts of random tokens, the same for the same seed; seconds, and those of steps that only decode.

        Args:
            prompts: How many.
            at_once: The most in flight.
            context: Tokens of each; with replay, tokens of prompt and answer.
            tokens: Tokens that each answers.
            seed: For the prompts' tokens.
            shared: Number of first tokens that all prompts have in common.
            probed: Whether they are measured (headrift's engine).
            replay: Whether the last `tokens` of `context` are a given answer, and nothing is decoded.
        """
        engine = self.engine
        ids = np.random.default_rng(seed).integers(3, self.vocabulary, (prompts, context))
        ids[:, :shared] = ids[0, :shared]
        if isinstance(engine, Probed):
            engine.probed, engine.replay = probed, replay
        todo = ids.tolist()[::-1]
        states = engine.llm_engine.output_processor.request_states
        steps, decode_seconds, decode_steps, decoding = 0, 0.0, 0, False
        begin = time.perf_counter()
        while todo or engine.running:
            while todo and engine.running < at_once:
                engine.add(todo.pop(), tokens)
            step_begin = time.perf_counter()
            engine.step()
            steps += 1
            if decoding:
                decode_seconds += time.perf_counter() - step_begin
                decode_steps += 1
            # From the first step on before which every request has its first token.
            decoding = decoding or (not todo and not any(state.is_prefilling for state in states.values()))
        counts = engine.finish()
        seconds = time.perf_counter() - begin
        times = {"seconds": seconds, "steps": steps, "decode_seconds": decode_seconds, "decode_steps": decode_steps}
        return times | {"answer_tokens": prompts * tokens, "prompt_tokens": prompts * context, **counts}

    def profile(self, **case: Any) -> dict[str, Any]:
        """Run as `run` does, under torch's profiler; the kernels by their time. The engine must be in this process."""
        import torch
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiler

        gpu = torch.cuda.is_available()
        with profiler(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profile:
            result = self.run(**case)
        kernels = []
        for event in profile.key_averages():
            time_of_all = event.self_device_time_total if gpu else event.self_cpu_time_total
            if time_of_all > 0:
                kernels.append({"kernel": event.key, "calls": event.count, "microseconds": round(time_of_all, 1)})
        kernels.sort(key=lambda kernel: -kernel["microseconds"])
        return result | {"kernels": kernels[:60]}


if __name__ == "__main__":
    bench = Bench()
    serve({"start": bench.start, "run": bench.run, "profile": bench.profile})
