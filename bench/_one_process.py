"""vLLM with and without headrift's parts, in one process: a child of bench/idle.py (see _children.serve).

Two processes of the same kind differ in speed by some per cent. Here one engine answers both ways: for `plain`,
headrift's parts are taken out of it, so that vLLM's own classes run, and vLLM is driven as _overhead_engine's `Plain`
drives it; for `idle` and `probing` they are put back.
"""

from __future__ import annotations

import sys
from copy import copy
from types import FrameType
from typing import Any

from _children import serve
from _overhead_engine import Bench, Engine, Plain

PLAIN = "plain"


class Parts:
    """What headrift adds to an engine's steps: its attention layers, its metadata builders, and its logits processor,
    there and where requests are checked."""

    def __init__(self, llm_engine: Any):
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder
        from vllm.v1.sample.logits_processor import validate_logits_processors_parameters as validate

        runner = llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        layers = runner.compilation_config.static_forward_context.values()
        impls = [layer.impl for layer in layers]
        builders = [builder for groups in runner.attn_groups for group in groups for builder in group.metadata_builders]
        self._classes = [(impl, type(impl), CPUAttentionBackendImpl) for impl in impls]
        self._classes += [(builder, type(builder), CPUAttentionMetadataBuilder) for builder in builders]
        self._batch, self._front = runner.input_batch, llm_engine.input_processor
        processors = self._batch.logitsprocs
        self._lists = [
            (of, list(of), [each for each in of if not _ours(type(each).__module__)])
            for of in (processors.argmax_invariant, processors.non_argmax_invariant)
        ]
        self._needs_ids = self._batch.logitsprocs_need_output_token_ids
        self._checks = {name: of for name, of in vars(self._front).items() if getattr(of, "func", None) is validate}
        changed = [impl for impl, own, plain in self._classes if own is plain]
        if changed or not builders or all(own == plain for _, own, plain in self._lists) or not self._checks:
            raise RuntimeError("headrift's parts of this engine are not where they were thought to be")

    def put(self, there: bool) -> None:
        """Have them in the engine or not."""
        for thing, own, plain in self._classes:
            thing.__class__ = own if there else plain
        for of, own, plain in self._lists:
            of[:] = own if there else plain
        self._batch.logitsprocs_need_output_token_ids = self._needs_ids and there
        for name, check in self._checks.items():
            setattr(self._front, name, check if there else lambda params: None)


def _ours(module: str) -> bool:
    return module.partition(".")[0] in ("headrift", "headrift_kernels")


class OneProcess(Bench):
    """An engine that answers with and without headrift's parts."""

    def start(self, kind: str, settings: dict[str, Any], **options: Any) -> dict[str, Any]:
        about = super().start(kind, settings, probed=True, **options)
        probed = self._engine
        idle: Any = copy(probed)
        idle._asked = {"probed": False, "row_entropy": False}
        plain: Any = Plain.__new__(Plain)
        plain.__dict__ |= {"llm_engine": probed.llm_engine, "bytes_out": 0, "_requests": 0}
        self._parts = Parts(probed.llm_engine)
        self._arms: dict[str, Engine] = {PLAIN: plain, "idle": idle, "probing": probed}
        return about

    def run(self, case: str, arm: str = PLAIN) -> dict[str, Any]:
        """Answer the case's prompts once, as this arm."""
        self._engine = self._arms[arm]
        self._parts.put(arm != PLAIN)
        return super().run(case)

    def calls(self, case: str, arm: str) -> dict[str, int]:
        """How many functions of headrift's an answer calls."""
        found = 0

        def count(frame: FrameType, event: str, _: Any) -> None:
            nonlocal found
            found += event == "call" and _ours(frame.f_globals.get("__name__", ""))

        sys.setprofile(count)
        try:
            self.run(case, arm)
        finally:
            sys.setprofile(None)
        return {"calls": found}


if __name__ == "__main__":
    bench = OneProcess()
    serve({"start": bench.start, "prepare": bench.prepare, "run": bench.run, "calls": bench.calls})
