"""`headrift evaluate-consistency`: what a training changed, on questions and wrapper families that it never saw.

Every measure is taken of the model as it was (the adapter switched off) and as it is, on the same prompts. Values are
means over pairs with 95% percentile intervals from drawing questions (passages, for the perplexity) with replacement;
the change is drawn with the same draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headrift.consistency import hooks, losses
from headrift.consistency.answers import flipped, is_hinted, is_right
from headrift.consistency.generating import answers
from headrift.consistency.pairs import Pair
from headrift.stats import MIN_FOR_INTERVAL, RESAMPLES, ClusterBootstrap

if TYPE_CHECKING:
    import torch

BEFORE, AFTER = STATES = ("before", "after")
# Of a pair; NaN where a pair has none of it.
OF_ANSWERS = ("flipped", "right", "right_clean", "sycophantic")
OF_ATTENTION = ("distance", "top_weight", "entropy", "alike")
MEASURES = (*OF_ANSWERS, *OF_ATTENTION)
# A head's row counts as gathering the same content where what it gathers differs by less than this part of its length.
ALIKE = 0.1
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measured:
    """values: by state, by measure, [pairs]; layers: by state, [pairs, layers] attention distances; nll: by state, the
    mean negative log-likelihood of each neutral passage's tokens, in nats; replies: by state, of each pair (clean,
    wrapped)."""

    values: dict[str, dict[str, Floats]]
    layers: dict[str, Floats]
    nll: dict[str, Floats]
    replies: dict[str, list[tuple[str, str]]]


def measure(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    max_tokens: int,
    states: Sequence[str] = STATES,
    on_done: Callable[[int], None] | None = None,
) -> Measured:
    """Ask and measure each pair in each state. model: with a LoRA (of lora.attach), or a plain model where `states` is
    ("before",), that hooks.install was given. on_done: told how many more of `work(pairs)` prompts are done."""
    from contextlib import nullcontext

    values, layers, nll, replies = {}, {}, {}, {}
    decoder = _decoder(model)
    for state in states:
        with model.disable_adapter() if state == BEFORE and hasattr(model, "disable_adapter") else nullcontext():
            replies[state] = _replies(model, tokenizer, pairs, max_tokens, on_done)
            found = _attention(decoder, pairs, on_done)
            nll[state] = _nll(model, tokenizer)
        layers[state] = np.array([[of_layer[layer] for layer in sorted(of_layer)] for of_layer, _ in found])
        values[state] = _of_answers(pairs, replies[state])
        values[state] |= {name: np.array([of_pair[name] for _, of_pair in found]) for name in OF_ATTENTION}
    return Measured(values, layers, nll, replies)


def joined(before: Measured, after: Measured) -> Measured:
    """What two calls of `measure` found of the same pairs, in one state each."""
    names = [field.name for field in fields(Measured)]
    return Measured(**{name: {**getattr(before, name), **getattr(after, name)} for name in names})


def work(pairs: Sequence[Pair], states: Sequence[str] = STATES) -> int:
    """How many prompts `measure` works through: answers, and attention of pairs."""
    return len(states) * (len({tuple(pair.clean_ids) for pair in pairs}) + 2 * len(pairs))


def summary(pairs: Sequence[Pair], measured: Measured, held_out: frozenset[str], seed: int = 0) -> dict[str, Any]:
    """The figures as plain values: of all pairs of held-out families (`held_out`: their names; all where there are
    none), by family, by layer, and the neutral text's perplexity."""
    places = {question: i for i, question in enumerate(dict.fromkeys(pair.question for pair in pairs))}
    of = np.array([places[pair.question] for pair in pairs])
    draws = ClusterBootstrap(of, RESAMPLES, seed=seed)
    families = list(dict.fromkeys(pair.family for pair in pairs if pair.family is not None))
    inside = np.array([not held_out or pair.family in held_out for pair in pairs])
    masks = {"held_out": inside}
    masks |= {family: np.array([pair.family == family for pair in pairs]) for family in families}
    by_mask = {
        name: {measure: _figures(measured, draws, of, mask, measure) for measure in MEASURES}
        for name, mask in masks.items()
    }
    return {
        "questions": len(places),
        "pairs": {name: int(mask.sum()) for name, mask in masks.items()},
        "held_out": by_mask.pop("held_out"),
        "families": {name: {"held_out": name in held_out, **figures} for name, figures in by_mask.items()},
        "distance_by_layer": {state: layers[inside].mean(0).tolist() for state, layers in measured.layers.items()},
        "perplexity": _perplexity(measured, seed),
    }


def _figures(
    measured: Measured, draws: ClusterBootstrap, of: NDArray[np.int64], mask: NDArray[np.bool_], name: str
) -> dict:
    """A measure's value and interval in each state, and of the change; None where no pair has it."""
    by_state = {state: values[name] for state, values in measured.values.items()}
    there = mask & np.all([~np.isnan(values) for values in by_state.values()], axis=0)
    if not there.any():
        return {"pairs": 0} | dict.fromkeys((*by_state, "change") if len(by_state) > 1 else by_state)
    few = len(np.unique(of[there])) < MIN_FOR_INTERVAL
    drawn = {state: draws.mean(values, there) for state, values in by_state.items()}
    if len(drawn) > 1:
        drawn["change"] = drawn[AFTER] - drawn[BEFORE]
    return {"pairs": int(there.sum())} | {state: _estimate(values, few) for state, values in drawn.items()}


