"""The same text as system prompt, in the user's turn before the question, and behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from headrift.internals.cases import Question, Reject, SystemPrompt
from headrift.internals.comparing import Base, output_change, row_of
from headrift.internals.components import COMPONENTS, RESIDUAL, Model
from headrift.internals.measures import relative_l2
from headrift.internals.renderings import Aligned, Rendered, Renderer, aligned
from headrift.prompts import PromptError

PLACEMENTS = ("system prompt", "before the question", "behind the question")


@dataclass(frozen=True, slots=True)
class Placed:
    """A system text somewhere in a question's prompt; run: the question's tokens in common with it alone (`ours`)."""

    where: str
    question: Question
    rendered: Rendered
    run: Aligned


def make_placed(questions: Sequence[Question], system: SystemPrompt, renderer: Renderer) -> list[Placed | Reject]:
    """Each question with the text at each of PLACEMENTS, by place."""
    ways = (renderer.with_system, renderer.before_question, renderer.behind_question)
    found: list[Placed | Reject] = []
    for where, way in zip(PLACEMENTS, ways):
        for question in questions:
            try:
                rendered = way(question.text, system.text)
                found.append(Placed(where, question, rendered, aligned(question.base, rendered)))
            except PromptError as error:
                found.append(Reject(question.source, question.row, question.id, system.name, error.reason, str(error)))
    return found


def measure(
    model: Model, name: str, placed: Sequence[Placed], base: Base, on_rows: Callable[[int], None] | None = None
) -> list[dict[str, Any]]:
    """A record (see SCHEMA) of each, against the question alone."""
    residual = COMPONENTS.index(RESIDUAL)
    found = []
    for where in dict.fromkeys(each.where for each in placed):
        of = [each for each in placed if each.where == where]
        rows = [
            row_of(each.rendered, base.answers[each.question.number], range(each.run.theirs, _end(each.run)))
            for each in of
        ]
        for each, reading in zip(of, model.read(rows, on_rows)):
            own = base.readings[each.question.number]
            first = each.run.ours - each.question.base.question[0]
            before = np.concatenate([own.states[first : first + each.run.length], own.states[-1:]])
            change = relative_l2(before[:, :, residual], reading.states[:, :, residual]).mean(-1)
            out = output_change(own, reading)
            found.append(
                {
                    "system": name,
                    "placement": where,
                    "prompt": each.question.number,
                    "id": each.question.id,
                    "residual_last": float(change[-1]),
                    "residual_question": float(change[:-1].mean()),
                    **{key: out[key] for key in ("kl", "top1_changed", "steps", "same_steps")},
                }
            )
    return found


def _end(run: Aligned) -> int:
    return run.theirs + run.length


SCHEMA = pa.schema(
    [
        ("system", pa.string()),
        ("placement", pa.string()),
        ("prompt", pa.int32()),
        ("id", pa.string()),
        ("residual_last", pa.float64()),
        ("residual_question", pa.float64()),
        ("kl", pa.float64()),
        ("top1_changed", pa.bool_()),
        ("steps", pa.int16()),
        ("same_steps", pa.int16()),
    ]
)
