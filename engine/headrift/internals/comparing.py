"""A system prompt's part of the results: every question without it, with it, and with neutral text of its length.

The question alone answers once, greedily, for a few tokens; in all other renderings these tokens are put behind the
prompt. So one pass says what each would have said at every step, and for how many tokens its own greedy answer is the
same: up to the first step at which its most likely token is another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from headrift.consistency.generating import answers
from headrift.internals.cases import Case, Question
from headrift.internals.components import COMPONENTS, Floats, Model, Reading, Row
from headrift.internals.measures import cka_by_chance, cosine, gram, kl, linear_cka, relative_l2
from headrift.internals.renderings import Rendered

# Which two renderings: the first is what the second is held against.
SYSTEM, NEUTRAL, BEYOND = COMPARISONS = ("none_to_system", "none_to_neutral", "neutral_to_system")
# Where: at the last prompt token, or at the question's tokens that both have in common (mean over them).
LAST, QUESTION = PLACES = ("last", "question")
_STATES = tuple(f"{place}_{measure}" for place in PLACES for measure in ("cosine", "l2"))

OnRows = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Base:
    """The questions alone. answers: the greedy answer's first tokens; readings: at all tokens of the question and, in
    the end, at the last prompt token."""

    answers: list[list[int]]
    readings: list[Reading]


def read_base(
    model: Model, tokenizer: Any, questions: Sequence[Question], steps: int, on_rows: OnRows | None = None
) -> Base:
    """What the questions' own rows are: they answer `steps` tokens, or fewer where the answer ends."""
    said = answers(model.model, tokenizer, [question.base.token_ids for question in questions], steps)
    rows = [row_of(question.base, answer, range(*question.base.question)) for question, answer in zip(questions, said)]
    return Base(said, model.read(rows, on_rows))


def row_of(rendered: Rendered, answer: Sequence[int], points: Sequence[int] = ()) -> Row:
    """A rendering with an answer behind it: states at these points and at the last prompt token, and the next token's
    distribution there and at every token of the answer but its last."""
    last = len(rendered.token_ids) - 1
    said = tuple(range(last, last + max(1, len(answer))))
    return Row([*rendered.token_ids, *answer[:-1]], said, (*points, last))