def _perplexity(measured: Measured, seed: int) -> dict:
    n = len(next(iter(measured.nll.values())))
    draws = ClusterBootstrap(np.arange(n), RESAMPLES, seed=seed)
    drawn = {state: np.exp(draws.mean(nll, np.ones(n, bool))) for state, nll in measured.nll.items()}
    if len(drawn) > 1:
        drawn["ratio"] = drawn[AFTER] / drawn[BEFORE]
    return {name: _estimate(values, n < MIN_FOR_INTERVAL) for name, values in drawn.items()}


def _estimate(drawn: Floats, few: bool) -> dict:
    """The value (the first draw is the data itself), and the interval unless there are too few to draw from."""
    rest = drawn[1:][~np.isnan(drawn[1:])]
    low_high = None if few or not len(rest) else [float(x) for x in np.percentile(rest, [2.5, 97.5])]
    return {"value": float(drawn[0]), "interval": low_high}


def _replies(
    model: Any, tokenizer: Any, pairs: Sequence[Pair], max_tokens: int, on_done: Callable[[int], None] | None
) -> list[tuple[str, str]]:
    prompts = list(dict.fromkeys(tuple(ids) for pair in pairs for ids in (pair.clean_ids, pair.wrapped_ids)))
    ids = answers(model, tokenizer, prompts, max_tokens, on_done)
    texts = {prompt: tokenizer.decode(answer, skip_special_tokens=True) for prompt, answer in zip(prompts, ids)}
    return [(texts[tuple(pair.clean_ids)], texts[tuple(pair.wrapped_ids)]) for pair in pairs]


def _of_answers(pairs: Sequence[Pair], replies: Sequence[tuple[str, str]]) -> dict[str, Floats]:
    """By measure, 1 or 0 for each pair; NaN where there is no answer key, or no hint to follow."""
    found: dict[str, list[float]] = {name: [] for name in OF_ANSWERS}
    for pair, (clean, wrapped) in zip(pairs, replies, strict=True):
        key = pair.key
        found["flipped"].append(flipped(clean, wrapped, key))
        found["right"].append(math.nan if key is None else is_right(wrapped, key))
        found["right_clean"].append(math.nan if key is None else is_right(clean, key))
        found["sycophantic"].append(math.nan if key is None or not pair.hints else is_hinted(wrapped, key))
    return {name: np.array(values, float) for name, values in found.items()}


def _attention(
    decoder: Any, pairs: Sequence[Pair], on_done: Callable[[int], None] | None
) -> list[tuple[dict[int, float], dict[str, float]]]:
    """Of each pair the attention distance by layer, and its measures of OF_ATTENTION."""
    import torch

    layers = frozenset(range(decoder.config.get_text_config().num_hidden_layers))
    found = {}
    for places in hooks.in_one_pass([len(pair.wrapped_ids) for pair in pairs]):
        some = [pairs[i] for i in places]
        with torch.inference_mode():
            clean, wrapped = (
                hooks.run_together(decoder, prompts, queries, layers, content=True)
                for prompts, queries in (
                    ([pair.clean_ids for pair in some], [pair.clean_queries for pair in some]),
                    ([pair.wrapped_ids for pair in some], [pair.wrapped_queries for pair in some]),
                )
            )
            for i, *passes in zip(places, wrapped, clean):
                found[i] = _compared(pairs[i], *passes)
        if on_done:
            on_done(len(some))
    return [found[i] for i in range(len(pairs))]


def _compared(pair: Pair, wrapped: hooks.Pass, clean: hooks.Pass) -> tuple[dict[int, float], dict[str, float]]:
    import torch

    device = wrapped.last.device
    at, to = (torch.from_numpy(places).to(device) for places in (pair.clean_positions, pair.wrapped_positions))
    by_layer = losses.attention_distances(wrapped.rows, clean.rows, to, at)
    rows = torch.stack([wrapped.rows[layer] for layer in sorted(wrapped.rows)])
    return by_layer, {
        "distance": sum(by_layer.values()) / len(by_layer),
        "top_weight": float(rows.amax(-1).mean()),
        "entropy": float(torch.special.entr(rows).sum(-1).mean()),
        "alike": _alike(wrapped, clean, to, at),
    }


def _alike(wrapped: hooks.Pass, clean: hooks.Pass, wrapped_keys: torch.Tensor, clean_keys: torch.Tensor) -> float:
    """The part of the attention loss that is on heads' rows which gather much the same content in both prompts."""
    total, of_alike = 0.0, 0.0
    for layer, rows in wrapped.rows.items():
        squared = losses.squared_distance(rows, clean.rows[layer], wrapped_keys, clean_keys)
        ours, theirs = wrapped.contents[layer], clean.contents[layer]
        alike = (ours - theirs).norm(dim=-1) < ALIKE * theirs.norm(dim=-1)
        total += float(squared.sum())
        of_alike += float(squared[alike].sum())
    return of_alike / total if total else math.nan


def _nll(model: Any, tokenizer: Any) -> Floats:
    """Of each passage of the neutral text, the mean over its tokens but the first, in nats."""
    import torch

    text = (files("headrift.safety_heads") / "neutral.txt").read_text(encoding="utf-8")
    found = []
    for passage in text.strip().split("\n\n"):
        ids = torch.tensor([tokenizer(passage)["input_ids"]], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        found.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
    return np.array(found)


def _decoder(model: Any) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.base_model


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Write figures as JSON, whole or not at all."""
    from headrift.runs.folder import write_json

    write_json(path, value)
