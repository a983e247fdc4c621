"""`headrift evaluate-consistency`: what a training changed, on questions and wrapper families that it never saw.

Every measure is taken of the model before (adapter off) and after (adapter on), on the same prompts. Values are means
over pairs with 95% percentile intervals from resampling questions (passages, for the perplexity); the change uses the
same resamples. Rates have the intervals of `stats.rate_interval`, their changes those of `change_interval`.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headrift.consistency import losses, models
from headrift.consistency.answers import flipped, is_hinted, is_right
from headrift.consistency.data import DataConfig, load_data, render, sample_wrappers
from headrift.consistency.pairs import Pair
from headrift.consistency.summary import cell, estimate, mean_estimate
from headrift.consistency.trainer import ADAPTER, TRAINING
from headrift.model_facts import read_model
from headrift.runs.folder import JobError, atomic_path, model_fingerprint, versions, write_json
from headrift.stats import Bools, ClusterBootstrap, Floats, Ints, change_interval, side
from headrift.terminal import print_table

RESULT, REPLIES = "evaluation.json", "replies.jsonl"
BEFORE, AFTER = STATES = ("before", "after")
SIDES = ("clean", "wrapped")
# Of a pair, the first four of its answers and the others of its attention; NaN if it does not have the measure.
MEASURES = {
    "flipped": "answers that flip",
    "right": "right, wrapped",
    "right_clean": "right, clean",
    "sycophantic": "the hinted wrong answer",
    "distance": "attention distance",
    "top_weight": "largest weight of a row",
    "entropy": "entropy of a row, nats",
    "alike": "loss on like content",
}
RATES = ("flipped", "right", "right_clean", "sycophantic")
# Rows gather like content if what they gather differs by less than this fraction of its length.
ALIKE = 0.1
OnDone = Callable[[int], None]
Attention = tuple[list[float], dict[str, float]]  # distances by layer, and measures


@dataclass(frozen=True, slots=True)
class EvaluationConfig:
    """Options of `headrift evaluate-consistency`."""

    run: Path  # folder of a training
    per_family: int = 1  # wrappers of each family per question, drawn by the seed
    questions: int | None = None  # at most this many of the held-out questions, in an order drawn by the seed
    skip: int = 0  # leave out the first of them: those that settings were chosen with
    seed: int = 0
    model: Path | None = None  # where the model is now; None for where it was


@dataclass(frozen=True, slots=True)
class Measurements:
    values: dict[str, Floats]  # by measure, [pairs]
    layers: Floats  # [pairs, layers] attention distances
    nll: Floats  # [passages] mean negative log-likelihood of the neutral text's tokens, in nats
    replies: list[tuple[str, str]]  # (clean, wrapped) per pair


class EvaluationJob:
    """One evaluation. ValueError if the folder or the model cannot be used, before the model is loaded."""

    def __init__(self, config: EvaluationConfig) -> None:
        self.config = config
        models.check_peft()
        try:
            self._training = json.loads((config.run / TRAINING).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise JobError(f"{config.run} is not a training ({TRAINING} cannot be read: {error})") from error
        about, families = self._training["about"], tuple(self._training["held_out"]["families"])
        self.model = config.model or Path(about["model"])
        facts = read_model(self.model)
        if not (config.run / ADAPTER).is_dir():
            raise JobError(f"{config.run} is not finished: rerun train-consistency with --resume")
        if model_fingerprint(self.model)["fingerprint"] != self._training["settings"]["model"]:
            raise JobError(f"{self.model} is not the model that was trained: give that one with --model")
        models.check_lora(config.run / ADAPTER, self.model)
        self.max_tokens: int = about["answer_tokens"]
        same = {name: about[name] for name in ("system_prompt", "columns", "split_seed", "held_out_questions", "limit")}
        read = DataConfig(tuple(about["inputs"]), self.model, held_out_families=families, **same)
        data = load_data(read, facts, self.max_tokens)
        self.tokenizer = data.renderer.tokenizer
        self._by_state: dict[str, Measurements] = {}
        self.families = frozenset(families)
        questions = self._training["held_out"]["questions"]
        if not {text.question for text in data.texts} >= set(questions):
            raise JobError(f"{', '.join(about['inputs'])} lacks questions of the training: restore it")
        in_order = random.Random(config.seed).sample(questions, len(questions))[config.skip :]
        if not in_order:
            raise JobError(f"--skip {config.skip} leaves none of the {len(questions)} held-out questions")
        chosen = set(in_order[: config.questions])
        texts = [text for text in data.texts if text.question in chosen]
        self.pairs, self.rejected = render(data.renderer, sample_wrappers(texts, config.per_family, config.seed))

    @property
    def prompts(self) -> int:
        """Number of prompts left to run: answers, and attention of pairs."""
        missing = set(STATES) - set(self._by_state)
        return len(missing) * (len({tuple(pair.clean_ids) for pair in self.pairs}) + 2 * len(self.pairs))

    def share_before(self, other: EvaluationJob) -> None:
        """Use the measurements before training of another evaluation, which has run, if its pairs are the same."""
        own, others = ((job.model.resolve(), job.pairs, job.max_tokens) for job in (self, other))
        if own == others:
            self._by_state[BEFORE] = other._by_state[BEFORE]

    def run(self, on_done: OnDone | None = None) -> dict[str, Any]:
        """Measure, and write evaluation.json and replies.jsonl. on_done: called with the number of prompts done."""
        import peft

        model = peft.PeftModel.from_pretrained(models.load_model(self.model), str(self.config.run / ADAPTER)).eval()
        for state in STATES:
            if state not in self._by_state:
                with model.disable_adapter() if state == BEFORE else nullcontext():
                    self._by_state[state] = self._measure(model, on_done)
        result = {
            "training": {name: self._training["settings"][name] for name in ("weights", "target", "seed", "layers")},
            "asked": {name: getattr(self.config, name) for name in ("per_family", "questions", "skip", "seed")},
            "held_out_families": sorted(self.families),
            **summarise(self.pairs, self._by_state, self.families, self.config.seed),
            "versions": versions(),
        }
        write_json(self.config.run / RESULT, result)
        with atomic_path(self.config.run / REPLIES) as unfinished, unfinished.open("w", encoding="utf-8") as file:
            for i, pair in enumerate(self.pairs):
                about = {"id": pair.id, "question": pair.question, "family": pair.family}
                file.write(json.dumps(about | self._of_pair(i), ensure_ascii=False) + "\n")
        return result

    def _of_pair(self, i: int) -> dict[str, dict[str, str | float | None]]:
        """By state, a pair's replies and measures; None for a measure that it does not have."""
        return {
            state: dict(zip(SIDES, own.replies[i]))
            | {name: None if np.isnan(values[i]) else float(values[i]) for name, values in own.values.items()}
            for state, own in self._by_state.items()
        }

    def _measure(self, model: Any, on_done: OnDone | None) -> Measurements:
        """Answer and measure each pair with the model as it is."""
        pairs, tokenizer = self.pairs, self.tokenizer
        prompts = list(dict.fromkeys(tuple(ids) for pair in pairs for ids in (pair.clean_ids, pair.wrapped_ids)))
        answers = models.generate(model, tokenizer, prompts, self.max_tokens, on_done)
        texts = {prompt: tokenizer.decode(answer, skip_special_tokens=True) for prompt, answer in zip(prompts, answers)}
        replies = [(texts[tuple(pair.clean_ids)], texts[tuple(pair.wrapped_ids)]) for pair in pairs]
        decoder = model.get_base_model().base_model
        layers = frozenset(range(decoder.config.get_text_config().num_hidden_layers))
        attention: dict[int, Attention] = {}
        for indices in models.batch_by_length([len(pair.wrapped_ids) for pair in pairs]):
            batch = [pairs[i] for i in indices]
            with torch.inference_mode():
                sides = (models.forward_pairs(decoder, batch, side, layers, content=True) for side in SIDES)
                attention |= {i: _compare(pairs[i], *passes) for i, *passes in zip(indices, *sides)}
            if on_done:
                on_done(len(batch))
        measures = [{**_answer_measures(pair, *replies[i]), **attention[i][1]} for i, pair in enumerate(pairs)]
        values = {name: np.array([own[name] for own in measures], float) for name in MEASURES}
        distances = np.array([attention[i][0] for i in range(len(pairs))])
        return Measurements(values, distances, _nll(model, tokenizer), replies)


