"""`headrift heads ships`: the scores of many queries into a folder, one file a query, taken up where it was left."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from headrift import ablation
from headrift.beside import written_beside
from headrift.corpus.fingerprints import model_fingerprint, versions
from headrift.model_facts import read_model
from headrift.preparing import load_tokenizer
from headrift.probed_engine import ProbedEngine
from headrift.safety_heads.figure import heatmap_png
from headrift.safety_heads.queries import CHAT, Query, prepare, read_rows
from headrift.safety_heads.ranking import RankedHead, agreement, rank
from headrift.safety_heads.ships import IN_FLIGHT, Head, all_heads, sampled_heads, ships

# --quick: so many heads, drawn at random, and the first so many queries.
QUICK_HEADS, QUICK_QUERIES = 64, 5
SETTINGS, _SCORES, _FIGURE = "ships.json", "scores", "heatmap.png"
_SCHEMA = pa.schema(
    [
        ("query", pa.int32()),
        ("id", pa.string()),
        ("label", pa.string()),
        ("category", pa.string()),
        ("layer", pa.int16()),
        ("head", pa.int16()),
        ("kl", pa.float64()),
    ]
)


class JobError(ValueError):
    """The job cannot be done as asked; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What `headrift heads ships` is asked for. heads: None for all; form: of queries.FORMS. label: only queries with
    this one; limit: the first so many of them. quick: QUICK_HEADS of the heads and QUICK_QUERIES of the queries."""

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


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job found. scores: [queries, layers, heads] in nats, NaN for heads that were not asked for; seconds: of
    the engine's work, without what an earlier run had done."""

    ranked: list[RankedHead]
    scores: NDArray[np.float64]
    agreement: float | None
    seconds: float


