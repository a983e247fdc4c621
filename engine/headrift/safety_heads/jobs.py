"""Jobs of `headrift heads ships` and `sahara`: queries and heads in, a folder of results out, resumable."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from headrift import ablation
from headrift.corpus import sources
from headrift.corpus.readers import Reader
from headrift.corpus.rows import BadRow, Row
from headrift.corpus.sources import InputError
from headrift.figures import new_figure, save, short
from headrift.model_facts import ModelFacts, read_shape
from headrift.prepare import load_tokenizer
from headrift.probed_engine import ProbedEngine
from headrift.prompts import chat_messages
from headrift.runs.folder import JobError, OnRows, ResumableParts, columns, ignore_rows, model_fingerprint, versions
from headrift.safety_heads import sahara
from headrift.safety_heads.overlap import QUERY_HASHES, SAHARA_FILE, SHIPS_FILE
from headrift.safety_heads.ships import IN_FLIGHT, Head, RankedHead, agreement, all_heads, rank, sampled_heads, ships
from headrift.stats import Floats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# --quick: heads drawn at random, and first queries (of each label, in an evaluation).
QUICK_HEADS, QUICK_QUERIES = 64, 5
# How a query is put to the model: as a user message in its chat template, in the form that the paper's released code
# gives base models, or as plain text.
CHAT, QUERY, TEXT = FORMS = ("chat", "query", "text")
_QUERY = "## Query:{query} \n## Answer:"
# The column of a query in public sets (maliciousinstruct.csv, advbench.csv, jailbreakbench.csv).
_PUBLIC_COLUMN = "input"
_SHIPS_SCHEMA = pa.schema(
    columns("query int32, id string, label string, category string, layer int16, head int16, kl double")
)
_SAHARA_SCHEMA = pa.schema(
    [*columns("step int16, layer int16, head int16, angle double"), ("angles", pa.list_(pa.float64()))]
)


@dataclass(frozen=True, slots=True)
class QueriesConfig:
    """Options of all jobs that put queries to a model with ablated heads."""

    inputs: tuple[str, ...]
    model: Path
    out: Path
    heads: tuple[Head, ...] | None = None  # to ablate; None: see the job
    limit: int | None = None  # first queries (of each label, in an evaluation)
    quick: bool = False  # fewer of everything, as the QUICK_... constants say
    form: str = CHAT  # one of FORMS
    system_prompt: str | None = None
    columns: Mapping[str, str] | None = None
    dtype: str = "auto"
    attention_backend: str = "auto"

    @property
    def n_queries(self) -> int | None:
        """How many queries to read at most; None for all."""
        return min(self.limit or QUICK_QUERIES, QUICK_QUERIES) if self.quick else self.limit


@dataclass(frozen=True, slots=True)
class HeadsConfig(QueriesConfig):
    """Options of `headrift heads ships` and `sahara`; `heads` None is all of them, or QUICK_HEADS of them."""

    kind: str = ablation.UNDIFFERENTIATED
    epsilon: float = ablation.EPSILON
    label: str | None = None  # only queries with this label
    resume: bool = False
    steps: int = 2  # of sahara: heads of the group
    r_main: int = 1  # of sahara: directions, see `instruments.hidden_states`


@dataclass(frozen=True, slots=True)
class Query:
    """A query's token ids, with the label and category of its row (None if it has none)."""

    id: str
    label: str | None
    category: str | None
    token_ids: list[int] = field(repr=False)
    text_hash: str  # see `text_hash`


def read_rows(
    inputs: Sequence[str],
    columns: Mapping[str, str] | None = None,
    label: str | None = None,
    limit: int | None = None,
    labels: Sequence[str] | None = None,
) -> list[Row]:
    """Read the rows of input files; a column `input` is a prompt. InputError if there is none, or one is malformed.

    Args:
        columns: what the files call a key.
        label, limit: only the first rows with this label.
        labels: one per input, for rows without a label.
    """
    files = sources.find(inputs, labels)
    try:
        reader = Reader(files, columns)
    except InputError as error:
        try:
            reader = Reader(files, columns or {"prompt": _PUBLIC_COLUMN})
        except InputError:
            raise error from None  # which names the missing key
    rows: list[Row] = []
    for row in reader.rows():
        if limit is not None and len(rows) == limit:
            break
        if isinstance(row, BadRow):
            raise InputError(f"{row.source}, row {row.row}: {row.detail}")
        if label in (None, row.label):
            rows.append(row)
    if not rows:
        what = "query" if label is None else f"query with the label {label}"
        raise InputError(f"{', '.join(inputs)}: no {what}; give a file with at least one")
    return rows


def prepare(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, form: str = CHAT, system_prompt: str | None = None
) -> list[Query]:
    """Render rows to token ids; chats without a system prompt get this one. InputError if a row cannot be rendered."""
    return [
        Query(row.id, row.label, row.category, _token_ids(row, tokenizer, form, system_prompt), text_hash(row))
        for row in rows
    ]


