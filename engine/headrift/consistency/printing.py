"""The figures of an evaluation as tables on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrift.terminal import print_table

_WORDS = {
    "flipped": "answers that flip",
    "right": "right, wrapped",
    "right_clean": "right, clean",
    "sycophantic": "the hinted wrong answer",
    "distance": "attention distance",
    "top_weight": "largest weight of a row",
    "entropy": "entropy of a row, nats",
    "alike": "loss on like content",
}


def print_evaluation(found: Mapping[str, Any]) -> None:
    """Print what evaluation.summary found."""
    from rich.console import Console

    console = Console(highlight=False)
    held_out = ", ".join(found["held_out_families"]) or "all"
    console.print(f"{found['questions']} held-out questions; held-out families: {held_out}", markup=False)
    states = ("before", "after", "change")
    measures = [(words, found["held_out"][name]) for name, words in _WORDS.items()]
    rows = [(words, *(_cell(figures[state]) for state in states)) for words, figures in measures]
    rows.append(("perplexity", *(_cell(found["perplexity"][state]) for state in ("before", "after", "ratio"))))
    print_table(console, ("", "before", "after", "change (ratio)"), rows)
    by_family = [
        (
            f"{name}{' (held out)' if figures['held_out'] else ''}",
            *(_cell(figures["flipped"][state]) for state in states),
        )
        for name, figures in found["families"].items()
    ]
    print_table(console, ("answers that flip", *states), by_family)


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "-"
    if figure["interval"] is None:
        return f"{figure['value']:.3f}"
    low, high = figure["interval"]
    return f"{figure['value']:.3f} [{low:.3f}, {high:.3f}]"
