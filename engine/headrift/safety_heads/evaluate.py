"""`headrift heads evaluate`: do a model's refusals hang on chosen heads, and what else does?

The same queries are answered greedily by the model as it is, with the chosen heads ablated together, and, several
times, with as many others drawn at random. A neutral text is read in each of these arms. Nothing of the model changes,
and no answer is kept unless that is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrift import ablation
from headrift.corpus.rows import Row
from headrift.model_facts import read_shape
from headrift.preparing import load_tokenizer
from headrift.requests import Finished
from headrift.runs.folder import JobError, atomic_path, new_folder, write_json
from headrift.runs.provenance import model_fingerprint, versions
from headrift.safety_heads.answering import answers, log_likelihoods
from headrift.safety_heads.arms import (
    ABLATED,
    ATTACK,
    CHANGED_WITHIN,
    CLEAN,
    CONTROL,
    AgainstControls,
    Arm,
    Seen,
    against_controls,
    figures,
    panels,
)
from headrift.safety_heads.bars import bars_png
from headrift.safety_heads.base import ablating_engine
from headrift.safety_heads.checks import check_lengths
from headrift.safety_heads.leading import leading_heads
from headrift.safety_heads.queries import CHAT, prepare, read_rows
from headrift.safety_heads.refusals import is_refusal
from headrift.safety_heads.ships import Head, all_heads

# --quick: so many queries of a label, tokens of an answer, draws of other heads, passages of the neutral text.
QUICK_QUERIES, QUICK_TOKENS, QUICK_DRAWS, QUICK_PASSAGES = 5, 32, 1, 4
SETTINGS, _ANSWERS, _FIGURE = "evaluate.json", "answers.parquet", "arms.png"
_SCHEMA = pa.schema(
    [
        ("query", pa.int32()),
        ("id", pa.string()),
        ("label", pa.string()),
        ("category", pa.string()),
        ("arm", pa.string()),
        ("refused", pa.bool_()),
        ("answer_tokens", pa.int32()),
        ("same_tokens", pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True)
class Asked:
    """What `headrift heads evaluate` is asked for.

    heads, or run (a folder of `ships` or `sahara`) and top, its first so many heads. kind, epsilon: as the run's, or
    the defaults, where not given. tokens: of an answer, at most. draws: of other heads, with this seed. limit: the
    first so many queries of each label. labels: one per input, for queries that bring none. form: of queries.FORMS.
    """

    inputs: tuple[str, ...]
    model: Path
    out: Path
    heads: tuple[Head, ...] | None = None
    run: Path | None = None
    top: int | None = None
    kind: str | None = None
    epsilon: float | None = None
    tokens: int = 64
    draws: int = 3
    seed: int = 0
    limit: int | None = None
    quick: bool = False
    labels: tuple[str, ...] | None = None
    form: str = CHAT
    system_prompt: str | None = None
    columns: Mapping[str, str] | None = None
    dtype: str = "auto"
    attention_backend: str = "auto"
    keep_completions: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job found; controls: by label. seconds: of the engine's work."""

    arms: list[Arm]
    controls: dict[str, AgainstControls]
    seconds: float