def text_hash(row: Row) -> str:
    """Hash of what a query says, without its system prompt; the same whatever the case and white space."""
    prompt = row.prompt
    messages = prompt.messages or chat_messages(prompt.prompt or "", None)
    texts = [message.get("content") for message in messages if message.get("role") not in ("system", "developer")]
    content = texts if prompt.token_ids is None else prompt.token_ids
    text = " ".join(json.dumps(list(content), ensure_ascii=False).casefold().split())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _token_ids(row: Row, tokenizer: Any, form: str, system_prompt: str | None) -> list[int]:
    import jinja2

    prompt = row.prompt
    if prompt.token_ids is not None:
        return list(prompt.token_ids)
    if form != CHAT:
        if prompt.prompt is None:
            raise InputError(f"{row.source}, row {row.row}: it has messages, which --as {form} cannot use")
        text = _QUERY.format(query=prompt.prompt) if form == QUERY else prompt.prompt
        return list(tokenizer(text)["input_ids"])
    messages = [dict(message) for message in prompt.messages or chat_messages(prompt.prompt or "", None)]
    system = prompt.system if prompt.system is not None else system_prompt
    if system is not None and messages[0].get("role") not in ("system", "developer"):
        messages = [{"role": "system", "content": system}, *messages]
    try:
        rendered: list[int] = tokenizer.apply_chat_template(
            messages, tools=prompt.tools, add_generation_prompt=True, return_dict=False
        )
    except (ValueError, TypeError, jinja2.TemplateError) as error:
        raise InputError(
            f"{row.source}, row {row.row}: the model's chat template rejects it ({error}); "
            f"use --as {QUERY} or --as {TEXT} for a model without one"
        ) from error
    return rendered


def check_lengths(queries: Sequence[Query], facts: ModelFacts, answer_tokens: int) -> None:
    """Raise JobError if a query and its answer exceed the model's context."""
    for query in queries:
        n = len(query.token_ids) + answer_tokens
        if facts.context is not None and n > facts.context:
            raise JobError(
                f"query {query.id}: {len(query.token_ids)} tokens and an answer of {answer_tokens} exceed the model's "
                f"context of {facts.context:,} tokens; leave the query out"
            )


def ablating_engine(config: QueriesConfig, verbose: bool, **kept: int) -> ProbedEngine:
    """An engine whose requests may ablate heads and record step 0 only. kept: what its options say is kept."""
    return ProbedEngine(
        config.model,
        steps=0,
        regions=("system", "prompt"),
        attention_backend=config.attention_backend,
        engine_args={} if config.dtype == "auto" else {"dtype": config.dtype},
        verbose=verbose,
        ablation=True,
        **kept,  # type: ignore[arg-type]
    )


