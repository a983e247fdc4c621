"""Runs with known truth: made-up instability in the form that calibration reads, in memory or as a folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrift import signal
from headrift.runs.parts import part_schema
from headrift.runs.reading import ModelIdentity, ScoreRun
from headrift.signal import ScoreRange, Window
from headrift.signals import signals

# Benign instability: MEAN + a row's own part + noise in each cell, all Gaussian: a score's distribution is known.
MEAN, ROW_SD, CELL_SD = 0.2, 0.01, 0.03


def made_up(seed, n_attack, n_benign, *, steps=6, layers=8, effect=0.0, window=(1, 6), at=slice(None)):
    """Instability [rows, steps + 1, layers] of attacks, then benign; the attacks' is higher by `effect` in the window
    and layers."""
    random = np.random.default_rng(seed)
    n = n_attack + n_benign
    values = MEAN + ROW_SD * random.standard_normal((n, 1, 1))
    values = values + CELL_SD * random.standard_normal((n, steps + 1, layers))
    values[:n_attack, window[0] : window[1] + 1, at] += effect
    return values.astype(np.float32)


def score_sd(cell: ScoreRange, layers: int) -> float:
    """Of a benign score in a cell."""
    start, end = cell.layers(layers)
    cells = (cell.window.end - cell.window.start + 1) * (end - start)
    return float(np.hypot(ROW_SD, CELL_SD / np.sqrt(cells)))


def columns_of(instability, label, group=None, category=None, n_steps=None, **others):
    """The columns of a part. n_steps: where answers ended early."""
    n, rows, _layers = instability.shape
    n_steps = np.full(n, rows - 1) if n_steps is None else np.asarray(n_steps)
    group = np.arange(n) if group is None else group
    return {
        "label": list(label),
        "category": [None] * n if category is None else list(category),
        "group": [f"{at:016x}" for at in group],
        "system_hash": ["0" * 16] * n,
        "score": pa.nulls(n, pa.float64()),
        "n_steps": n_steps,
        "prompt_tokens": np.arange(n) % 7,
        "answer_tokens": n_steps + 1,
        **{entry.name: pa.nulls(n, pa.float64()) for entry in signals(column=True, compared=True)},
        "instability": [row[: last + 1].ravel() for row, last in zip(instability, n_steps)],
        **others,
    }


def labels(n_attack, n_benign):
    return ["attack"] * n_attack + ["benign"] * n_benign


def run_of(instability, label, name="made-up", regions=(), **columns) -> ScoreRun:
    """A run in memory. columns: see columns_of; regions: of the column `mass`."""
    table = pa.table(columns_of(instability, label, **columns))
    table = table.replace_schema_metadata({b"headrift": json.dumps({"regions": list(regions)})})
    steps, layers = instability.shape[1] - 1, instability.shape[2]
    identity = {"fingerprint": "f", "dtype": "float32", "layers": layers, "heads": 4, "chat_template_sha256": "t"}

    def batches(names):
        yield from table.select([name for name in names if name in table.column_names]).to_batches(max_chunksize=64)

    return ScoreRun(name, ModelIdentity(name="m", **identity), steps, ScoreRange(Window(1, steps)), False, batches)


def write_about(folder: Path, steps: int, layers: int, heads: int = 4, status="done", fingerprint="f") -> None:
    """run.json, as far as calibration reads it."""
    about = {
        "status": status,
        "settings": {
            "steps": steps,
            "window": str(Window(1, steps)),
            "drop_shallow": 0.25,
            "drop_deep": 0.15,
            "replay": False,
        },
        "model": {"path": "models/m", "fingerprint": fingerprint},
        "engine": {"dtype": "float32", "layers": layers, "heads": heads},
        "chat_template_sha256": "t",
    }
    (folder / "run.json").write_text(json.dumps(about))


def write_run(folder: Path, instability, label, status="done", fingerprint="f", save=(), **columns) -> Path:
    """A folder as `headrift score --save ...` leaves it, as far as calibration reads it; 4 heads."""
    folder.mkdir()
    steps, layers = instability.shape[1] - 1, instability.shape[2]
    schema = part_schema(save, layers=layers, heads=4, regions=("system", "user", "prompt"))
    given = columns_of(instability, label, **columns)
    table = pa.table({name: given.get(name, pa.nulls(len(label), schema.field(name).type)) for name in schema.names})
    half = len(label) // 2
    for at, part in enumerate((table[:half], table[half:])):
        pq.write_table(part.cast(schema), folder / f"part-{at:05d}.parquet", row_group_size=50)
    write_about(folder, steps, layers, status=status, fingerprint=fingerprint)
    return folder


REGIONS = ("system", "user", "prompt", "bos")


def masses(seed, n, *, steps=6, layers=8, heads=4):
    """Attention masses [n, steps + 1, layers, heads, regions] in which nothing is to be found."""
    random = np.random.default_rng(seed)
    system, user, bos = random.uniform(0.05, 0.3, (3, n, steps + 1, layers, heads))
    return np.stack([system, user, system + user + bos + 0.05, bos], axis=-1).astype(np.float32)


def run_with_mass(mass, label, *, n_steps=None, save=("mass", "focus_heads"), counted=True, **columns) -> ScoreRun:
    """A run whose instability, where it is counted, shares and focus are those of the masses."""
    system, user, prompt = (mass[..., REGIONS.index(name)] for name in ("system", "user", "prompt"))
    share = signal.share(system, prompt)
    n_steps = np.full(len(mass), mass.shape[1] - 1) if n_steps is None else np.asarray(n_steps)
    arrays = {
        "mass": [row[: last + 1].ravel() for row, last in zip(mass, n_steps)],
        "shares": [row[: last + 1].astype(np.float16).ravel() for row, last in zip(share, n_steps)],
        "focus_heads": [row.astype(np.float32).ravel() for row in signal.focus_heads(system, user)[:, 0]],
    }
    saved = {name: arrays[name] for name in save}
    instability = np.where(counted, signal.instability(share), np.nan).astype(np.float32)
    return run_of(instability, label, regions=REGIONS, n_steps=n_steps, **{**saved, **columns})


def run_of_patterns(
    seed,
    n_attack,
    n_benign,
    *,
    layers=28,
    heads=12,
    effect=0.0,
    at=(),
    source=None,
    sign=None,
    name="made-up",
    **columns,
) -> ScoreRun:
    """A run of step 0 alone with normal log-odds of shares, higher by `effect` in attacks at the (layer, head) pairs.

    source: each row's; sign: [rows] what the effect is multiplied by.
    """
    random = np.random.default_rng(seed)
    n = n_attack + n_benign
    log_odds = random.standard_normal((n, 1, layers, heads))
    shift = effect * (np.arange(n) < n_attack) * (1 if sign is None else np.asarray(sign))
    for layer, head in at:
        log_odds[:, 0, layer, head] += shift
    instability = signal.instability(1 / (1 + np.exp(-log_odds))).astype(np.float32)
    if source is not None:
        columns["source_set"] = list(source)
    kept = [row.astype(np.float16).ravel() for row in log_odds]
    given = {
        "logit_shares": kept,
        "system_tokens": np.full(n, 20),
        "prompt_tokens": random.integers(40, 80, n),
        **columns,
    }
    given = {name: column for name, column in given.items() if column is not None}
    run = run_of(instability, labels(n_attack, n_benign), name, **given)
    return replace(run, model=run.model.model_copy(update={"heads": heads}))


def write_patterns(folder: Path, *args, layers=6, heads=4, **options) -> Path:
    """The folder of `run_of_patterns`, with the ids r0, r1, ..."""
    folder.mkdir()
    run = run_of_patterns(*args, layers=layers, heads=heads, **options)
    schema = part_schema(("text",), layers=layers, heads=heads, regions=("system", "user", "prompt"))
    table = pa.Table.from_batches(run.batches(schema.names))
    n = len(table)
    given = {
        "id": [f"r{number}" for number in range(n)],
        "source": ["in.jsonl"] * n,
        "row": np.arange(1, n + 1),
        "reason": [signal.NO_WINDOW] * n,
        "n_scored": np.zeros(n, int),
        "flags": [[]] * n,
        "text": [""] * n,
        **{name: table[name] for name in table.column_names},
    }
    table = pa.table({name: given.get(name, pa.nulls(n, schema.field(name).type)) for name in schema.names})
    pq.write_table(table.cast(schema), folder / "part-00000.parquet")
    write_about(folder, 0, layers, heads)
    return folder
