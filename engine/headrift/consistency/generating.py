"""Greedy answers of a transformers model, many prompts at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

BATCH = 16


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    on_done: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Each prompt's answer: at most `max_tokens` token ids, with the token that ends it where the model ended it.

    The same prompts in the same order give the same answers. on_done: told how many more are done.
    """
    import torch

    end = _ends(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(end)
    found: dict[int, list[int]] = {}
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    for first in range(0, len(by_length), BATCH):
        some = by_length[first : first + BATCH]
        longest = max(len(prompts[i]) for i in some)
        ids = torch.tensor([[pad] * (longest - len(prompts[i])) + list(prompts[i]) for i in some])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in some])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_tokens,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
                eos_token_id=sorted(end),
            )
        for i, row in zip(some, out[:, longest:].tolist()):
            ended = next((at + 1 for at, token in enumerate(row) if token in end), len(row))
            found[i] = row[:ended]
        if on_done:
            on_done(len(some))
    return [found[i] for i in range(len(prompts))]


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = set(named) if isinstance(named, list | tuple) else {named}
    return {token for token in {*ends, tokenizer.eos_token_id} if token is not None}
