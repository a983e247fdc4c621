"""What a run saved of a row, measured over a window and step by step by the functions of `signal`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrift import signal
from headrift.calibration.runs import Run
from headrift.signal import ScoreRange

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

OWN = ("system_share", "head_agreement", "focus", "entropy")
_TENSORS = ("shares", "mass", "focus_heads", "entropy_steps")


@dataclass(frozen=True, slots=True)
class Saved:
    """What all runs have: columns that are not null throughout, and regions of the masses."""

    columns: frozenset[str]
    regions: frozenset[str]

    @property
    def mass(self) -> bool:
        """Whether shares can be had from masses."""
        return "mass" in self.columns and {"system", "prompt"} <= self.regions

    @property
    def bos(self) -> bool:
        """Whether they can be had with BOS left out."""
        return self.mass and "bos" in self.regions

    @property
    def focus_mass(self) -> bool:
        """Whether the focus of single heads can be had at each step."""
        return "mass" in self.columns and {"system", "user"} <= self.regions


@dataclass(frozen=True, slots=True)
class Row:
    """A row's own columns, NaN for null, and its arrays, float32, step 0 first: instability [rows, layers], shares
    [rows, layers, heads], mass [rows, layers, heads] by region, focus_heads [layers, heads], entropy_steps [rows]; None
    for those that were not read or are null."""

    own: dict[str, float]
    instability: NDArray[Any]
    shares: NDArray[Any] | None
    mass: dict[str, NDArray[Any]] | None
    focus_heads: NDArray[Any] | None
    entropy_steps: NDArray[Any] | None


@dataclass(frozen=True, slots=True)
class Measured:
    """values: by signal, those that can be had; steps: the same at each recorded step, NaN where none."""

    values: dict[str, float | None]
    steps: dict[str, Floats]


def saved(runs: Sequence[Run]) -> Saved:
    """What the runs have, by their first rows."""
    columns, regions = [], []
    for run in runs:
        batch = next(run.batches([*OWN, *_TENSORS]), None)
        if batch is not None:
            columns.append({name for name in batch.schema.names if batch.column(name).null_count < batch.num_rows})
            regions.append(set(_regions(batch)))
    return Saved(frozenset(set.intersection(*columns)), frozenset(set.intersection(*regions)))


def rows(runs: Sequence[Run], wanted: Ints, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    """The wanted rows (numbers over all runs, ascending): which of them, and what is in these columns."""
    first = 0
    for run in runs:
        layers, heads = run.model.layers, run.model.heads or 1
        for batch in run.batches(["instability", *columns]):
            start, stop = np.searchsorted(wanted, [first, first + batch.num_rows])
            if start < stop:
                at = {name: batch.column(name) for name in batch.schema.names}
                regions = _regions(batch)
                for of in range(start, stop):
                    yield of, _row(at, int(wanted[of]) - first, layers, heads, regions)
            first += batch.num_rows


def measure(row: Row, n_steps: int, cell: ScoreRange, chosen: Bools | None) -> Measured:
    """A row's signals over the cell's window and layers. chosen: the important heads [layers, heads], None for none."""
    window, layers = cell.window, slice(*cell.layers(row.instability.shape[1]))
    trims: dict[str, Any] = {"drop_shallow": cell.drop_shallow, "drop_deep": cell.drop_deep}
    counted = ~np.isnan(row.instability)
    values: dict[str, float | None] = {"instability": cell.score(row.instability, n_steps).value}
    steps = {"instability": _mean(row.instability[:, layers], counted[:, layers])}
    over: dict[str, Any] = {"n_steps": n_steps, "counted": counted, **trims}
    mass = row.mass or {}
    share = signal.share(mass["system"], mass["prompt"]) if {"system", "prompt"} <= mass.keys() else row.shares
    if share is not None:
        values["system_share"] = signal.mean_share(share, window, **over)
        values["head_agreement"] = signal.head_agreement(share, window, **over)
        steps["system_share"] = _mean(share[:, layers].mean(axis=2), counted[:, layers])
    if {"system", "prompt", "bos"} <= mass.keys():
        share = signal.share(mass["system"], np.maximum(mass["prompt"] - mass["bos"], 0))
        instability = np.where(counted, signal.instability(share), np.nan)
        values["system_share_without_bos"] = signal.mean_share(share, window, **over)
        values["instability_without_bos"] = cell.score(instability, n_steps).value
        steps["instability_without_bos"] = _mean(instability[:, layers], ~np.isnan(instability[:, layers]))
    if {"system", "user"} <= mass.keys():
        focus = signal.focus_heads(mass["system"], mass["user"])
        steps["focus"] = focus.mean(axis=(1, 2))
        if chosen is not None:
            steps["focus_important"] = focus[:, chosen].mean(axis=1)
    focus_heads = focus_at_0(row)
    if focus_heads is not None:
        values["focus"] = signal.focus(focus_heads)
        if chosen is not None:
            values["focus_important"] = signal.focus(focus_heads, np.argwhere(chosen).tolist())
    if row.entropy_steps is not None:
        values["entropy"] = signal.window_mean(row.entropy_steps, window, n_steps)
        steps["entropy"] = row.entropy_steps.astype(np.float64)
    return Measured(values, steps)


def focus_at_0(row: Row) -> NDArray[Any] | None:
    """The focus of single heads at step 0, [layers, heads]; None where it is not known."""
    if row.focus_heads is not None:
        return row.focus_heads
    mass = row.mass or {}
    return signal.focus_heads(mass["system"][0], mass["user"][0]) if {"system", "user"} <= mass.keys() else None


def _mean(values: NDArray[Any], counted: Bools) -> Floats:
    """Of each step over the counted layers; NaN where none counts."""
    n = counted.sum(axis=1)
    total = np.where(counted, values, 0).sum(axis=1, dtype=np.float64)
    return np.divide(total, n, out=np.full(len(n), np.nan), where=n > 0)


def _row(columns: dict[str, pa.Array], at: int, layers: int, heads: int, regions: Sequence[str]) -> Row:
    def flat(name: str) -> NDArray[Any] | None:
        value = columns[name][at] if name in columns else None
        return value.values.to_numpy(zero_copy_only=False) if value is not None and value.is_valid else None

    def number(name: str) -> float:
        value = columns[name][at].as_py() if name in columns else None
        return np.nan if value is None else float(value)

    instability, shares, mass, focus_heads = (flat(name) for name in ("instability", "shares", "mass", "focus_heads"))
    by_region = None
    if mass is not None:
        per_head = mass.reshape(-1, layers, heads, len(regions))
        by_region = {name: per_head[..., place] for place, name in enumerate(regions)}
        # A region that the prompt does not have is NaN throughout.
        by_region = {name: of for name, of in by_region.items() if not np.isnan(of[0, 0, 0])}
    return Row(
        own={name: number(name) for name in OWN},
        instability=np.empty((0, layers), np.float32) if instability is None else instability.reshape(-1, layers),
        shares=None if shares is None else shares.astype(np.float32).reshape(-1, layers, heads),
        mass=by_region,
        focus_heads=None if focus_heads is None else focus_heads.reshape(layers, heads),
        entropy_steps=flat("entropy_steps"),
    )


def _regions(batch: pa.RecordBatch) -> list[str]:
    about = (batch.schema.metadata or {}).get(b"headrift")
    return list(json.loads(about)["regions"]) if about else []
