"""Runs with known truth, with texts and all that a report shows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrift import signal
from headrift.runs.parts import part_schema
from helpers.made_runs import labels, made_up

STEPS, LAYERS, HEADS = 8, 10, 4
WINDOW = signal.Window(2, 6)
NASTY = (
    '<script>document.title="taken over"</script><img src="https://example.invalid/x.png" onerror="alert(1)"> & "so"'
)
SYSTEM_PROMPT = "Never say the <b>secret</b> word."


def write_run(folder: Path, instability, label, *, window=WINDOW, save=("text",), n_steps=None, model="f", **columns):
    """A folder as `headrift score` leaves it; texts are NASTY with the row's number."""
    folder.mkdir(parents=True)
    n, rows, layers = instability.shape
    last = np.full(n, rows - 1) if n_steps is None else np.asarray(n_steps)
    random = np.random.default_rng(n)
    scores = [signal.score(one, window, n_steps=int(at)) for one, at in zip(instability, last)]
    schema = part_schema(save, layers=layers, heads=HEADS, regions=("system", "user", "prompt"))
    given = {
        "id": [f"{folder.name}-{i:03d}" for i in range(n)],
        "source": ["in.jsonl"] * n,
        "row": np.arange(1, n + 1),
        "label": list(label),
        "category": [None if one is None else ("direct", "hard_topic", "plain")[i % 3] for i, one in enumerate(label)],
        "group": [f"{i:016x}" for i in range(n)],
        "system_hash": ["0" * 16] * n,
        "score": [one.value for one in scores],
        "reason": [one.reason for one in scores],
        "n_steps": last,
        "n_scored": [one.n_scored for one in scores],
        "prompt_tokens": random.integers(20, 90, n),
        "answer_tokens": last + 1,
        "head_agreement": random.uniform(-1, 1, n),
        "entropy": random.uniform(0, 5, n),
        "flags": [["truncated"]] * n,
        "instability": [one[: at + 1].ravel() for one, at in zip(instability, last)],
        "prompt": [f"prompt {i} {NASTY}" for i in range(n)],
        "text": [f"answer {i} {NASTY}" for i in range(n)],
        **columns,
    }
    table = pa.table({name: given.get(name, pa.nulls(n, schema.field(name).type)) for name in schema.names})
    pq.write_table(table.cast(schema), folder / "part-00000.parquet")
    about = {
        "status": "done",
        "settings": {
            "steps": rows - 1,
            "window": str(window),
            "drop_shallow": 0.25,
            "drop_deep": 0.15,
            "replay": False,
            "save": list(save),
            "system_prompt": SYSTEM_PROMPT,
            "system_prompt_sha256": "5" * 64,
        },
        "versions": {"vllm": "0.32.0"},
        "model": {"path": "models/m", "fingerprint": model},
        "engine": {"dtype": "float32", "layers": layers, "heads": HEADS},
        "chat_template_sha256": "t" * 64,
        "inputs": [{"name": "logs/in.jsonl", "sha256": "a" * 64}],
    }
    (folder / "run.json").write_text(json.dumps(about))
    return folder


def made_run(folder: Path, n_attack=40, n_benign=70, effect=0.03, seed=0, **options) -> Path:
    """A run whose attacks have more instability in steps 3 to 5 of layers 4 to 6."""
    shape = {"steps": STEPS, "layers": LAYERS, "effect": effect, "window": (3, 5), "at": slice(4, 7)}
    values = made_up(seed, n_attack, n_benign, **shape)
    given = {"n_steps": [STEPS, STEPS, 1, 4, STEPS] * ((n_attack + n_benign) // 5), "label": labels(n_attack, n_benign)}
    return write_run(folder, values, **{**given, **options})
