"""What `headrift heads ships` and `sahara` share: what is asked for, queries and heads, the results' folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from headrift import ablation
from headrift.model_facts import read_shape
from headrift.preparing import load_tokenizer
from headrift.probed_engine import ProbedEngine
from headrift.runs.provenance import model_fingerprint, versions
from headrift.runs.resumable import ResumableParts
from headrift.safety_heads.checks import check_lengths
from headrift.safety_heads.queries import CHAT, prepare, read_rows
from headrift.safety_heads.ships import Head, all_heads, sampled_heads

# --quick: so many heads, drawn at random, and the first so many queries.
QUICK_HEADS, QUICK_QUERIES = 64, 5
FIGURE = "heatmap.png"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a job is asked for. heads: None for all; form: of queries.FORMS. label: only queries with this one; limit:
    the first so many of them. quick: QUICK_HEADS of the heads and QUICK_QUERIES of the queries."""

    inputs: tuple[str, ...]
    model: Path
    out: Path
    kind: str = ablation.UNDIFFERENTIATED
    epsilon: float = ablation.EPSILON
    heads: tuple[Head, ...] | None = None
    quick: bool = False
    label: str | None = None
    limit: int | None = None
    form: str = CHAT
    system_prompt: str | None = None
    columns: Mapping[str, str] | None = None
    dtype: str = "auto"
    attention_backend: str = "auto"
    resume: bool = False


class HeadsJob:
    """Queries, heads and the folder `asked.out`. What is wrong with what is asked shows before the model is loaded.

    ValueError (JobError, InputError, ModelError) and EngineError from the start. A subclass names its JSON file, with
    settings, versions and, at the end, what was found.
    """

    json_name: ClassVar[str]

    def __init__(self, asked: Asked):
        self.asked = asked
        facts, layers, heads = read_shape(asked.model)
        self._shape = layers, heads
        self.heads = _heads(asked, *self._shape)
        ablation.check([(*head, asked.kind) for head in self.heads], asked.epsilon)
        limit = min(asked.limit or QUICK_QUERIES, QUICK_QUERIES) if asked.quick else asked.limit
        rows = read_rows(asked.inputs, asked.columns, asked.label, limit)
        self.queries = prepare(rows, load_tokenizer(str(asked.model), False), asked.form, asked.system_prompt)
        check_lengths(self.queries, facts, 1)
        self._check()
        about = {"model": str(asked.model), "inputs": list(asked.inputs), "versions": versions()}
        self._parts = ResumableParts(asked.out, self.json_name, self._settings(), about, resume=asked.resume)

    def _check(self) -> None:
        """JobError for what only this job cannot do."""

    def _engine(self, verbose: bool, references: int = 0, hidden_states: int = 0) -> ProbedEngine:
        asked = self.asked
        return ablating_engine(
            asked.model,
            asked.dtype,
            asked.attention_backend,
            verbose,
            references=references,
            hidden_states=hidden_states,
        )

    def _settings(self) -> dict[str, Any]:
        asked = self.asked
        tokens = hashlib.sha256(json.dumps([query.token_ids for query in self.queries]).encode())
        return {
            "model": model_fingerprint(asked.model)["fingerprint"],
            "kind": asked.kind,
            "epsilon": asked.epsilon,
            "heads": " ".join(f"{layer}:{head}" for layer, head in self.heads),
            "queries": len(self.queries),
            "tokens of the queries": tokens.hexdigest(),
            "dtype": asked.dtype,
        }

    def _title(self, what: str) -> str:
        n = len(self.queries)
        return f"{what}, {self.asked.kind}: {self.asked.model.name}, {n} {'query' if n == 1 else 'queries'}"


def ablating_engine(
    model: Path, dtype: str, attention_backend: str, verbose: bool, references: int = 0, hidden_states: int = 0
) -> ProbedEngine:
    """An engine whose requests may ablate heads and record step 0 alone."""
    return ProbedEngine(
        model,
        steps=0,
        regions=("system", "prompt"),
        attention_backend=attention_backend,
        engine_args={} if dtype == "auto" else {"dtype": dtype},
        verbose=verbose,
        ablation=True,
        references=references,
        hidden_states=hidden_states,
    )


def _heads(asked: Asked, n_layers: int, n_heads: int) -> Sequence[Head]:
    """The heads to ablate; ValueError where the model has no such heads."""
    if asked.heads is not None:
        ablation.check_heads(asked.heads, n_layers, n_heads)
        return asked.heads
    return sampled_heads(n_layers, n_heads, QUICK_HEADS) if asked.quick else all_heads(n_layers, n_heads)
