"""`headrift heads sahara`: a search for a group of heads into a folder, taken up where it was left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrift.safety_heads import base
from headrift.safety_heads.figure import heatmap_png
from headrift.safety_heads.sahara import (
    Angles,
    AnglesOf,
    Step,
    Turning,
    check_r_main,
    check_steps,
    hidden_states_of,
    sahara,
)
from headrift.safety_heads.ships import Head

SETTINGS = "sahara.json"
_SCHEMA = pa.schema(
    [
        ("step", pa.int16()),
        ("layer", pa.int16()),
        ("head", pa.int16()),
        ("angle", pa.float64()),
        ("angles", pa.list_(pa.float64())),
    ]
)


@dataclass(frozen=True, slots=True)
class Asked(base.Asked):
    """What `headrift heads sahara` is asked for. steps: heads of the group; r_main: see `headrift.subspace`."""

    steps: int = 2
    r_main: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job found. seconds: of the engine's work, without what an earlier run had done."""

    steps: list[Step]
    seconds: float


class SaharaJob(base.HeadsJob):
    """Searches in the folder `asked.out`; errors from the start as in `HeadsJob`.

    In the folder: `angles/`, Parquet files with a row for a step and head; `sahara.json`, settings, versions and, at
    the end, the chosen heads and the ranking of each step; `heatmap.png`, of step 1. More steps than before may be
    asked for when it is taken up again.
    """

    json_name = SETTINGS
    asked: Asked

    def _check(self) -> None:
        check_r_main(self.asked.r_main, [query.token_ids for query in self.queries])
        check_steps(self.asked.steps, self.heads)

    def _settings(self) -> dict[str, object]:
        return {**super()._settings(), "r_main": self.asked.r_main}

    @property
    def known(self) -> list[dict[Head, Angles]]:
        """The angles in the folder, of steps 1, 2, ..."""
        known: list[dict[Head, Angles]] = [{} for _ in range(self.asked.steps)]
        table = self._parts.read(self._parts.written("angles/*.parquet"))
        for row in table.to_pylist() if table is not None else ():
            if row["step"] <= len(known):
                known[row["step"] - 1][row["layer"], row["head"]] = np.array(row["angles"])
        return known

    @property
    def angles_left(self) -> int:
        """How many heads' angles are not in the folder, of all steps."""
        return sum(len(self.heads) - step - len(angles) for step, angles in enumerate(self.known))

    @property
    def rows(self) -> int:
        """Rows that have yet to run: a head and a query each, and the clean ones."""
        left = self.angles_left
        return (left + 1) * len(self.queries) if left else 0

    def run(self, on_rows: Callable[[int], None] | None = None, verbose: bool = False) -> Outcome:
        """Search on, and write what was found. on_rows: see `Turning`."""
        asked, seconds = self.asked, 0.0
        if not self.angles_left:
            return self._finish([Step.of(angles) for angles in self.known], seconds)
        queries = [query.token_ids for query in self.queries]
        with self._engine(verbose, hidden_states=hidden_states_of(len(queries))) as engine:
            begun = time.monotonic()
            turning = Turning(engine, queries, asked.r_main, asked.kind, asked.epsilon, on_rows)
            steps = sahara(turning, self.heads, asked.steps, self.known, self._write)
            seconds = time.monotonic() - begun
        return self._finish(steps, seconds)

    def _write(self, step: int, found: AnglesOf) -> None:
        rows = [
            {"step": step, "layer": layer, "head": head, "angle": float(angles.sum()), "angles": angles.tolist()}
            for (layer, head), angles in found.items()
        ]
        layer, head = next(iter(found))
        self._parts.write_records(f"angles/step-{step:02d}-from-{layer}-{head}.parquet", rows, _SCHEMA)

    def _finish(self, steps: list[Step], seconds: float) -> Outcome:
        self._parts.write_summary(
            {
                "engine_seconds": round(seconds, 2),
                "heads": [_numbers(step, i, step.chosen) for i, step in enumerate(steps, 1)],
                "steps": [[_numbers(step, rank, head) for rank, head in enumerate(step.ranking, 1)] for step in steps],
            }
        )
        single: NDArray[np.float64] = np.full(self._shape, np.nan)
        for head, angles in steps[0].angles.items():
            single[head] = angles.sum()
        heatmap_png(self.asked.out / base.FIGURE, {"angle in degrees": single}, title=self._title("Generalised SHIPS"))
        return Outcome(steps, seconds)


def _numbers(step: Step, rank: int, head: Head) -> dict[str, object]:
    """A head of a step, as JSON."""
    angles = step.angles[head]
    return {
        "rank": rank, "layer": head[0], "head": head[1], "angle": float(angles.sum()), "angles": angles.tolist()
    }  # fmt: skip


def table(steps: list[Step], top: int) -> str:
    """The chosen heads, and the first heads of step 1, in 80 columns."""
    lines = ["step  layer  head  angle (degrees)  next best"]
    for number, step in enumerate(steps, 1):
        (layer, head), *others = step.ranking
        second = f"{others[0][0]}:{others[0][1]} {step.angles[others[0]].sum():.4f}" if others else "none"
        lines.append(f"{number:>4}  {layer:>5}  {head:>4}  {step.angles[layer, head].sum():>15.4f}  {second}")
    lines += ["", "rank  layer  head  angle (degrees) of the head alone"]
    for rank, (layer, head) in enumerate(steps[0].ranking[:top], 1):
        lines.append(f"{rank:>4}  {layer:>5}  {head:>4}  {steps[0].angles[layer, head].sum():>15.4f}")
    return "\n".join(lines)
