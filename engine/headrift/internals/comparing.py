"""What a system prompt changes: states inside a transformers model, and the next tokens' distributions.

States are read with forward hooks on the model's modules, so the numbers are the model's own. Tokens that all rows
start with run once; the rest is padded on the right, where by causality nothing attends to it, and positions are each
token's own: neither padding nor batch size changes a number beyond rounding.

The question alone answers once, greedily, for a few tokens. In all other renderings these tokens follow the prompt, so
one pass gives each rendering's distribution at every step, and how many tokens its own greedy answer shares: up to the
first step whose most likely token is another.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrift.consistency.models import batch_by_length, generate
from headrift.internals.cases import Alignment, Case, Question, Reject, Renderer, Rendering, SystemPrompt, align
from headrift.internals.estimates import cka_by_chance, cosine, gram, kl, linear_cka, relative_l2
from headrift.prompts import PromptError
from headrift.runs.folder import OnRows, columns, ignore_rows

if TYPE_CHECKING:
    import torch

RESIDUAL, ATTENTION, MLP = COMPONENTS = ("residual", "attention", "mlp")
_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
_MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
_BATCH_TOKENS = 2048  # padding included
_LEAST_PREFIX = 8  # with fewer tokens in common, a pass of their own is not worth it
# The two renderings of a comparison: none (the question alone), system prompt, neutral text.
SYSTEM, NEUTRAL, BEYOND = COMPARISONS = ("none_to_system", "none_to_neutral", "neutral_to_system")
# Where states are compared: at the last prompt token, and at the question's tokens that both renderings have (mean).
LAST, QUESTION = PLACES = ("last", "question")
# Where the text of a system prompt is put.
PLACEMENTS = ("system prompt", "before the question", "behind the question")
_STATES = tuple(f"{place}_{measure}" for place in PLACES for measure in ("cosine", "l2"))
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

States = NDArray[np.float32]
Record = dict[str, Any]


def schema(layers: int) -> pa.Schema:
    """Columns of a part; the shapes of lists are in the metadata."""
    lists = [(name, pa.list_(pa.float32())) for name in ("kl_steps", *_STATES)]
    shapes = {name: ["layers", "components"] for name in _STATES}
    metadata = {"layers": layers, "components": COMPONENTS, "shapes": shapes}
    return pa.schema([*_COLUMNS, *lists], metadata={b"headrift": json.dumps(metadata).encode()})


# States


class UnsupportedModelError(ValueError):
    """The model's layers, or their parts, are not found. The message names what the model has."""


@dataclass(frozen=True, slots=True)
class ForwardRow:
    """What goes in."""

    token_ids: Sequence[int] = field(repr=False)
    predict_at: Sequence[int]  # tokens at which the next token's distribution is read
    points: Sequence[int] = ()  # tokens at which states are read


@dataclass(frozen=True, slots=True)
class Reading:
    """What comes out."""

    states: States = field(repr=False)  # [points, layers, COMPONENTS, hidden]
    log_probs: States = field(repr=False)  # nats [predict_at, vocabulary]