class ShipsJob:
    """Scores queries into the folder `asked.out`. What is wrong with what is asked shows before the model is loaded.

    ValueError (JobError, InputError, ModelError) and EngineError from the start. In the folder: `scores/`, a Parquet
    file a query with a row a head; `ships.json`, settings, versions and, at the end, the ranking; `heatmap.png`.
    """

    def __init__(self, asked: Asked):
        self.asked = asked
        facts = read_model(asked.model)
        if facts.layers is None or facts.heads is None:
            raise JobError(f"--model {asked.model}: its config.json does not say how many layers and heads it has")
        if asked.attention_backend == "flash":
            raise JobError(
                "heads are not ablated with the attention backend 'flash': leave it at auto, or use 'triton'"
            )
        self._shape = facts.layers, facts.heads
        self.heads = _heads(asked, *self._shape)
        ablation.check([(*head, asked.kind) for head in self.heads], asked.epsilon)
        limit = min(asked.limit or QUICK_QUERIES, QUICK_QUERIES) if asked.quick else asked.limit
        rows = read_rows(asked.inputs, asked.columns, asked.label, limit)
        self.queries = prepare(rows, load_tokenizer(str(asked.model), False), asked.form, asked.system_prompt)
        for query in self.queries:
            if facts.context is not None and len(query.token_ids) + 1 > facts.context:
                raise JobError(
                    f"query {query.id} has {len(query.token_ids)} tokens, and the model's context holds "
                    f"{facts.context}: leave it out"
                )
        self._begin()

    @property
    def done(self) -> set[int]:
        """The numbers of the queries whose scores are in the folder."""
        names = {_file(number): number for number in range(len(self.queries))}
        return {names[path.name] for path in (self.asked.out / _SCORES).glob("*.parquet") if path.name in names}

    def run(self, on_rows: Callable[[int], None] | None = None, verbose: bool = False) -> Outcome:
        """Score what is not yet scored, and write the ranking. on_rows: see `ships`."""
        asked, done = self.asked, self.done
        todo = [(number, query) for number, query in enumerate(self.queries) if number not in done]
        seconds = 0.0
        if todo:
            args = {} if asked.dtype == "auto" else {"dtype": asked.dtype}
            with ProbedEngine(
                asked.model,
                steps=0,
                regions=("system", "prompt"),
                attention_backend=asked.attention_backend,
                engine_args=args,
                verbose=verbose,
                ablation=True,
                references=IN_FLIGHT,
            ) as engine:
                begun = time.monotonic()
                ids = (query.token_ids for _, query in todo)
                with closing(ships(engine, ids, self.heads, asked.kind, asked.epsilon, on_rows)) as found:
                    for (number, query), scores in zip(todo, found, strict=True):
                        self._write(number, query, scores)
                seconds = time.monotonic() - begun
        return self._finish(seconds)

    def _begin(self) -> None:
        """Make the folder, or make sure that what lies in it was begun with the same settings."""
        out, settings = self.asked.out, self._settings()
        path = out / SETTINGS
        if path.exists() and not self.asked.resume:
            raise JobError(f"--out {out} has results already: give another folder, or --resume to go on with them")
        if path.exists():
            then = json.loads(path.read_text(encoding="utf-8"))["settings"]
            other = [key for key in settings if then.get(key) != settings[key]]
            if other:
                raise JobError(
                    f"--resume {out} was begun with another {', another '.join(other)}: ask for the same, "
                    "or give another folder"
                )
            return
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise JobError(f"--out {out} is not an empty folder: give another")
        (out / _SCORES).mkdir(parents=True)
        self._write_json({"settings": settings})

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

    def _write(self, number: int, query: Query, scores: NDArray[np.float64]) -> None:
        n, at = len(self.heads), np.array(self.heads)
        columns = [
            pa.array([number] * n, pa.int32()),
            *(pa.array([text] * n, pa.string()) for text in (query.id, query.label, query.category)),
            *(pa.array(at[:, axis], pa.int16()) for axis in (0, 1)),
            pa.array(scores[at[:, 0], at[:, 1]]),
        ]
        with written_beside(self.asked.out / _SCORES / _file(number)) as unfinished:
            pq.write_table(pa.Table.from_arrays(columns, schema=_SCHEMA), unfinished)

    def _finish(self, seconds: float) -> Outcome:
        scores = np.full((len(self.queries), *self._shape), np.nan)
        for number in range(len(self.queries)):
            table = pq.read_table(self.asked.out / _SCORES / _file(number))
            layers, heads, kl = (table[name].to_numpy() for name in ("layer", "head", "kl"))
            scores[number, layers, heads] = kl
        ranked, agreed = rank(scores), agreement(scores)
        labels = [query.label for query in self.queries]
        by_label = {
            label: [head.numbers() for head in rank(scores[[other == label for other in labels]])]
            for label in sorted({label for label in labels if label is not None})
        }
        self._write_json(
            {
                "settings": self._settings(),
                "about": {"model": str(self.asked.model), "inputs": list(self.asked.inputs), "versions": versions()},
                "engine_seconds": round(seconds, 2),
                "agreement_of_queries": agreed,
                "heads": [head.numbers() for head in ranked],
                "heads_by_label": by_label,
            }
        )
        n = len(self.queries)
        spread = scores.std(axis=0) if n > 1 else None
        title = f"SHIPS, {self.asked.kind}: {self.asked.model.name}, {n} {'query' if n == 1 else 'queries'}"
        heatmap_png(self.asked.out / _FIGURE, scores.mean(axis=0), spread, title=title)
        return Outcome(ranked, scores, agreed, seconds)

    def _write_json(self, value: dict[str, Any]) -> None:
        with written_beside(self.asked.out / SETTINGS) as unfinished:
            unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _file(number: int) -> str:
    return f"query-{number:05d}.parquet"


def _heads(asked: Asked, n_layers: int, n_heads: int) -> Sequence[Head]:
    """The heads to ablate; ValueError where the model has no such heads."""
    if asked.heads is not None:
        ablation.check_heads(asked.heads, n_layers, n_heads)
        return asked.heads
    return sampled_heads(n_layers, n_heads, QUICK_HEADS) if asked.quick else all_heads(n_layers, n_heads)
