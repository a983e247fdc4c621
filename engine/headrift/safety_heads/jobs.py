"""Jobs of `headrift heads ships` and `sahara`: queries and heads in, a folder of results out, resumable."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrift import ablation
from headrift.figures import new_figure, save, short
from headrift.model_facts import read_shape
from headrift.prepare import load_tokenizer
from headrift.probed_engine import ProbedEngine
from headrift.runs.folder import ResumableParts, model_fingerprint, versions
from headrift.safety_heads.queries import CHAT, Query, check_lengths, prepare, read_rows
from headrift.safety_heads.ranking import SAHARA_FILE, SHIPS_FILE, RankedHead, agreement, rank
from headrift.safety_heads.sahara import (
    Angles,
    HeadAngles,
    Step,
    SubspaceProbe,
    check_r_main,
    check_steps,
    hidden_states_for,
    sahara,
)
from headrift.safety_heads.ships import IN_FLIGHT, Head, all_heads, sampled_heads, ships

# --quick: heads drawn at random, and first queries.
QUICK_HEADS, QUICK_QUERIES = 64, 5
HEATMAP = "heatmap.png"
_SHIPS_SCHEMA = pa.schema(
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
_SAHARA_SCHEMA = pa.schema(
    [
        ("step", pa.int16()),
        ("layer", pa.int16()),
        ("head", pa.int16()),
        ("angle", pa.float64()),
        ("angles", pa.list_(pa.float64())),
    ]
)
OnRows = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class HeadsConfig:
    """Options of `headrift heads ships` and `sahara`."""

    inputs: tuple[str, ...]
    model: Path
    out: Path
    kind: str = ablation.UNDIFFERENTIATED
    epsilon: float = ablation.EPSILON
    heads: tuple[Head, ...] | None = None  # to ablate; None for all
    quick: bool = False  # only QUICK_HEADS of the heads and QUICK_QUERIES of the queries
    label: str | None = None  # only queries with this label
    limit: int | None = None  # first queries
    form: str = CHAT  # one of queries.FORMS
    system_prompt: str | None = None
    columns: Mapping[str, str] | None = None
    dtype: str = "auto"
    attention_backend: str = "auto"
    resume: bool = False
    steps: int = 2  # of sahara: heads of the group
    r_main: int = 1  # of sahara: directions, see `instruments.hidden_states`


class HeadsJob:
    """Queries, heads and folder of a job. ValueError if the config cannot be used, before the model is loaded."""

    result_file: ClassVar[str]

    def __init__(self, config: HeadsConfig):
        self.config = config
        facts, n_layers, n_heads = read_shape(config.model)
        self._shape = n_layers, n_heads
        self.heads = _chosen_heads(config, n_layers, n_heads)
        ablation.check([(*head, config.kind) for head in self.heads], config.epsilon)
        limit = min(config.limit or QUICK_QUERIES, QUICK_QUERIES) if config.quick else config.limit
        rows = read_rows(config.inputs, config.columns, config.label, limit)
        self.queries = prepare(rows, load_tokenizer(str(config.model), False), config.form, config.system_prompt)
        check_lengths(self.queries, facts, 1)
        self._check()
        about = {"model": str(config.model), "inputs": list(config.inputs), "versions": versions()}
        self._parts = ResumableParts(config.out, self.result_file, self._settings(), about, resume=config.resume)

    def _check(self) -> None:
        """Raise ValueError if this kind of job cannot use the config."""

    def _settings(self) -> dict[str, Any]:
        config = self.config
        tokens = hashlib.sha256(json.dumps([query.token_ids for query in self.queries]).encode())
        return {
            "model": model_fingerprint(config.model)["fingerprint"],
            "kind": config.kind,
            "epsilon": config.epsilon,
            "heads": " ".join(f"{layer}:{head}" for layer, head in self.heads),
            "queries": len(self.queries),
            "tokens of the queries": tokens.hexdigest(),
            "dtype": config.dtype,
        }

    def _engine(self, verbose: bool, **kept: int) -> ProbedEngine:
        config = self.config
        return ablating_engine(config.model, config.dtype, config.attention_backend, verbose, **kept)

    def _heatmap(self, panels: Mapping[str, NDArray[np.float64]], name: str) -> None:
        n = len(self.queries)
        title = f"{name}, {self.config.kind}: {self.config.model.name}, {n} {'query' if n == 1 else 'queries'}"
        heatmap_png(self.config.out / HEATMAP, panels, title=title)


def ablating_engine(
    model: Path, dtype: str, attention_backend: str, verbose: bool, references: int = 0, hidden_states: int = 0
) -> ProbedEngine:
    """An engine whose requests may ablate heads and record step 0 only."""
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


def _chosen_heads(config: HeadsConfig, n_layers: int, n_heads: int) -> Sequence[Head]:
    """The heads to ablate; ValueError if the model does not have one."""
    if config.heads is not None:
        ablation.check_heads(config.heads, n_layers, n_heads)
        return config.heads
    return sampled_heads(n_layers, n_heads, QUICK_HEADS) if config.quick else all_heads(n_layers, n_heads)


@dataclass(frozen=True, slots=True)
class ShipsResult:
    """Results of a job. scores: [queries, layers, heads] in nats, NaN for heads that were not ablated. seconds: in the
    engine, without those of earlier runs."""

    ranked: list[RankedHead]
    scores: NDArray[np.float64]
    agreement: float | None
    seconds: float


class ShipsJob(HeadsJob):
    """Scores queries into the folder: scores/ (a Parquet file per query, a row per head), ships.json (settings,
    versions and the ranking) and heatmap.png."""

    result_file = SHIPS_FILE

    @property
    def done(self) -> int:
        """Number of queries whose scores are in the folder."""
        return len(self.queries) - len(self._parts.missing(self._names))

    @property
    def _names(self) -> list[str]:
        return [f"scores/query-{i:05d}.parquet" for i in range(len(self.queries))]

    def run(self, on_rows: OnRows | None = None, verbose: bool = False) -> ShipsResult:
        """Score the missing queries and write the ranking. on_rows: see `ships`."""
        config, seconds = self.config, 0.0
        missing = set(self._parts.missing(self._names))
        todo = [(i, name) for i, name in enumerate(self._names) if name in missing]
        if todo:
            with self._engine(verbose, references=IN_FLIGHT) as engine:
                begin = time.monotonic()
                prompts = (self.queries[i].token_ids for i, _ in todo)
                with closing(ships(engine, prompts, self.heads, config.kind, config.epsilon, on_rows)) as scores:
                    for (i, name), of_query in zip(todo, scores, strict=True):
                        self._parts.write(name, self._part(i, self.queries[i], of_query))
                seconds = time.monotonic() - begin
        return self._finish(seconds)

    def _part(self, i: int, query: Query, scores: NDArray[np.float64]) -> pa.Table:
        n, heads = len(self.heads), np.array(self.heads)
        columns = [
            pa.array([i] * n, pa.int32()),
            *(pa.array([text] * n, pa.string()) for text in (query.id, query.label, query.category)),
            *(pa.array(heads[:, axis], pa.int16()) for axis in (0, 1)),
            pa.array(scores[heads[:, 0], heads[:, 1]]),
        ]
        return pa.Table.from_arrays(columns, schema=_SHIPS_SCHEMA)

    def _finish(self, seconds: float) -> ShipsResult:
        table = self._parts.read(self._names)
        assert table is not None
        scores = np.full((len(self.queries), *self._shape), np.nan)
        query, layer, head, kl = (table[name].to_numpy() for name in ("query", "layer", "head", "kl"))
        scores[query, layer, head] = kl
        ranked, agreed = rank(scores), agreement(scores)
        labels = np.array([query.label for query in self.queries])
        by_label = {
            label: [asdict(head) for head in rank(scores[labels == label])]
            for label in sorted({query.label for query in self.queries if query.label is not None})
        }
        self._parts.write_summary(
            {
                "engine_seconds": round(seconds, 2),
                "agreement_of_queries": agreed,
                "heads": [asdict(head) for head in ranked],
                "heads_by_label": by_label,
            }
        )
        panels = {"KL in nats, mean over the queries": scores.mean(axis=0)}
        if len(self.queries) > 1:
            panels["KL in nats, sd over the queries"] = scores.std(axis=0)
        self._heatmap(panels, "SHIPS")
        return ShipsResult(ranked, scores, agreed, seconds)


@dataclass(frozen=True, slots=True)
class SaharaResult:
    """Results of a job. seconds: in the engine, without those of earlier runs."""

    steps: list[Step]
    seconds: float


class SaharaJob(HeadsJob):
    """Searches into the folder: angles/ (Parquet, a row per step and head), sahara.json (settings, versions, the chosen
    heads and the ranking of each step) and heatmap.png (of step 1). It may be resumed with more steps."""

    result_file = SAHARA_FILE

    def _check(self) -> None:
        check_r_main(self.config.r_main, [query.token_ids for query in self.queries])
        check_steps(self.config.steps, self.heads)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "r_main": self.config.r_main}

    @property
    def known(self) -> list[dict[Head, Angles]]:
        """The angles in the folder, of steps 1, 2, ..."""
        known: list[dict[Head, Angles]] = [{} for _ in range(self.config.steps)]
        table = self._parts.read(self._parts.written("angles/*.parquet"))
        for row in [] if table is None else table.to_pylist():
            if row["step"] <= len(known):
                known[row["step"] - 1][row["layer"], row["head"]] = np.array(row["angles"])
        return known

    @property
    def angles_left(self) -> int:
        """Number of heads, over all steps, whose angles are not in the folder."""
        return sum(len(self.heads) - step - len(angles) for step, angles in enumerate(self.known))

    @property
    def rows(self) -> int:
        """Number of requests left to run: one per head and query, and the clean ones."""
        left = self.angles_left
        return (left + 1) * len(self.queries) if left else 0

    def run(self, on_rows: OnRows | None = None, verbose: bool = False) -> SaharaResult:
        """Continue the search and write its results. on_rows: see `SubspaceProbe`."""
        config, seconds = self.config, 0.0
        if self.angles_left:
            prompts = [query.token_ids for query in self.queries]
            with self._engine(verbose, hidden_states=hidden_states_for(len(prompts))) as engine:
                begin = time.monotonic()
                probe = SubspaceProbe(engine, prompts, config.r_main, config.kind, config.epsilon, on_rows)
                steps = sahara(probe, self.heads, config.steps, self.known, self._write)
                seconds = time.monotonic() - begin
        else:
            steps = [Step.from_angles(angles) for angles in self.known]
        self._parts.write_summary(
            {
                "engine_seconds": round(seconds, 2),
                "heads": [_to_json(step, i, step.chosen) for i, step in enumerate(steps, 1)],
                "steps": [[_to_json(step, i, head) for i, head in enumerate(step.ranking, 1)] for step in steps],
            }
        )
        single = np.full(self._shape, np.nan)
        for head, angles in steps[0].angles.items():
            single[head] = angles.sum()
        self._heatmap({"angle in degrees": single}, "Generalised SHIPS")
        return SaharaResult(steps, seconds)

    def _write(self, step: int, angles: HeadAngles) -> None:
        rows = [
            {"step": step, "layer": layer, "head": head, "angle": float(own.sum()), "angles": own.tolist()}
            for (layer, head), own in angles.items()
        ]
        layer, head = next(iter(angles))
        self._parts.write_records(f"angles/step-{step:02d}-from-{layer}-{head}.parquet", rows, _SAHARA_SCHEMA)


def _to_json(step: Step, place: int, head: Head) -> dict[str, object]:
    angles = step.angles[head]
    about = {"rank": place, "layer": head[0], "head": head[1]}
    return {**about, "angle": float(angles.sum()), "angles": angles.tolist()}


def sahara_table(steps: list[Step], top: int) -> str:
    """The chosen heads, and the first `top` heads of step 1, as text of at most 80 columns."""
    lines = ["step  layer  head  angle (degrees)  next best"]
    for number, step in enumerate(steps, 1):
        (layer, head), *others = step.ranking
        second = f"{others[0][0]}:{others[0][1]} {step.angles[others[0]].sum():.4f}" if others else "none"
        lines.append(f"{number:>4}  {layer:>5}  {head:>4}  {step.angles[layer, head].sum():>15.4f}  {second}")
    lines += ["", "rank  layer  head  angle (degrees) of the head alone"]
    for place, (layer, head) in enumerate(steps[0].ranking[:top], 1):
        lines.append(f"{place:>4}  {layer:>5}  {head:>4}  {steps[0].angles[layer, head].sum():>15.4f}")
    return "\n".join(lines)


def heatmap_png(path: Path, panels: Mapping[str, NDArray[np.float64]], *, title: str) -> None:
    """Draw scores [layers, heads], by the colour bar's label, on logarithmic scales; NaN is hatched."""
    from matplotlib.colors import LogNorm

    layers, heads = next(iter(panels.values())).shape
    figure = new_figure(1.2 + len(panels) * max(3.2, 0.22 * heads + 1.8), max(3.2, 0.17 * layers + 1.4))
    for axes, (label, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        positive = values[np.isfinite(values) & (values > 0)]
        # Heads span many orders of magnitude; below a millionth of the largest score nothing is to be told apart.
        most = float(positive.max()) if positive.size else 1.0
        least = min(max(float(positive.min()) if positive.size else most / 10, most * 1e-6), most / 10)
        axes.patch.set(hatch="xx", edgecolor="#999999", facecolor="white")
        shown = np.ma.masked_invalid(np.where(np.isfinite(values), np.maximum(values, least), np.nan))
        image = axes.imshow(shown, aspect="auto", interpolation="nearest", cmap="viridis", norm=LogNorm(least, most))
        axes.set(xlabel="head", ylabel="layer (0: nearest the input)")
        axes.locator_params(integer=True)
        figure.colorbar(image, ax=axes, label=label)
    figure.suptitle(short(title, 90), fontsize=10, parse_math=False, wrap=True)
    save(figure, path)