def compare(
    model: Model, name: str, cases: Sequence[Case], base: Base, on_rows: OnRows | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records (see `schema`), three for each case, and CKA over the cases by comparison, place, layer and component.
    A case whose states are not all finite has no record."""
    numbers = [case.question.number for case in cases]
    runs = [(case.in_system, case.in_neutral) for case in cases]
    alone = [base.readings[i] for i in numbers]
    read = []
    for side in (0, 1):
        rows = [
            row_of(
                case.neutral if side else case.system,
                base.answers[i],
                range(run[side].theirs, run[side].theirs + run[side].length),
            )
            for case, i, run in zip(cases, numbers, runs)
        ]
        read.append(model.read(rows, on_rows))
    records: list[dict[str, Any]] = []
    means: dict[str, list[list[Floats]]] = {comparison: [] for comparison in COMPARISONS}
    for case, own, with_system, with_neutral, (in_system, in_neutral) in zip(cases, alone, *read, runs):
        if not all(np.isfinite(reading.states).all() for reading in (own, with_system, with_neutral)):
            continue
        first = case.question.base.question[0]
        ours = {
            side: np.concatenate([own.states[run.ours - first : run.ours - first + run.length], own.states[-1:]])
            for side, run in ((SYSTEM, in_system), (NEUTRAL, in_neutral))
        }
        # Both renderings have the question's tokens at the same places, and in common with the question alone.
        between = (
            (SYSTEM, ours[SYSTEM], own, with_system),
            (NEUTRAL, ours[NEUTRAL], own, with_neutral),
            (BEYOND, with_neutral.states, with_neutral, with_system),
        )
        for comparison, before, one, other in between:
            about = {
                "system": name,
                "prompt": case.question.number,
                "id": case.question.id,
                "category": case.question.category,
                "comparison": comparison,
                "system_tokens": case.system_tokens,
                "prompt_tokens": len(case.system.token_ids),
                "question_tokens": len(before) - 1,
            }
            records.append(about | output_change(one, other) | _state_change(before, other.states))
            means[comparison].append([_by_place(states) for states in (before, other.states)])
    return records, [row for comparison in COMPARISONS for row in _cka(name, comparison, means[comparison])]


def output_change(ours: Reading, theirs: Reading) -> dict[str, Any]:
    """kl: KL(ours || theirs) of the first answer token, nats; top1_changed: whether its most likely token is another;
    kl_steps: at each step along the answer; same_steps: steps before the most likely token first is another, the
    length that the two greedy answers have in common."""
    steps = kl(ours.log_probs, theirs.log_probs)
    same = ours.log_probs.argmax(-1) == theirs.log_probs.argmax(-1)
    return {
        "kl": float(steps[0]),
        "top1_changed": not bool(same[0]),
        "steps": len(steps),
        "same_steps": len(same) if same.all() else int(np.argmin(same)),
        "kl_steps": steps.astype(np.float32),
    }


def _state_change(ours: Floats, theirs: Floats) -> dict[str, Any]:
    """Cosine and relative L2 [layers, components], of the last point and of all before it (mean)."""
    found: dict[str, Any] = {}
    for measure, of in (("cosine", cosine), ("l2", relative_l2)):
        values = of(ours, theirs)
        found |= {f"{LAST}_{measure}": values[-1], f"{QUESTION}_{measure}": values[:-1].mean(0)}
    return {name: values.astype(np.float32).ravel() for name, values in found.items()}


def _by_place(states: Floats) -> Floats:
    """[places, layers, components, hidden]: of the last point, and the mean of the others."""
    return np.stack([states[-1], states[:-1].mean(0)])


def _cka(name: str, comparison: str, means: Sequence[Sequence[Floats]]) -> list[dict[str, Any]]:
    if len(means) < 3:  # of two examples all CKAs are 1
        return []
    ours, theirs = (gram(np.stack([pair[side] for pair in means])) for side in (0, 1))
    values, chance = linear_cka(ours, theirs), cka_by_chance(ours, theirs)
    return [
        {
            "system": name,
            "comparison": comparison,
            "place": PLACES[place],
            "layer": layer,
            "component": COMPONENTS[component],
            "cka": float(values[place, layer, component]),
            "by_chance": float(chance[place, layer, component]),
            "prompts": len(means),
        }
        for place, layer, component in np.ndindex(*values.shape)
    ]


def schema(layers: int) -> pa.Schema:
    """Columns of a part. Of lists the shape is in the metadata."""
    numbers = pa.list_(pa.float32())
    columns: list[tuple[str, Any]] = [
        ("system", pa.string()),
        ("prompt", pa.int32()),
        ("id", pa.string()),
        ("category", pa.string()),
        ("comparison", pa.string()),
        ("system_tokens", pa.int32()),
        ("prompt_tokens", pa.int32()),
        ("question_tokens", pa.int32()),
        ("kl", pa.float64()),
        ("top1_changed", pa.bool_()),
        ("steps", pa.int16()),
        ("same_steps", pa.int16()),
        ("kl_steps", numbers),
        *((name, numbers) for name in _STATES),
    ]
    about = {"layers": layers, "components": COMPONENTS, "shapes": {name: ["layers", "components"] for name in _STATES}}
    return pa.schema(columns, metadata={b"headrift": json.dumps(about).encode()})


CKA_SCHEMA = pa.schema(
    [
        ("system", pa.string()),
        ("comparison", pa.string()),
        ("place", pa.string()),
        ("layer", pa.int16()),
        ("component", pa.string()),
        ("cka", pa.float64()),
        ("by_chance", pa.float64()),
        ("prompts", pa.int32()),
    ]
)