class EvaluateJob:
    """Evaluates chosen heads into the folder `asked.out`. What is wrong with what is asked shows before the model is
    loaded: ValueError (JobError, InputError, ModelError). EngineError from the start of the engine.

    In the folder: `evaluate.json`, settings, versions and all figures; `answers.parquet`, a row a query and arm;
    `arms.png`.
    """

    def __init__(self, asked: Asked):
        self.asked = asked
        facts, layers, heads = read_shape(asked.model)
        self.heads, self.kind, self.epsilon = _chosen(asked)
        ablation.check([(*head, self.kind) for head in self.heads], self.epsilon)
        ablation.check_heads(self.heads, layers, heads)
        self.tokens = min(asked.tokens, QUICK_TOKENS) if asked.quick else asked.tokens
        draws = min(asked.draws, QUICK_DRAWS) if asked.quick else asked.draws
        self.arms = {
            CLEAN: (),
            ABLATED: self.heads,
            **_controls(self.heads, all_heads(layers, heads), draws, asked.seed),
        }
        limit = min(asked.limit or QUICK_QUERIES, QUICK_QUERIES) if asked.quick else asked.limit
        rows = _of_each_label(read_rows(asked.inputs, asked.columns, labels=asked.labels), limit)
        self._tokenizer = load_tokenizer(str(asked.model), False)
        self.queries = prepare(rows, self._tokenizer, asked.form, asked.system_prompt)
        self.labels = [str(query.label) for query in self.queries]
        check_lengths(self.queries, facts, self.tokens)
        self.passages = neutral_text(self._tokenizer)[: QUICK_PASSAGES if asked.quick else None]
        if facts.context is not None and max(map(len, self.passages)) >= facts.context:
            raise JobError(f"--model {asked.model}: its context of {facts.context} is too short for the neutral text")
        new_folder(asked.out)

    @property
    def rows(self) -> int:
        """How many rows the engine will run."""
        return len(self.arms) * (len(self.queries) + len(self.passages))

    def run(self, on_rows: Callable[[int], None] | None = None, verbose: bool = False) -> Outcome:
        """Answer, read, and write what was found. on_rows: told how many rows have run, again and again."""
        asked = self.asked
        ablated = {name: [(*head, self.kind) for head in heads] for name, heads in self.arms.items()}
        with ablating_engine(asked.model, asked.dtype, asked.attention_backend, verbose) as engine:
            begun = time.monotonic()
            prompts = [query.token_ids for query in self.queries]
            answered = answers(engine, prompts, ablated, self.tokens, self.epsilon, on_rows)
            read = log_likelihoods(engine, self.passages, ablated, self.epsilon, on_rows)
            seconds = time.monotonic() - begun
        texts = [
            {arm: self._tokenizer.decode(done.answer_ids, skip_special_tokens=True) for arm, done in of.items()}
            for of in answered
        ]
        seen = {}
        for name, heads in self.arms.items():
            same = [_same(of[name], of[CLEAN]) for of in answered]
            seen[name] = Seen(
                heads=heads,
                refused=np.array([is_refusal(of[name]) for of in texts]),
                same_tokens=np.array(same),
                changed=np.array([_changed(of[name], of[CLEAN]) for of in answered]),
                log_likelihood=read[name],
            )
        lengths = np.array([len(ids) - 1.0 for ids in self.passages])
        found = Outcome(figures(seen, self.labels, lengths), against_controls(seen, self.labels), seconds)
        self._write(found, seen, answered, texts)
        return found

    def _write(
        self,
        found: Outcome,
        seen: Mapping[str, Seen],
        answered: Sequence[Mapping[str, Finished]],
        texts: Sequence[Mapping[str, str]],
    ) -> None:
        asked = self.asked
        rows = []
        for number, query in enumerate(self.queries):
            for arm, of in seen.items():
                row = {
                    **{"query": number, "id": query.id, "label": query.label, "category": query.category, "arm": arm},
                    "refused": bool(of.refused[number]),
                    "answer_tokens": len(answered[number][arm].answer_ids),
                    "same_tokens": int(of.same_tokens[number]),
                }
                rows.append(row | ({"text": texts[number][arm]} if asked.keep_completions else {}))
        schema = _SCHEMA.append(pa.field("text", pa.string())) if asked.keep_completions else _SCHEMA
        with atomic_path(asked.out / _ANSWERS) as unfinished:
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), unfinished)
        write_json(asked.out / SETTINGS, self._numbers(found))
        heads = ", ".join(f"{layer}:{head}" for layer, head in self.heads)
        title = f"{asked.model.name}, {self.kind}: {len(self.heads)} heads together ({heads})"
        bars_png(asked.out / _FIGURE, [arm.name for arm in found.arms], panels(found.arms), title=title)

    def _numbers(self, found: Outcome) -> dict[str, Any]:
        asked = self.asked
        return {
            "settings": {
                "model": model_fingerprint(asked.model)["fingerprint"],
                "heads": [list(head) for head in self.heads],
                "heads_from": None if asked.run is None else {"run": str(asked.run), "top": len(self.heads)},
                "kind": self.kind,
                "epsilon": self.epsilon,
                "tokens": self.tokens,
                "changed_within": CHANGED_WITHIN,
                "draws": len(self.arms) - 2,
                "seed": asked.seed,
                "queries": {label: self.labels.count(label) for label in sorted(set(self.labels))},
                "passages": len(self.passages),
                "as": asked.form,
                "system_prompt": asked.system_prompt,
                "dtype": asked.dtype,
            },
            "about": {"model": str(asked.model), "inputs": list(asked.inputs), "versions": versions()},
            "engine_seconds": round(found.seconds, 2),
            "arms": {arm.name: arm.numbers() for arm in found.arms},
            "refused_against_controls": {label: asdict(of) for label, of in found.controls.items()},
        }


