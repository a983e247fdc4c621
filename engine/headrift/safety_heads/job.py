"""`headrift heads ships`: the scores of many queries into a folder, one file a query, taken up where it was left."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrift.safety_heads.base import FIGURE, HeadsJob
from headrift.safety_heads.figure import heatmap_png
from headrift.safety_heads.queries import Query
from headrift.safety_heads.ranking import RankedHead, agreement, rank
from headrift.safety_heads.ships import IN_FLIGHT, ships

SETTINGS = "ships.json"
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


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job found. scores: [queries, layers, heads] in nats, NaN for heads that were not asked for; seconds: of
    the engine's work, without what an earlier run had done."""

    ranked: list[RankedHead]
    scores: NDArray[np.float64]
    agreement: float | None
    seconds: float


class ShipsJob(HeadsJob):
    """Scores queries into the folder `asked.out`; errors from the start as in `HeadsJob`.

    In the folder: `scores/`, a Parquet file a query with a row a head; `ships.json`, settings, versions and, at the
    end, the ranking; `heatmap.png`.
    """

    json_name = SETTINGS

    @property
    def done(self) -> set[int]:
        """The numbers of the queries whose scores are in the folder."""
        missing = set(self._parts.missing(self._files))
        return {number for number, name in enumerate(self._files) if name not in missing}

    @property
    def _files(self) -> list[str]:
        return [_file(number) for number in range(len(self.queries))]

    def run(self, on_rows: Callable[[int], None] | None = None, verbose: bool = False) -> Outcome:
        """Score what is not yet scored, and write the ranking. on_rows: see `ships`."""
        asked, done = self.asked, self.done
        todo = [(number, query) for number, query in enumerate(self.queries) if number not in done]
        seconds = 0.0
        if todo:
            with self._engine(verbose, references=IN_FLIGHT) as engine:
                begun = time.monotonic()
                ids = (query.token_ids for _, query in todo)
                with closing(ships(engine, ids, self.heads, asked.kind, asked.epsilon, on_rows)) as found:
                    for (number, query), scores in zip(todo, found, strict=True):
                        self._write(number, query, scores)
                seconds = time.monotonic() - begun
        return self._finish(seconds)

    def _write(self, number: int, query: Query, scores: NDArray[np.float64]) -> None:
        n, at = len(self.heads), np.array(self.heads)
        columns = [
            pa.array([number] * n, pa.int32()),
            *(pa.array([text] * n, pa.string()) for text in (query.id, query.label, query.category)),
            *(pa.array(at[:, axis], pa.int16()) for axis in (0, 1)),
            pa.array(scores[at[:, 0], at[:, 1]]),
        ]
        self._parts.write(_file(number), pa.Table.from_arrays(columns, schema=_SCHEMA))

    def _finish(self, seconds: float) -> Outcome:
        scores = np.full((len(self.queries), *self._shape), np.nan)
        table = self._parts.read(self._files)
        assert table is not None
        numbers, layers, heads, kl = (table[name].to_numpy() for name in ("query", "layer", "head", "kl"))
        scores[numbers, layers, heads] = kl
        ranked, agreed = rank(scores), agreement(scores)
        labels = [query.label for query in self.queries]
        by_label = {
            label: [head.numbers() for head in rank(scores[[other == label for other in labels]])]
            for label in sorted({label for label in labels if label is not None})
        }
        self._parts.write_summary(
            {
                "engine_seconds": round(seconds, 2),
                "agreement_of_queries": agreed,
                "heads": [head.numbers() for head in ranked],
                "heads_by_label": by_label,
            }
        )
        panels = {"KL in nats, mean over the queries": scores.mean(axis=0)}
        if len(self.queries) > 1:
            panels["KL in nats, sd over the queries"] = scores.std(axis=0)
        heatmap_png(self.asked.out / FIGURE, panels, title=self._title("SHIPS"))
        return Outcome(ranked, scores, agreed, seconds)


def _file(number: int) -> str:
    return f"scores/query-{number:05d}.parquet"