class StateReader:
    """A causal language model of transformers, on a GPU if there is one. As a context manager it frees its memory.

    dtype: auto is float32, which the numbers' last digits need. UnsupportedModelError if its layers are not found.
    """

    def __init__(self, folder: Any, dtype: str = "auto") -> None:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32 if dtype == "auto" else getattr(torch, dtype)
        ).eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._modules = find_components(self.model)

    def __enter__(self) -> StateReader:
        return self

    def __exit__(self, *exc: object) -> None:
        del self.model, self._modules

    def read(
        self,
        rows: Sequence[ForwardRow],
        on_rows: OnRows = ignore_rows,
        batch_tokens: int = _BATCH_TOKENS,
        share: bool = True,
    ) -> list[Reading]:
        """Read each row, in order. share: run tokens that all rows start with once."""
        import torch

        readings: dict[int, Reading] = {}
        with torch.inference_mode():
            n_shared = _n_shared(rows) if share and len(rows) > 1 else 0
            n_shared = n_shared if n_shared >= _LEAST_PREFIX else 0
            shared = self._run_prefix(rows[0].token_ids[:n_shared]) if n_shared else None
            for batch in batch_by_length([len(row.token_ids) - n_shared for row in rows], batch_tokens):
                readings.update(zip(batch, self._read_batch([rows[i] for i in batch], shared, n_shared)))
                on_rows(len(batch))
        return [readings[i] for i in range(len(rows))]

    def _tensor(self, values: Any) -> torch.Tensor:
        import torch

        return torch.tensor(values, dtype=torch.long, device=self.model.device)

    def _run_prefix(self, ids: Sequence[int]) -> Any:
        from transformers import DynamicCache

        # Without the model's config every layer keeps all its keys; the mask decides which a query sees.
        cache = DynamicCache()
        self.model(self._tensor([list(ids)]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def _read_batch(self, rows: Sequence[ForwardRow], shared: Any, n_shared: int) -> list[Reading]:
        import torch

        lengths = [len(row.token_ids) - n_shared for row in rows]
        longest = max(lengths)
        ids = [[*row.token_ids[n_shared:], *[0] * (longest - n)] for row, n in zip(rows, lengths)]
        mask = [[1] * (n_shared + n) + [0] * (longest - n) for n in lengths]
        cache = None
        if shared is not None:
            cache = copy.deepcopy(shared)
            cache.batch_repeat_interleave(len(rows))
        at = [(i, point - n_shared) for i, row in enumerate(rows) for point in row.points]
        kept = sorted({place - n_shared for row in rows for place in row.predict_at})
        with self._hooked(self._tensor(at).reshape(-1, 2)) as states:
            logits = self.model(
                self._tensor(ids),
                attention_mask=self._tensor(mask),
                position_ids=self._tensor([range(n_shared, n_shared + longest)] * len(rows)),
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=self._tensor(kept),
            ).logits
        stacked = np.zeros((0, len(self._modules), len(COMPONENTS), 0), np.float32)
        if at:
            stacked = torch.stack([torch.stack(parts) for parts in states]).permute(2, 0, 1, 3).cpu().numpy()
        readings, first = [], 0
        for i, row in enumerate(rows):
            own_logits = logits[i, [kept.index(place - n_shared) for place in row.predict_at]].float()
            own_states = stacked[first : first + len(row.points)]
            readings.append(Reading(own_states, torch.log_softmax(own_logits, -1).cpu().numpy()))
            first += len(row.points)
        return readings

    @contextmanager
    def _hooked(self, at: torch.Tensor) -> Iterator[list[list[torch.Tensor]]]:
        """The modules' outputs at (row, place) pairs [n, 2]: by layer and component [n, hidden], float32."""
        states: list[list[Any]] = [[None] * len(COMPONENTS) for _ in self._modules]

        def keeper(layer: int, component: int) -> Callable[..., None]:
            def keep(module: Any, given: Any, out: Any) -> None:
                out = out[0] if isinstance(out, tuple) else out
                states[layer][component] = out[at[:, 0], at[:, 1]].float()

            return keep

        hooks = []
        try:
            if len(at):
                for layer, parts in enumerate(self._modules):
                    hooks += [part.register_forward_hook(keeper(layer, i)) for i, part in enumerate(parts)]
            yield states
        finally:
            for hook in hooks:
                hook.remove()


def find_components(model: Any) -> list[tuple[Any, Any, Any]]:
    """Each layer's modules whose outputs are COMPONENTS, the layer itself first. UnsupportedModelError without them."""

    def child(module: Any, names: Sequence[str]) -> Any:
        children = dict(module.named_children())
        return next((children[name] for name in names if name in children), None)

    n = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if type(m).__name__ == "ModuleList" and len(m) == n]
    layers = next((each for each in lists if child(each[0], _ATTENTION_NAMES) is not None), None)
    if layers is None:
        raise UnsupportedModelError(
            f"the model ({type(model).__name__}) has no list of {n} layers with an attention module named "
            f"{', '.join(_ATTENTION_NAMES)}: it is not a decoder whose layers can be read"
        )
    components = []
    for i, layer in enumerate(layers):
        attention, mlp = child(layer, _ATTENTION_NAMES), child(layer, _MLP_NAMES)
        if attention is None or mlp is None:
            names = ", ".join(name for name, _ in layer.named_children())
            raise UnsupportedModelError(f"layer {i} has no attention or MLP with a known name; it has: {names}")
        components.append((layer, attention, mlp))
    return components


def _n_shared(rows: Sequence[ForwardRow]) -> int:
    """How many tokens all rows start with, up to the first at which anything is read."""
    most = min(min((*row.points, *row.predict_at)) for row in rows)
    by_position = zip(*(row.token_ids[:most] for row in rows))
    return next((i for i, ids in enumerate(by_position) if len(set(ids)) > 1), most)


# Comparisons


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
        return _make_row(rendering, self.answers[question.number], points)


def read_baseline(
    reader: StateReader, tokenizer: Any, questions: Sequence[Question], steps: int, on_rows: OnRows = ignore_rows
) -> Baseline:
    """Let the questions alone answer `steps` tokens, or fewer if the answer ends, and read their states."""
    answers = generate(reader.model, tokenizer, [question.base.token_ids for question in questions], steps)
    bases = [question.base for question in questions]
    rows = [_make_row(base, answer, range(*base.question)) for base, answer in zip(bases, answers)]
    return Baseline(answers, reader.read(rows, on_rows))


def _make_row(rendering: Rendering, answer: Sequence[int], points: Sequence[int]) -> ForwardRow:
    """A rendering and an answer: states at these points and at the last prompt token, distributions from there on."""
    last = len(rendering.token_ids) - 1
    predict_at = tuple(range(last, last + max(1, len(answer))))
    return ForwardRow([*rendering.token_ids, *answer[:-1]], predict_at, (*points, last))


def compare(
    reader: StateReader, name: str, cases: Sequence[Case], baseline: Baseline, on_rows: OnRows = ignore_rows
) -> tuple[list[Record], list[Record]]:
    """Measure the cases of the system prompt `name`.

    Returns:
        Three records (see `schema`) for each case, none if its states are not all finite; and records (CKA_SCHEMA) of
        CKA over the cases.
    """
    system_rows = [baseline.row(case.question, case.system, case.system_alignment) for case in cases]
    neutral_rows = [baseline.row(case.question, case.neutral, case.neutral_alignment) for case in cases]
    records: list[Record] = []
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
            record = case.question.record(name) | {
                "category": case.question.category,
                "comparison": comparison,
                "system_tokens": case.system.system_tokens,
                "prompt_tokens": len(case.system.token_ids),
                "question_tokens": len(before) - 1,
            }
            records.append(record | _output_change(first, second) | _state_change(before, second.states))
            places[comparison].append([_by_place(states) for states in (before, second.states)])
    return records, [row for comparison in COMPARISONS for row in _cka(name, comparison, places[comparison])]


def _output_change(before: Reading, after: Reading) -> Record:
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


def _state_change(before: States, after: States) -> Record:
    """Columns on the states [layers, components]: at the last point, and the mean over all points before it."""
    changes = {"cosine": _by_place(cosine(before, after)), "l2": _by_place(relative_l2(before, after))}
    return {
        f"{place}_{measure}": values[i].astype(np.float32).ravel()
        for measure, values in changes.items()
        for i, place in enumerate(PLACES)
    }


def _by_place(values: NDArray[Any]) -> NDArray[Any]:
    """Values [points, ...] as [PLACES, ...]: of the last point, and the mean of the others."""
    return np.stack([values[-1], values[:-1].mean(0)])


def _cka(name: str, comparison: str, states: Sequence[Sequence[States]]) -> list[Record]:
    if len(states) < 3:  # with two examples every CKA is 1
        return []
    before, after = (gram(np.stack([pair[side] for pair in states])) for side in (0, 1))
    values, chance = linear_cka(before, after), cka_by_chance(before, after)
    about = {"system": name, "comparison": comparison, "prompts": len(states)}
    return [
        about
        | {"place": PLACES[i], "layer": layer, "component": COMPONENTS[j]}
        | {"cka": float(values[i, layer, j]), "by_chance": float(chance[i, layer, j])}
        for i, layer, j in np.ndindex(*values.shape)
    ]


class Placed(NamedTuple):
    """A system prompt's text somewhere in a question's prompt."""

    placement: str  # one of PLACEMENTS
    question: Question
    rendering: Rendering
    alignment: Alignment  # with the question alone


def make_placed(questions: Sequence[Question], system: SystemPrompt, renderer: Renderer) -> Iterator[Placed | Reject]:
    """Render each question with the text at each of PLACEMENTS."""

    def after(question: str, text: str) -> Rendering:
        return renderer.in_user_turn(question, after=text)

    renders: tuple[Callable[[str, str], Rendering], ...] = (renderer.with_system, renderer.in_user_turn, after)
    for placement, render in zip(PLACEMENTS, renders):
        for question in questions:
            try:
                rendering = render(question.text, system.text)
                yield Placed(placement, question, rendering, align(question.base, rendering))
            except PromptError as error:
                yield question.reject(system.name, error)


def compare_placements(
    reader: StateReader, name: str, placed: Sequence[Placed], baseline: Baseline, on_rows: OnRows = ignore_rows
) -> list[Record]:
    """A record (see PLACEMENTS_SCHEMA) of each placement, compared with the question alone."""
    residual = COMPONENTS.index(RESIDUAL)
    records = []
    for placement in PLACEMENTS:
        chosen = [one for one in placed if one.placement == placement]
        rows = [baseline.row(one.question, one.rendering, one.alignment) for one in chosen]
        for one, reading in zip(chosen, reader.read(rows, on_rows)):
            before = baseline.states(one.question, one.alignment)
            change = relative_l2(before[:, :, residual], reading.states[:, :, residual]).mean(-1)
            residuals = {"residual_last": float(change[-1]), "residual_question": float(change[:-1].mean())}
            output = _output_change(baseline.readings[one.question.number], reading)
            records.append(one.question.record(name) | {"placement": placement} | residuals | output)
    return records