def neutral_text(tokenizer: Any) -> list[list[int]]:
    """The token ids of the passages of a text that nobody would refuse to read, written for this project."""
    text = (files("headrift.safety_heads") / "neutral.txt").read_text(encoding="utf-8")
    return [list(tokenizer(passage)["input_ids"]) for passage in text.strip().split("\n\n")]


def _chosen(asked: Asked) -> tuple[tuple[Head, ...], str, float]:
    """The heads to ablate, and how. JobError where it is not clear which."""
    kind, epsilon = asked.kind or ablation.UNDIFFERENTIATED, ablation.EPSILON
    if asked.run is not None and asked.heads is not None:
        raise JobError("--heads and --from are two ways to choose heads: give one of them")
    if asked.run is None and asked.top is not None:
        raise JobError("--top says how many heads of a run are taken: give the run's folder too, --from RUN")
    if asked.run is not None:
        leading = leading_heads(asked.run, asked.top)
        if asked.top is None:
            raise JobError(f"--from {asked.run} found {leading.of} heads: say how many to take, as in --top 5")
        heads, kind, epsilon = leading.heads, asked.kind or leading.kind, leading.epsilon
    elif asked.heads:
        heads = asked.heads
    else:
        raise JobError(
            "no head is given to ablate: name some (--heads 3:0,11:7), or a run of ships (--from RUN --top 5)"
        )
    return heads, kind, epsilon if asked.epsilon is None else asked.epsilon


def _controls(heads: Sequence[Head], every: Sequence[Head], draws: int, seed: int) -> dict[str, tuple[Head, ...]]:
    """Arms with as many heads, drawn from the others."""
    others = [head for head in every if head not in heads]
    if draws and len(others) < len(heads):
        raise JobError(
            f"{len(heads)} heads are ablated and the model has {len(others)} others, too few to compare with: take "
            "fewer, or --draws 0"
        )
    random = np.random.default_rng(seed)
    found = {}
    for draw in range(draws):
        drawn = random.choice(len(others), len(heads), replace=False)
        found[f"{CONTROL} {draw + 1}"] = tuple(others[at] for at in sorted(drawn.tolist()))
    return found


def _of_each_label(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """The first so many rows of each label. JobError where a row has none, and where none is an attack."""
    counted: dict[str, int] = {}
    kept = []
    for row in rows:
        if row.label is None:
            raise JobError(
                f"{row.source}, row {row.row}: it has no label: say whether it is to be refused, with a column label "
                "(attack or benign) or for a file's rows together, as in --labels attack"
            )
        counted[row.label] = counted.get(row.label, 0) + 1
        if limit is None or counted[row.label] <= limit:
            kept.append(row)
    if ATTACK not in counted:
        raise JobError("no query is labelled attack: without queries to refuse there is nothing to evaluate")
    return kept


def _same(answer: Finished, clean: Finished) -> int:
    """How many leading tokens an answer shares with the clean one."""
    pairs = zip(answer.answer_ids, clean.answer_ids)
    return next(
        (at for at, (one, other) in enumerate(pairs) if one != other),
        min(len(answer.answer_ids), len(clean.answer_ids)),
    )


def _changed(answer: Finished, clean: Finished) -> bool:
    return answer.answer_ids[:CHANGED_WITHIN] != clean.answer_ids[:CHANGED_WITHIN]
