"""What was measured, as arrays [prompts, system prompts, ...]; NaN where a prompt has no row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrift.internals.cases import CHECK
from headrift.internals.comparing import COMPARISONS, PLACES
from headrift.internals.components import COMPONENTS, RESIDUAL
from headrift.internals.estimates import Floats

_NUMBERS = ("kl", "top1_changed", "same_steps", "steps", "system_tokens")


@dataclass(frozen=True, slots=True)
class Compared:
    """systems: their names, CHECK the last. numbers: by comparison and column [prompts, systems]. states: by comparison
    and column, as in comparing.schema, [prompts, systems, layers, components]."""

    systems: list[str]
    prompts: int
    layers: int
    numbers: dict[tuple[str, str], Floats]
    states: dict[tuple[str, str], Floats]

    @classmethod
    def of(cls, table: pa.Table, n_prompts: int) -> Compared:
        """Of the rows of all parts."""
        about = json.loads(table.schema.metadata[b"headrift"])
        systems = list(dict.fromkeys(table["system"].to_pylist()))
        shape = (n_prompts, len(systems))
        place = (np.array(table["prompt"]), np.array([systems.index(name) for name in table["system"].to_pylist()]))
        which = np.array(table["comparison"].to_pylist())
        numbers, states = {}, {}
        deep = (about["layers"], len(COMPONENTS))
        for comparison in COMPARISONS:
            mine = which == comparison
            at = tuple(axis[mine] for axis in place)
            for column in _NUMBERS:
                values = np.full(shape, np.nan)
                values[at] = np.array(table[column].to_pylist(), float)[mine]
                numbers[comparison, column] = values
            for column in about["shapes"]:
                values = np.full((*shape, *deep), np.nan)
                lists = table[column].combine_chunks().values.to_numpy().reshape(-1, *deep)
                values[at] = lists[mine]
                states[comparison, column] = values
        return cls(systems, n_prompts, about["layers"], numbers, states)

    @property
    def own(self) -> list[int]:
        """The numbers of the system prompts but CHECK."""
        return [i for i, name in enumerate(self.systems) if name != CHECK]

    @property
    def rows(self) -> int:
        """Prompts under system prompts, CHECK left out."""
        return int(np.isfinite(self.numbers[COMPARISONS[0], "kl"][:, self.own]).sum())

    def effect(self, measure: str, comparison: str) -> Floats:
        """[prompts, systems] of one of MEASURES."""
        if measure == "kl":
            return self.numbers[comparison, "kl"]
        place = measure.removeprefix("residual_")
        assert place in PLACES
        return self.states[comparison, f"{place}_l2"][..., COMPONENTS.index(RESIDUAL)].mean(-1)


# How much a system prompt changes, three ways, and their words.
MEASURES = {
    "kl": "next-token KL (nats)",
    "residual_last": "relative change of the residual stream at the last prompt token, mean over layers",
    "residual_question": "relative change of the residual stream at the question's tokens, mean over layers",
}


def column(table: pa.Table, name: str) -> list[Any]:
    """A column's values."""
    values: list[Any] = table[name].to_pylist()
    return values


def arrays(table: pa.Table, name: str) -> list[NDArray[Any]]:
    """A column of lists, an array a row."""
    return [chunk[i].values.to_numpy() for chunk in table[name].chunks for i in range(len(chunk))]


def grid(table: pa.Table, value: str, prompts: Sequence[int], **only: str) -> Floats:
    """One number a prompt: the mean of its rows' values, of rows with these values; NaN where it has none."""
    keep = np.ones(table.num_rows, bool)
    for name, wanted in only.items():
        keep &= np.array(column(table, name)) == wanted
    values, of = np.array(column(table, value), float), np.array(column(table, "prompt"))
    return np.array([values[keep & (of == p)].mean() if (keep & (of == p)).any() else np.nan for p in prompts])