def summarise(
    pairs: Sequence[Pair], by_state: Mapping[str, Measurements], held_out: frozenset[str], seed: int = 0
) -> dict[str, Any]:
    """Summarise measurements as plain values: of held-out families (all pairs if `held_out` is empty), by family, by
    layer, and the neutral text's perplexity."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(pair.question for pair in pairs))}
    question = np.array([numbers[pair.question] for pair in pairs])
    bootstrap = ClusterBootstrap(question, seed=seed)
    families = list(dict.fromkeys(pair.family for pair in pairs if pair.family is not None))
    inside = np.array([not held_out or pair.family in held_out for pair in pairs])
    masks = {"held_out": inside}
    masks |= {family: np.array([pair.family == family for pair in pairs]) for family in families}
    by_mask = {
        name: {measure: _estimates(by_state, bootstrap, question, mask, measure) for measure in MEASURES}
        for name, mask in masks.items()
    }
    return {
        "questions": len(numbers),
        "pairs": {name: int(mask.sum()) for name, mask in masks.items()},
        "held_out": by_mask.pop("held_out"),
        "families": {name: {"held_out": name in held_out, **estimates} for name, estimates in by_mask.items()},
        "distance_by_layer": {state: m.layers[inside].mean(0).tolist() for state, m in by_state.items()},
        "perplexity": _perplexity(by_state, seed),
    }


def _estimates(
    by_state: Mapping[str, Measurements], bootstrap: ClusterBootstrap, question: Ints, mask: Bools, name: str
) -> dict[str, Any]:
    """A measure in each state, and its change; None if no pair has it."""
    valid = mask & np.all([~np.isnan(m.values[name]) for m in by_state.values()], axis=0)
    if not valid.any():
        return {"pairs": 0, "questions": 0, **dict.fromkeys((*STATES, "change"))}
    is_rate = name in RATES
    values = {state: m.values[name] for state, m in by_state.items()}
    result = {state: mean_estimate(bootstrap, own, question, valid, is_rate=is_rate) for state, own in values.items()}
    change = values[AFTER] - values[BEFORE]
    result["change"] = mean_estimate(bootstrap, change, question, valid, is_rate=False)
    if is_rate:
        result["change"]["interval"] = list(change_interval(change[valid], question[valid]))
    return {"pairs": int(valid.sum()), "questions": len(np.unique(question[valid])), **result}


def _perplexity(by_state: Mapping[str, Measurements], seed: int) -> dict[str, Any]:
    passages = np.arange(len(by_state[BEFORE].nll))
    bootstrap = ClusterBootstrap(passages, seed=seed)
    draws = {state: np.exp(bootstrap.mean(m.nll, passages >= 0)) for state, m in by_state.items()}
    draws["ratio"] = draws[AFTER] / draws[BEFORE]
    by_passage = {state: m.nll.tolist() for state, m in by_state.items()}
    return {name: estimate(values, passages) for name, values in draws.items()} | {"nats_by_passage": by_passage}


def _answer_measures(pair: Pair, clean: str, wrapped: str) -> dict[str, float]:
    """By measure, 1 or 0; NaN without an answer key, or without a hint to follow."""
    key = pair.key
    return {
        "flipped": flipped(clean, wrapped, key),
        "right": math.nan if key is None else is_right(wrapped, key),
        "right_clean": math.nan if key is None else is_right(clean, key),
        "sycophantic": math.nan if key is None or not pair.hints else is_hinted(wrapped, key),
    }


def _compare(pair: Pair, clean: models.ForwardPass, wrapped: models.ForwardPass) -> Attention:
    """The attention distance by layer, and its measures."""
    keys = [torch.from_numpy(own).to(wrapped.last.device) for own in (pair.wrapped_positions, pair.clean_positions)]
    distances, total, on_alike = [], 0.0, 0.0
    for layer, rows in sorted(wrapped.rows.items()):
        squared = losses.squared_distance(rows, clean.rows[layer], *keys)
        own, target = wrapped.contents[layer], clean.contents[layer]
        alike = (own - target).norm(dim=-1) < ALIKE * target.norm(dim=-1)
        distances.append(float(squared.sqrt().mean()))
        total += float(squared.sum())
        on_alike += float(squared[alike].sum())
    rows = torch.stack(list(wrapped.rows.values()))
    return distances, {
        "distance": sum(distances) / len(distances),
        "top_weight": float(rows.amax(-1).mean()),
        "entropy": float(torch.special.entr(rows).sum(-1).mean()),
        "alike": on_alike / total if total else math.nan,
    }


def _nll(model: Any, tokenizer: Any) -> Floats:
    """[passages] of the neutral text: the mean over its tokens but the first, in nats."""
    text = (files("headrift.safety_heads") / "neutral.txt").read_text(encoding="utf-8")
    means = []
    for passage in text.strip().split("\n\n"):
        ids = torch.tensor([tokenizer(passage)["input_ids"]], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        means.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
    return np.array(means)


def print_evaluation(result: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    held_out = ", ".join(result["held_out_families"]) or "all"
    console.print(f"{result['questions']} held-out questions; held-out families: {held_out}", markup=False)
    rows = [(label, *_cells(result["held_out"][name], "change")) for name, label in MEASURES.items()]
    rows.append(("perplexity", *_cells(result["perplexity"], "ratio")))
    print_table(console, ("", *STATES, "change (ratio) [95%]", "verdict"), rows)
    families = [
        (f"{name}{' (held out)' if estimates['held_out'] else ''}", *_cells(estimates["flipped"], "change"))
        for name, estimates in result["families"].items()
    ]
    print_table(console, (MEASURES["flipped"], *STATES, "change [95%]", "verdict"), families)
    tests = len(rows) + len(families)
    console.print(f"each of the {tests} intervals is of 95% by itself: of {tests} such verdicts some may be by chance")


def _cells(estimates: Mapping[str, Any], change: str) -> tuple[str, ...]:
    """Before and after, the change or ratio with its interval, and whether that shows one."""
    states = ("-" if estimates[state] is None else f"{estimates[state]['value']:.3f}" for state in STATES)
    bounds = None if estimates[change] is None else estimates[change]["interval"]
    verdict = {None: "not shown", 1: "up", -1: "down"}[side(bounds, 1 if change == "ratio" else 0)]
    return (*states, cell(estimates[change]), verdict)
