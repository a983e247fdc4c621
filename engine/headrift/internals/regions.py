"""What the masses of attention say: by region and layer, over steps, and by head."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from headrift.internals.attention import KINDS, REGIONS
from headrift.internals.cases import CHECK
from headrift.internals.estimates import Figures, Floats, Prompts
from headrift.internals.tables import arrays, column

# Of those that a prompt has tokens of: `generated` grows with the steps.
_PER_TOKEN = len(REGIONS) - 1


@dataclass(frozen=True, slots=True)
class Regions:
    """rows: of the table, CHECK left out. mass: by kind, means over steps and heads, [layers, regions]; per_token: the
    same over what a token gets on average, regions but `generated`. by_step: mean over layers and heads, [steps,
    regions], over the answers that go on so long; answers: how many these are. by_head: mass on the system text, mean
    over steps, [layers, heads]. difference: of `system` per token, system prompt less neutral text, over layers."""

    rows: int
    mass: dict[str, Figures]
    per_token: dict[str, Figures]
    by_step: dict[str, Floats]
    answers: dict[str, list[int]]
    by_head: dict[str, Floats]
    difference: Figures


def regions(table: pa.Table, n_prompts: int, prompts: Prompts) -> Regions:
    """Of the rows of all parts."""
    about = json.loads(table.schema.metadata[b"headrift"])
    shape = about["layers"], about["heads"], len(REGIONS)
    kinds, names = (np.array(column(table, name)) for name in ("kind", "system"))
    own = names != CHECK
    number, tokens = np.array(column(table, "prompt")), np.array(column(table, "region_tokens"), float)
    lengths = np.array(column(table, "prompt_tokens"), float)
    masses = arrays(table, "mass")
    found: dict[str, dict[str, Floats]] = {name: {} for name in ("mass", "per_token", "by_step", "by_head")}
    answers: dict[str, list[int]] = {}
    rows = 0
    for kind in KINDS:
        mass, per_token = (np.zeros((n_prompts, shape[0], n)) for n in (len(REGIONS), _PER_TOKEN))
        counts, by_head = np.zeros(n_prompts), np.zeros(shape[:2])
        by_step: list[Floats] = []
        steps: list[int] = []
        for i in np.flatnonzero(own & (kinds == kind)):
            each = masses[i].astype(np.float64).reshape(-1, *shape)
            keys = lengths[i] + np.arange(len(each))
            mass[number[i]] += each.mean((0, 2))
            relative = each[..., :_PER_TOKEN] * keys[:, None, None, None] / tokens[i]
            per_token[number[i]] += relative.mean((0, 2))
            counts[number[i]] += 1
            by_head += each[..., 0].mean(0)
            for step, values in enumerate(each.mean((1, 2))):
                if step == len(by_step):
                    by_step.append(np.zeros(len(REGIONS)))
                    steps.append(0)
                by_step[step] += values
                steps[step] += 1
        rows += int(counts.sum())
        none = np.where(counts > 0, counts, np.nan)[:, None, None]
        found["mass"][kind], found["per_token"][kind] = mass / none, per_token / none
        found["by_step"][kind] = np.array(by_step) / np.array(steps)[:, None]
        found["by_head"][kind] = by_head / counts.sum()
        answers[kind] = steps
    system, neutral = (found["per_token"][kind][..., 0].mean(1) for kind in KINDS)
    return Regions(
        rows=rows,
        mass={kind: prompts.mean(values, rows // 2) for kind, values in found["mass"].items()},
        per_token={kind: prompts.mean(values, rows // 2) for kind, values in found["per_token"].items()},
        by_step=found["by_step"],
        answers=answers,
        by_head=found["by_head"],
        difference=prompts.mean(system - neutral, rows),
    )
