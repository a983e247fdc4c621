"""What a system prompt changes: states inside the model, and the next tokens' distributions.

The question alone answers once, greedily, for a few tokens. In all other renderings these tokens follow the prompt, so
one pass gives each rendering's distribution at every step, and how many tokens its own greedy answer shares: up to the
first step whose most likely token is another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from headrift.consistency.model import generate
from headrift.internals.cases import Alignment, Case, Question, Reject, Renderer, Rendering, SystemPrompt, align
from headrift.internals.components import COMPONENTS, RESIDUAL, ForwardRow, Reading, StateReader, States
from headrift.prompts import PromptError
from headrift.stats import Floats

# The two renderings of a comparison: none (the question alone), system prompt, neutral text.
SYSTEM, NEUTRAL, BEYOND = COMPARISONS = ("none_to_system", "none_to_neutral", "neutral_to_system")
# Where states are compared: at the last prompt token, and at the question's tokens that both renderings have (mean).
LAST, QUESTION = PLACES = ("last", "question")
# Where the text of a system prompt is put.
PLACEMENTS = ("system prompt", "before the question", "behind the question")
_STATES = tuple(f"{place}_{measure}" for place in PLACES for measure in ("cosine", "l2"))

OnRows = Callable[[int], None]


def cosine(a: Any, b: Any) -> Floats:
    """Cosine of the vectors on the last axis; 0 if one of them is 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.divide((a * b).sum(-1), norms, out=np.zeros(norms.shape), where=norms > 0)


def relative_l2(a: Any, b: Any) -> Floats:
    """|b - a| / |a| of the vectors on the last axis; NaN if a is 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norm = np.linalg.norm(a, axis=-1)
    return np.divide(np.linalg.norm(b - a, axis=-1), norm, out=np.full(norm.shape, np.nan), where=norm > 0)


def kl(a: Any, b: Any) -> Floats:
    """KL(a || b) in nats of log probabilities on the last axis."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.maximum((np.exp(a) * (a - b)).sum(-1), 0.0)


def gram(states: Any) -> Floats:
    """Inner products [..., n, n] of n examples [n, ..., p], each of the p columns centred first."""
    x = np.moveaxis(np.asarray(states, np.float64), 0, -2)
    x = x - x.mean(-2, keepdims=True)
    return x @ np.swapaxes(x, -1, -2)


def linear_cka(a: Floats, b: Floats) -> Floats:
    """Linear centred kernel alignment [...] of two states' `gram`s [..., n, n]; 0 to 1, NaN if one never varies.

    CKA(X, Y) = |Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms, columns centred (Kornblith et al., Similarity of Neural
    Network Representations Revisited, 2019, section 3); by n x n matrices, since n is far below p here.
    """
    norms = np.linalg.norm(a, axis=(-2, -1)) * np.linalg.norm(b, axis=(-2, -1))
    return np.divide((a * b).sum((-2, -1)), norms, out=np.full(norms.shape, np.nan), where=norms > 0)


def cka_by_chance(a: Floats, b: Floats, draws: int = 20, seed: int = 0) -> Floats:
    """Mean CKA [...] with the examples of b in random order.

    With far fewer examples than dimensions CKA is far above 0 even for unrelated states; this says how far.
    """
    random = np.random.default_rng(seed)
    orders = (random.permutation(b.shape[-1]) for _ in range(draws))
    return np.mean([linear_cka(a, b[..., order, :][..., order]) for order in orders], axis=0)


class Baseline(NamedTuple):
    """The questions alone."""

    answers: list[list[int]]  # first tokens of the greedy answers
    readings: list[Reading]  # at all tokens of the question and, at the end, at the last prompt token

    def states(self, question: Question, alignment: Alignment) -> States:
        """The question's states at its aligned tokens and at the last prompt token."""
        states = self.readings[question.number].states
        first = alignment.base - question.base.question[0]
        return np.concatenate([states[first : first + alignment.length], states[-1:]])

    def row(self, question: Question, rendering: Rendering, alignment: Alignment) -> ForwardRow:
        """The forward row of another rendering, with the question's answer."""
        points = range(alignment.other, alignment.other + alignment.length)
        return make_row(rendering, self.answers[question.number], points)