class HeadsJob:
    """Queries, heads and folder of a job. ValueError if the config cannot be used, before the model is loaded."""

    result_file: ClassVar[str]

    def __init__(self, config: HeadsConfig):
        self.config = config
        facts, n_layers, n_heads = read_shape(config.model)
        self._shape = n_layers, n_heads
        every = sampled_heads(*self._shape, QUICK_HEADS) if config.quick else all_heads(*self._shape)
        self.heads: Sequence[Head] = every if config.heads is None else config.heads
        ablation.check_heads(self.heads, *self._shape)
        ablation.check([(*head, config.kind) for head in self.heads], config.epsilon)
        rows = read_rows(config.inputs, config.columns, config.label, config.n_queries)
        self.queries = prepare(rows, load_tokenizer(str(config.model), False), config.form, config.system_prompt)
        check_lengths(self.queries, facts, 1)
        about = {
            "model": str(config.model),
            "inputs": list(config.inputs),
            QUERY_HASHES: [query.text_hash for query in self.queries],
            "versions": versions(),
        }
        self._parts = ResumableParts(config.out, self.result_file, self._settings(), about, resume=config.resume)

    def _settings(self) -> dict[str, Any]:
        """What determines the numbers. ValueError if this kind of job cannot use the config."""
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

    def _draw_heatmaps(self, panels: Mapping[str, Floats], name: str) -> None:
        """Draw scores [layers, heads], by the colour bar's label, on logarithmic scales; NaN is hatched."""
        from matplotlib.colors import LogNorm

        layers, heads = self._shape
        figure = new_figure(1.2 + len(panels) * max(3.2, 0.22 * heads + 1.8), max(3.2, 0.17 * layers + 1.4))
        for axes, (label, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
            positive = values[np.isfinite(values) & (values > 0)]
            # Heads span many orders of magnitude; below a millionth of the largest score nothing is to be told apart.
            most = float(positive.max(initial=0.0)) or 1.0
            least = min(max(float(positive.min(initial=most)), most * 1e-6), most / 10)
            axes.patch.set(hatch="xx", edgecolor="#999999", facecolor="white")
            shown = np.ma.masked_invalid(np.maximum(values, least))
            image = axes.imshow(
                shown, aspect="auto", interpolation="nearest", cmap="viridis", norm=LogNorm(least, most)
            )
            axes.set(xlabel="head", ylabel="layer (0: nearest the input)")
            axes.locator_params(integer=True)
            figure.colorbar(image, ax=axes, label=label)
        n = len(self.queries)
        title = f"{name}, {self.config.kind}: {self.config.model.name}, {n} {'query' if n == 1 else 'queries'}"
        figure.suptitle(short(title, 90), fontsize=10, parse_math=False, wrap=True)
        save(figure, self.config.out / "heatmap.png")


class ShipsResult(NamedTuple):
    ranked: list[RankedHead]
    scores: Floats  # [queries, layers, heads] in nats, NaN for heads that were not ablated
    agreement: float | None
    seconds: float  # in the engine, without those of earlier runs


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

    def run(self, on_rows: OnRows = ignore_rows, verbose: bool = False) -> ShipsResult:
        """Score the missing queries and write the ranking. on_rows: see `ships`."""
        config, seconds = self.config, 0.0
        missing = set(self._parts.missing(self._names))
        todo = [(i, name) for i, name in enumerate(self._names) if name in missing]
        if todo:
            with ablating_engine(config, verbose, references=IN_FLIGHT) as engine:
                begin = time.monotonic()
                prompts = (self.queries[i].token_ids for i, _ in todo)
                with closing(ships(engine, prompts, self.heads, config.kind, config.epsilon, on_rows)) as scores:
                    for (i, name), of_query in zip(todo, scores, strict=True):
                        query = self.queries[i]
                        about = {"query": i, "id": query.id, "label": query.label, "category": query.category}
                        rows = ({"layer": head[0], "head": head[1], "kl": of_query[head]} for head in self.heads)
                        self._parts.write_records(name, (about | row for row in rows), _SHIPS_SCHEMA)
                seconds = time.monotonic() - begin
        return self._finish(seconds)

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
        self._draw_heatmaps(panels, "SHIPS")
        return ShipsResult(ranked, scores, agreed, seconds)


class SaharaResult(NamedTuple):
    steps: list[sahara.Step]
    seconds: float  # in the engine, without those of earlier runs


class SaharaJob(HeadsJob):
    """Searches into the folder: angles/ (Parquet, a row per step and head), sahara.json (settings, versions, the chosen
    heads and the ranking of each step) and heatmap.png (of step 1). It may be resumed with more steps."""

    result_file = SAHARA_FILE

    def _settings(self) -> dict[str, Any]:
        sahara.check_r_main(self.config.r_main, [query.token_ids for query in self.queries])
        sahara.check_steps(self.config.steps, self.heads)
        return {**super()._settings(), "r_main": self.config.r_main}

    @property
    def known(self) -> list[dict[Head, sahara.Angles]]:
        """The angles in the folder, of steps 1, 2, ..."""
        known: list[dict[Head, sahara.Angles]] = [{} for _ in range(self.config.steps)]
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

    def run(self, on_rows: OnRows = ignore_rows, verbose: bool = False) -> SaharaResult:
        """Continue the search and write its results. on_rows: see `SubspaceProbe`."""
        config, seconds = self.config, 0.0
        if self.angles_left:
            prompts = [query.token_ids for query in self.queries]
            with ablating_engine(config, verbose, hidden_states=sahara.hidden_states_for(len(prompts))) as engine:
                begin = time.monotonic()
                probe = sahara.SubspaceProbe(engine, prompts, config.r_main, config.kind, config.epsilon, on_rows)
                steps = sahara.sahara(probe, self.heads, config.steps, self.known, self._write)
                seconds = time.monotonic() - begin
        else:
            steps = [sahara.Step.from_angles(angles) for angles in self.known]
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
        self._draw_heatmaps({"angle in degrees": single}, "Generalised SHIPS")
        return SaharaResult(steps, seconds)

    def _write(self, step: int, angles: sahara.HeadAngles) -> None:
        rows = [
            {"step": step, "layer": layer, "head": head, "angle": float(own.sum()), "angles": own.tolist()}
            for (layer, head), own in angles.items()
        ]
        layer, head = next(iter(angles))
        self._parts.write_records(f"angles/step-{step:02d}-from-{layer}-{head}.parquet", rows, _SAHARA_SCHEMA)


def _to_json(step: sahara.Step, place: int, head: Head) -> dict[str, object]:
    angles = step.angles[head]
    about = {"rank": place, "layer": head[0], "head": head[1]}
    return {**about, "angle": float(angles.sum()), "angles": angles.tolist()}
