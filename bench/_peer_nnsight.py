"""nnsight on transformers, asked for the same masses: a child of bench/peers.py, in a Python that has nnsight.

The attention rows are reduced inside the trace, as headrift does, so that nothing large is saved.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from _children import Stopwatch, serve


class Traced:
    """The model, one prompt at a time."""

    def start(self, model: str) -> dict[str, Any]:
        from nnsight import LanguageModel

        self._model = LanguageModel(model, dtype=torch.float32, attn_implementation="eager", dispatch=True)
        return {"versions": {name: version(name) for name in ("nnsight", "torch", "transformers")}}

    def run(self, prompts: list[dict[str, Any]], steps: int, eos: int, out: str) -> dict[str, Any]:
        """As _peer_transformers.Eager.run; generation goes on for all steps, and what comes after `eos` is cut off."""
        arrays: dict[str, Any] = {}
        with Stopwatch() as clock, torch.inference_mode():
            for i, prompt in enumerate(prompts):
                masses, tokens = self._masses(prompt, steps)
                answer = tokens[0, len(prompt["ids"]) :].tolist()
                answer = answer[: answer.index(eos) + 1] if eos in answer else answer
                arrays |= {f"m{i}": torch.stack(masses).numpy()[: len(answer)], f"a{i}": answer}
        np.savez(out, **arrays)
        return {"seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds}

    def _masses(self, prompt: dict[str, Any], steps: int) -> tuple[Any, Any]:
        model, spans = self._model, prompt["regions"]
        options = {"max_new_tokens": steps + 1, "eos_token_id": -1, "do_sample": False}
        with model.generate(torch.tensor([prompt["ids"]]), **options) as tracer:
            masses = list().save()  # noqa: C408  a list of nnsight's
            for _ in tracer.iter[: steps + 1]:
                rows = []
                for layer in model.model.layers:
                    row = layer.self_attn.output[1][0, :, -1]
                    rows.append(torch.stack([row[:, start:end].sum(-1) for start, end in spans], -1))
                masses.append(torch.stack(rows))
            tokens = tracer.result.save()
        return masses, tokens


if __name__ == "__main__":
    traced = Traced()
    serve({"start": traced.start, "run": traced.run})
