"""One engine of bench/overhead.py, in a process of its own: told by its parent what to do (see _children.serve).

`plain` is vLLM by itself: nothing of headrift may be loaded there. The others are headrift's engine.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

from _children import Stopwatch, serve

_SECTIONS = {
    "model_config": ("dtype", "max_model_len", "enforce_eager", "seed"),
    "cache_config": ("block_size", "kv_cache_memory_bytes", "enable_prefix_caching", "cache_dtype"),
    "scheduler_config": ("max_num_seqs", "max_num_batched_tokens", "enable_chunked_prefill", "async_scheduling"),
    "compilation_config": ("mode", "cudagraph_mode"),
    "kernel_config": ("ir_op_priority",),
}


class Engine(Protocol):
    """Answers batches of prompts, all of them in flight at once. bytes_out: recordings that left the engine so far."""

    bytes_out: int
    llm_engine: Any

    def answer(self, prompts: Sequence[dict[str, Any]], steps: int) -> tuple[list[list[int]], int]:
        """The answers' tokens, steps + 1 each, in order, and how many prompt tokens came from the cache."""
        ...


class Plain:
    """vLLM, driven as headrift drives it."""

    def __init__(self, settings: dict[str, Any]):
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self.llm_engine = LLMEngine.from_engine_args(EngineArgs(**settings))
        self.bytes_out = 0
        self._requests = 0

    def answer(self, prompts: Sequence[dict[str, Any]], steps: int) -> tuple[list[list[int]], int]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        first = self._requests
        for prompt in prompts:
            params = SamplingParams(
                temperature=0.0,
                max_tokens=steps + 1,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self.llm_engine.add_request(str(self._requests), TokensPrompt(prompt_token_ids=prompt["ids"]), params)
            self._requests += 1
        found: dict[str, Any] = {}
        while len(found) < len(prompts):
            found |= {output.request_id: output for output in self.llm_engine.step() if output.finished}
        outputs = [found[str(first + i)] for i in range(len(prompts))]
        cached = sum(output.num_cached_tokens or 0 for output in outputs)
        return [list(output.outputs[0].token_ids) for output in outputs], cached


class Probed:
    """headrift's engine. probed: False for requests that are not measured."""

    def __init__(self, settings: dict[str, Any], *, probed: bool, attention: str, **options: Any):
        from headrift.probed_engine import ProbedEngine

        settings = dict(settings)
        self._engine = ProbedEngine(settings.pop("model"), attention_backend=attention, engine_args=settings, **options)
        self._asked = {"probed": probed, "row_entropy": self._engine.row_entropy}
        self.llm_engine = self._engine.llm_engine
        self.bytes_out = 0
        self._ask = self.llm_engine.collective_rpc
        self.llm_engine.collective_rpc = self._counted

    def _counted(self, *args: Any, **kwargs: Any) -> Any:
        """What the workers send back, its bytes counted."""
        answers = self._ask(*args, **kwargs)
        self.bytes_out += sum(len(answer) for answer in answers if isinstance(answer, bytes))
        return answers

    def answer(self, prompts: Sequence[dict[str, Any]], steps: int) -> tuple[list[list[int]], int]:
        from headrift.requests import ProbeRequest

        engine = self._engine
        order = []
        for prompt in prompts:
            regions = {name: tuple(prompt["regions"][name]) for name in engine.regions if name in prompt["regions"]}
            request = ProbeRequest(prompt["ids"], regions, steps, ignore_eos=True, **self._asked)
            order.append(engine.submit(request))
        found, waiting = {}, []
        while engine.running:
            waiting += engine.step()
            if len(waiting) >= 8 or not engine.running:
                engine.drain(waiting)
                found |= {done.request_id: done for done in waiting}
                waiting = []
        return [found[tenant].answer_ids for tenant in order], sum(done.cached_tokens for done in found.values())


class Bench:
    """What the parent asks for."""

    def __init__(self) -> None:
        self._cases: dict[str, tuple[list[dict[str, Any]], int]] = {}
        self._slept_since = 0.0  # CPU seconds of this process

    def start(self, kind: str, settings: dict[str, Any], **options: Any) -> dict[str, Any]:
        with Stopwatch() as clock:
            self._engine: Engine = Plain(settings) if kind == "plain" else Probed(settings, **options)
        config = self._engine.llm_engine.vllm_config
        resolved = {name: str(getattr(getattr(config, part), name)) for part, of in _SECTIONS.items() for name in of}
        ours = sorted(name for name in sys.modules if name.partition(".")[0] in ("headrift", "headrift_kernels"))
        if kind == "plain" and ours:
            raise RuntimeError(f"this was to be vLLM without headrift, and {ours[0]} is loaded")
        return {
            "seconds": clock.seconds,
            "resolved": resolved,
            "recorder_bytes": getattr(getattr(self._engine, "_engine", None), "recorder_bytes", 0),
        }

    def prepare(self, case: str, prompts: list[dict[str, Any]], steps: int) -> dict[str, Any]:
        """Remember a case, and run it so that its prompts are in the prefix cache and everything is warm."""
        self._cases[case] = prompts, steps
        self._engine.answer(prompts, steps)
        return self.run(case)

    def run(self, case: str) -> dict[str, Any]:
        """Answer the case's prompts once."""
        prompts, steps = self._cases[case]
        idle = time.process_time() - self._slept_since
        before, spent = self._engine.bytes_out, _PureDecode(self._engine.llm_engine)
        with Stopwatch() as clock, spent:
            answers, cached = self._engine.answer(prompts, steps)
        self._slept_since = time.process_time()
        return {
            "seconds": clock.seconds,
            "cpu_seconds": clock.cpu_seconds,
            "idle_cpu_seconds": idle,  # while the others had their turns
            "decode_seconds": spent.seconds,
            "tokens": sum(map(len, answers)),
            "answers": [hashlib.sha256(repr(answer).encode()).hexdigest()[:12] for answer in answers],
            "cached_tokens": cached,
            "bytes_out": self._engine.bytes_out - before,
        }


class _PureDecode:
    """Seconds in engine steps after the first tokens of all requests: those that decode, and nothing else."""

    def __init__(self, llm_engine: Any) -> None:
        self._engine, self.seconds = llm_engine, 0.0

    def __enter__(self) -> None:
        step = self._engine.step
        prefilling = True

        def timed() -> Any:
            nonlocal prefilling
            start = time.perf_counter()
            outputs = step()
            if not prefilling:
                self.seconds += time.perf_counter() - start
            prefilling = prefilling and self._prompts_left()
            return outputs

        self._engine.step = timed

    def __exit__(self, *exc: object) -> None:
        del self._engine.step

    def _prompts_left(self) -> bool:
        states = self._engine.output_processor.request_states.values()
        return any(state.is_prefilling for state in states)


if __name__ == "__main__":
    bench = Bench()
    serve({"start": bench.start, "prepare": bench.prepare, "run": bench.run})
