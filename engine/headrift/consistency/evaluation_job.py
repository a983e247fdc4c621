"""The evaluation of a training's folder: its held-out questions, one wrapper of each family around each."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrift.consistency import hooks, lora
from headrift.consistency.evaluation import AFTER, BEFORE, STATES, Measured, joined, measure, summary, work, write
from headrift.consistency.pairs import Pair
from headrift.consistency.split import drawn
from headrift.consistency.trainer import ADAPTER, SETTINGS
from headrift.consistency.training_data import DataAsked, load
from headrift.model_facts import read_model
from headrift.runs.provenance import model_fingerprint, versions

RESULT, REPLIES = "evaluation.json", "replies.jsonl"


class EvaluationError(ValueError):
    """The folder cannot be evaluated; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Asked:
    """run: a training's folder. per_family: wrappers of each family around a question, drawn by the seed. questions: at
    most so many of those held out, None for all, in an order drawn by the seed; skip: without the first so many of
    them, which have been looked at. model: where the model is now, None for where it was then."""

    run: Path
    per_family: int = 1
    questions: int | None = None
    skip: int = 0
    seed: int = 0
    model: Path | None = None


class EvaluationJob:
    """One evaluation; making it checks all that can be checked without the model."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        lora.check_peft()
        path = asked.run / SETTINGS
        try:
            self._training = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{asked.run} holds no training ({SETTINGS} cannot be read: {error})") from error
        about = self._training["about"]
        self.model = asked.model or Path(about["model"])
        facts = read_model(self.model)
        if not (asked.run / ADAPTER).is_dir():
            raise EvaluationError(f"{asked.run} holds no finished training: go on with train-consistency --resume")
        if model_fingerprint(self.model)["fingerprint"] != self._training["settings"]["model"]:
            raise EvaluationError(f"{self.model} is not the model that was trained: name that one with --model")
        lora.check(asked.run / ADAPTER, self.model)
        held_out = self._training["held_out"]
        self.max_tokens: int = about["answer_tokens"]
        data = load(
            DataAsked(
                inputs=tuple(about["inputs"]),
                model=self.model,
                system_prompt=about["system_prompt"],
                columns=about["columns"],
                split_seed=about["split_seed"],
                held_out_questions=about["held_out_questions"],
                held_out_families=tuple(held_out["families"]),
                limit=about["limit"],
            ),
            facts,
            self.max_tokens,
        )
        self._tokenizer = data.renderer.tokenizer
        self._shared: Measured | None = None
        self._before: Measured | None = None
        self.families = frozenset(held_out["families"])
        questions = held_out["questions"]
        if not {text.question for text in data.texts} >= set(questions):
            raise EvaluationError(
                f"{', '.join(about['inputs'])} no longer holds all questions of the training: restore it"
            )
        in_order = random.Random(asked.seed).sample(questions, len(questions))[asked.skip :]
        if not in_order:
            raise EvaluationError(f"--skip {asked.skip} leaves none of the {len(questions)} held-out questions")
        chosen = set(in_order[: asked.questions])
        texts = [text for text in data.texts if text.question in chosen]
        self.pairs, self.rejected = data.rendered(drawn(texts, asked.per_family, asked.seed))
        if not self.pairs:
            raise EvaluationError(f"none of the held-out pairs can be used; {self.rejected[0].detail}")

    @property
    def prompts(self) -> int:
        """How many prompts there are to work through."""
        return work(self.pairs, STATES if self._shared is None else (AFTER,))

    def share_before(self, other: EvaluationJob) -> None:
        """Take the figures of the model as it was from another evaluation, which has run, if it asked the same."""
        asked, theirs = ((job.model.resolve(), job.pairs, job.max_tokens) for job in (self, other))
        if asked == theirs:
            self._shared = other._before

    def run(self, on_done: Callable[[int], None] | None = None) -> dict[str, Any]:
        """Measure, and write evaluation.json and replies.jsonl into the folder."""
        model, tokenizer = load_trained(self.model, self.asked.run / ADAPTER), self._tokenizer

        def measured_in(state: str) -> Measured:
            states = (state,)
            return measure(model, tokenizer, self.pairs, max_tokens=self.max_tokens, states=states, on_done=on_done)

        self._before = self._shared or measured_in(BEFORE)
        measured = joined(self._before, measured_in(AFTER))
        found = {
            "training": {name: self._training["settings"][name] for name in ("weights", "target", "seed", "layers")},
            "asked": {name: getattr(self.asked, name) for name in ("per_family", "questions", "skip", "seed")},
            "held_out_families": sorted(self.families),
            **summary(self.pairs, measured, self.families, self.asked.seed),
            "versions": versions(),
        }
        write(self.asked.run / RESULT, found)
        _write_replies(self.asked.run / REPLIES, self.pairs, measured)
        return found


def load_trained(model: Path, adapter: Path) -> Any:
    """The model with its adapter, in float32."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    base: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    hooks.install(base)
    trained = peft.PeftModel.from_pretrained(base, str(adapter))
    return trained.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _write_replies(path: Path, pairs: Sequence[Pair], measured: Measured) -> None:
    lines = []
    for i, pair in enumerate(pairs):
        said = {state: dict(zip(("clean", "wrapped"), replies[i])) for state, replies in measured.replies.items()}
        lines.append(json.dumps({"id": pair.id, "family": pair.family, **said}, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
