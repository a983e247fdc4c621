"""transformers with eager attention and `output_attentions`: a child of bench/peers.py (see _children.serve).

One prompt at a time this is what headrift replaces; a batch at a time, padded on the left, is the best of that way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from _children import Stopwatch, serve


class Eager:
    """The model in float32. batch: prompts at a time."""

    def start(self, model: str, batch: int) -> dict[str, Any]:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._batch = batch
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
        self._model.eval()
        return {}

    def run(self, prompts: list[dict[str, Any]], steps: int, eos: int, out: str) -> dict[str, Any]:
        """Greedy answers and their masses, as m0, m1, ... [steps, layers, heads, regions] and a0, a1, ... in `out`."""
        found = []
        with Stopwatch() as clock, torch.inference_mode():
            for first in range(0, len(prompts), self._batch):
                found += self._masses(prompts[first : first + self._batch], steps, eos)
        arrays = {f"m{i}": masses for i, (masses, _) in enumerate(found)}
        np.savez(out, **arrays, **{f"a{i}": answer for i, (_, answer) in enumerate(found)})
        return {"seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds}

    def _masses(self, prompts: list[dict[str, Any]], steps: int, eos: int) -> list[tuple[np.ndarray, list[int]]]:
        """Of a batch, by prompt: masses of the recorded steps, and the answer's tokens, the end of text among them."""
        n, width = len(prompts), max(len(prompt["ids"]) for prompt in prompts)
        padding = [width - len(prompt["ids"]) for prompt in prompts]
        fed = torch.tensor([[eos] * pad + prompt["ids"] for pad, prompt in zip(padding, prompts)])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        cache, answers, masses = None, [[] for _ in prompts], [[] for _ in prompts]
        for _ in range(steps + 1):
            given = {"attention_mask": mask, "position_ids": position, "past_key_values": cache}
            seen = self._model(fed, **given, use_cache=True, output_attentions=True, logits_to_keep=1)
            rows = torch.stack([layer[:, :, -1] for layer in seen.attentions], 1)
            tokens = seen.logits[:, -1].argmax(-1).tolist()
            for i, (token, prompt) in enumerate(zip(tokens, prompts)):
                if answers[i][-1:] == [eos]:
                    continue
                spans = [rows[i, ..., padding[i] + start : padding[i] + end] for start, end in prompt["regions"]]
                masses[i].append(torch.stack([span.sum(-1) for span in spans], -1).numpy())
                answers[i].append(token)
            if all(answer[-1:] == [eos] for answer in answers):
                break
            cache = seen.past_key_values
            fed = torch.tensor(tokens)[:, None]
            mask = torch.cat([mask, torch.ones(n, 1, dtype=mask.dtype)], 1)
            position = position[:, -1:] + 1
        return [(np.stack(of), answer) for of, answer in zip(masses, answers)]


if __name__ == "__main__":
    eager = Eager()
    serve({"start": eager.start, "run": eager.run})