def read_baseline(
    reader: StateReader, tokenizer: Any, questions: Sequence[Question], steps: int, on_rows: OnRows | None = None
) -> Baseline:
    """Let the questions alone answer `steps` tokens, or fewer if the answer ends, and read their states."""
    greedy = generate(reader.model, tokenizer, [question.base.token_ids for question in questions], steps)
    pairs = zip(questions, greedy)
    rows = [make_row(question.base, answer, range(*question.base.question)) for question, answer in pairs]
    return Baseline(greedy, reader.read(rows, on_rows))


def make_row(rendering: Rendering, answer: Sequence[int], points: Sequence[int] = ()) -> ForwardRow:
    """A rendering and an answer: states at these points and at the last prompt token, distributions from there on."""
    last = len(rendering.token_ids) - 1
    predict_at = tuple(range(last, last + max(1, len(answer))))
    return ForwardRow([*rendering.token_ids, *answer[:-1]], predict_at, (*points, last))


def compare(
    reader: StateReader, name: str, cases: Sequence[Case], baseline: Baseline, on_rows: OnRows | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure the cases of the system prompt `name`.

    Returns:
        Three records (see `schema`) for each case, none if its states are not all finite; and records (CKA_SCHEMA) of
        CKA over the cases.
    """
    system_rows = [baseline.row(case.question, case.system, case.system_alignment) for case in cases]
    neutral_rows = [baseline.row(case.question, case.neutral, case.neutral_alignment) for case in cases]
    records: list[dict[str, Any]] = []
    places: dict[str, list[list[States]]] = {comparison: [] for comparison in COMPARISONS}
    for case, system, neutral in zip(cases, reader.read(system_rows, on_rows), reader.read(neutral_rows, on_rows)):
        alone = baseline.readings[case.question.number]
        if not all(np.isfinite(reading.states).all() for reading in (alone, system, neutral)):
            continue
        # System prompt and neutral text are as long, so the question's tokens are at the same places in both.
        for comparison, before, first, second in (
            (SYSTEM, baseline.states(case.question, case.system_alignment), alone, system),
            (NEUTRAL, baseline.states(case.question, case.neutral_alignment), alone, neutral),
            (BEYOND, neutral.states, neutral, system),
        ):
            record = {
                "system": name,
                "prompt": case.question.number,
                "id": case.question.id,
                "category": case.question.category,
                "comparison": comparison,
                "system_tokens": case.system_tokens,
                "prompt_tokens": len(case.system.token_ids),
                "question_tokens": len(before) - 1,
            }
            records.append(record | _output_change(first, second) | _state_change(before, second.states))
            places[comparison].append([_by_place(states) for states in (before, second.states)])
    return records, [row for comparison in COMPARISONS for row in _cka(name, comparison, places[comparison])]


def _output_change(before: Reading, after: Reading) -> dict[str, Any]:
    """Columns on the output: KL of the first answer token and of every step, and the common greedy answer's length."""
    steps = kl(before.log_probs, after.log_probs)
    same = before.log_probs.argmax(-1) == after.log_probs.argmax(-1)
    return {
        "kl": float(steps[0]),
        "top1_changed": not bool(same[0]),
        "steps": len(steps),
        "same_steps": len(same) if same.all() else int(np.argmin(same)),
        "kl_steps": steps.astype(np.float32),
    }


def _state_change(before: States, after: States) -> dict[str, Any]:
    """Columns on the states [layers, components]: at the last point, and the mean over all points before it."""
    changes: dict[str, Any] = {}
    for measure, function in (("cosine", cosine), ("l2", relative_l2)):
        values = function(before, after)
        changes |= {f"{LAST}_{measure}": values[-1], f"{QUESTION}_{measure}": values[:-1].mean(0)}
    return {name: values.astype(np.float32).ravel() for name, values in changes.items()}


def _by_place(states: States) -> States:
    """[places, layers, components, hidden]: of the last point, and the mean of the others."""
    return np.stack([states[-1], states[:-1].mean(0)])


def _cka(name: str, comparison: str, states: Sequence[Sequence[States]]) -> list[dict[str, Any]]:
    if len(states) < 3:  # with two examples every CKA is 1
        return []
    before, after = (gram(np.stack([pair[side] for pair in states])) for side in (0, 1))
    values, chance = linear_cka(before, after), cka_by_chance(before, after)
    return [
        {
            "system": name,
            "comparison": comparison,
            "place": PLACES[place],
            "layer": layer,
            "component": COMPONENTS[component],
            "cka": float(values[place, layer, component]),
            "by_chance": float(chance[place, layer, component]),
            "prompts": len(states),
        }
        for place, layer, component in np.ndindex(*values.shape)
    ]


class Placed(NamedTuple):
    """A system prompt's text somewhere in a question's prompt."""

    placement: str  # one of PLACEMENTS
    question: Question
    rendering: Rendering
    alignment: Alignment  # with the question alone


def make_placed(questions: Sequence[Question], system: SystemPrompt, renderer: Renderer) -> list[Placed | Reject]:
    """Render each question with the text at each of PLACEMENTS."""
    placed: list[Placed | Reject] = []
    renders = (renderer.with_system, renderer.before_question, renderer.after_question)
    for placement, render in zip(PLACEMENTS, renders):
        for question in questions:
            try:
                rendering = render(question.text, system.text)
                placed.append(Placed(placement, question, rendering, align(question.base, rendering)))
            except PromptError as error:
                placed.append(question.reject(system.name, error))
    return placed


def compare_placements(
    reader: StateReader, name: str, placed: Sequence[Placed], baseline: Baseline, on_rows: OnRows | None = None
) -> list[dict[str, Any]]:
    """A record (see PLACEMENTS_SCHEMA) of each placement, compared with the question alone."""
    residual = COMPONENTS.index(RESIDUAL)
    records = []
    for placement in dict.fromkeys(one.placement for one in placed):
        chosen = [one for one in placed if one.placement == placement]
        rows = [baseline.row(one.question, one.rendering, one.alignment) for one in chosen]
        for one, reading in zip(chosen, reader.read(rows, on_rows)):
            before = baseline.states(one.question, one.alignment)
            change = relative_l2(before[:, :, residual], reading.states[:, :, residual]).mean(-1)
            output = _output_change(baseline.readings[one.question.number], reading)
            records.append(
                {
                    "system": name,
                    "placement": placement,
                    "prompt": one.question.number,
                    "id": one.question.id,
                    "residual_last": float(change[-1]),
                    "residual_question": float(change[:-1].mean()),
                    **{key: output[key] for key in ("kl", "top1_changed", "steps", "same_steps")},
                }
            )
    return records


def columns(text: str) -> list[tuple[str, pa.DataType]]:
    """Columns of a schema from "name type, name type, ...", types as pyarrow.type_for_alias has them."""
    return [(name, pa.type_for_alias(alias)) for name, alias in (column.split() for column in text.split(","))]


def schema(layers: int) -> pa.Schema:
    """Columns of a part; the shapes of lists are in the metadata."""
    lists = [(name, pa.list_(pa.float32())) for name in ("kl_steps", *_STATES)]
    shapes = {name: ["layers", "components"] for name in _STATES}
    metadata = {"layers": layers, "components": COMPONENTS, "shapes": shapes}
    return pa.schema([*_COLUMNS, *lists], metadata={b"headrift": json.dumps(metadata).encode()})


_COLUMNS = columns(
    "system string, prompt int32, id string, category string, comparison string, system_tokens int32, "
    "prompt_tokens int32, question_tokens int32, kl double, top1_changed bool, steps int16, same_steps int16"
)
CKA_SCHEMA = pa.schema(
    columns(
        "system string, comparison string, place string, layer int16, component string, cka double, by_chance double, "
        "prompts int32"
    )
)
PLACEMENTS_SCHEMA = pa.schema(
    columns(
        "system string, placement string, prompt int32, id string, residual_last double, residual_question double, "
        "kl double, top1_changed bool, steps int16, same_steps int16"
    )
)
