"""`headrift heads evaluate`: do refusals depend on chosen heads, and does anything else?

The same queries are answered greedily by the model as it is, with the chosen heads ablated together, and several times
with as many other heads drawn at random. A neutral text is read in each of these arms. The model is not changed, and
answers are not kept unless the config asks for it.

Queries that chose the heads say too much of them: rates of such queries are not held out. An evaluation refuses them,
leaves them out, or keeps them and says so in all of its results.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrift import ablation
from headrift.ablation import EPSILON, HeadAblation
from headrift.corpus.rows import Row
from headrift.model_facts import read_shape
from headrift.prepare import load_tokenizer
from headrift.probed_engine import ProbedEngine
from headrift.requests import Finished, ProbeRequest
from headrift.runs.folder import (
    JobError,
    OnRows,
    atomic_path,
    columns,
    ignore_rows,
    model_fingerprint,
    new_folder,
    table_from_records,
    versions,
    write_json,
)
from headrift.safety_heads import refusals
from headrift.safety_heads.jobs import QueriesConfig, ablating_engine, check_lengths, prepare, read_rows, text_hash
from headrift.safety_heads.overlap import leading_heads
from headrift.safety_heads.ships import Head, all_heads
from headrift.stats import Floats

# --quick: tokens of an answer, draws of other heads, passages of the neutral text.
QUICK_TOKENS, QUICK_DRAWS, QUICK_PASSAGES = 32, 1, 4
RESULT_FILE, _ANSWERS, _FIGURE = "evaluate.json", "answers.parquet", "arms.png"
_COLUMNS = columns(
    "query int32, id string, label string, category string, arm string, refused bool, answer_tokens int32, "
    "same_tokens int32"
)
# What becomes of queries that chose the heads.
REFUSE, LEAVE_OUT, KEEP = CHOOSING_QUERIES = ("refuse", "leave-out", "keep")
# Heads to ablate by the arm's name; none for the clean arm.
Arms = Mapping[str, Sequence[HeadAblation]]


@dataclass(frozen=True, slots=True)
class EvaluateConfig(QueriesConfig):
    """Options of `headrift heads evaluate`; `heads` None is the first `top` heads of `run`."""

    run: Path | None = None  # a folder of `ships` or `sahara`
    top: int | None = None
    kind: str | None = None  # default: as in the run, or of `headrift.ablation`; and so is epsilon
    epsilon: float | None = None
    tokens: int = 64  # longest answer
    draws: int = 3  # of as many other heads
    seed: int = 0
    labels: tuple[str, ...] | None = None  # one per input, for queries without a label
    keep_completions: bool = False
    choosing_queries: str = REFUSE  # one of CHOOSING_QUERIES


@dataclass(frozen=True, slots=True)
class ChosenOn:
    """Which of an evaluation's queries chose the heads."""

    queries: int | None  # how many did; None if that is not known
    evaluated: int
    left_out: int  # queries that were left out since they chose the heads

    @property
    def held_out(self) -> bool | None:
        """Whether no query chose the heads; None if that is not known."""
        return None if self.queries is None else self.queries == 0

    def __str__(self) -> str:
        if self.queries is None:
            return "which queries chose the heads is not known: these may not be held out"
        if self.queries:
            return f"chosen on these queries: not held out ({self.queries} of {self.evaluated})"
        return f"held out: none of the {self.evaluated} queries chose the heads" + (
            f" ({self.left_out} that did are left out)" if self.left_out else ""
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "held_out": self.held_out, "note": str(self)}


class Evaluation(NamedTuple):
    arms: list[refusals.ArmSummary]
    controls: dict[str, refusals.ControlDifference]  # by label
    chosen_on: ChosenOn
    seconds: float  # in the engine


class EvaluateJob:
    """Evaluates chosen heads into the folder `config.out`: evaluate.json, answers.parquet (a row per query and arm) and
    arms.png. ValueError if the config cannot be used, before the model is loaded."""

    def __init__(self, config: EvaluateConfig):
        self.config = config
        facts, n_layers, n_heads = read_shape(config.model)
        if config.choosing_queries not in CHOOSING_QUERIES:
            raise JobError(f"--choosing-queries {config.choosing_queries} must be one of {', '.join(CHOOSING_QUERIES)}")
        self.heads, self.kind, self.epsilon, chose = _choose_heads(config)
        ablation.check([(*head, self.kind) for head in self.heads], self.epsilon)
        ablation.check_heads(self.heads, n_layers, n_heads)
        self.tokens = min(config.tokens, QUICK_TOKENS) if config.quick else config.tokens
        draws = min(config.draws, QUICK_DRAWS) if config.quick else config.draws
        controls = _draw_controls(self.heads, all_heads(n_layers, n_heads), draws, config.seed)
        self.arms = {refusals.CLEAN: (), refusals.ABLATED: self.heads, **controls}
        rows = read_rows(config.inputs, config.columns, labels=config.labels)
        rows, left_out = _without(rows, chose) if config.choosing_queries == LEAVE_OUT else (rows, 0)
        rows = _limit_labels(rows, config.n_queries)
        self._tokenizer = load_tokenizer(str(config.model), False)
        self.queries = prepare(rows, self._tokenizer, config.form, config.system_prompt)
        self.labels = [str(query.label) for query in self.queries]
        n_chose = None if chose is None else sum(query.text_hash in chose for query in self.queries)
        self.chosen_on = ChosenOn(n_chose, len(self.queries), left_out)
        if n_chose and config.choosing_queries == REFUSE:
            raise JobError(
                f"{n_chose} of the {len(self.queries)} queries chose the heads of {config.run}: give other queries, or "
                f"leave these out (--choosing-queries {LEAVE_OUT}), or keep them, marked as not held out ({KEEP})"
            )
        check_lengths(self.queries, facts, self.tokens)
        text = (files("headrift.safety_heads") / "neutral.txt").read_text(encoding="utf-8").strip().split("\n\n")
        passages = [list(self._tokenizer(passage)["input_ids"]) for passage in text]
        self.passages = passages[: QUICK_PASSAGES if config.quick else None]
        if facts.context is not None and max(map(len, self.passages)) >= facts.context:
            raise JobError(f"--model {config.model}: its context of {facts.context} is too short for the neutral text")
        new_folder(config.out)

    @property
    def rows(self) -> int:
        """Number of requests to run."""
        return len(self.arms) * (len(self.queries) + len(self.passages))

    def run(self, on_rows: OnRows = ignore_rows, verbose: bool = False) -> Evaluation:
        """Run all arms and write the results. on_rows: called with the number of requests that finished."""
        ablated = {name: [(*head, self.kind) for head in heads] for name, heads in self.arms.items()}
        with ablating_engine(self.config, verbose) as engine:
            begin = time.monotonic()
            prompts = [query.token_ids for query in self.queries]
            fields: dict[str, Any] = {"answer_tokens": self.tokens, "epsilon": self.epsilon}
            by_query = run_arms(engine, prompts, ablated, on_rows, **fields)
            fields = {"ignore_eos": True, "logprobs": True, "epsilon": self.epsilon}
            likelihoods = log_likelihoods(run_arms(engine, self.passages, ablated, on_rows, **fields))
            seconds = time.monotonic() - begin
        texts = [
            {arm: self._tokenizer.decode(done.answer_ids, skip_special_tokens=True) for arm, done in by_arm.items()}
            for by_arm in by_query
        ]
        ids, n = {name: [done[name].answer_ids for done in by_query] for name in self.arms}, refusals.CHANGED_WITHIN
        clean = ids[refusals.CLEAN]
        by_arm = {
            name: refusals.ArmAnswers(
                heads=heads,
                refused=np.array([refusals.is_refusal(text[name]) for text in texts]),
                same_tokens=np.array([*map(_same_tokens, ids[name], clean)]),
                changed=np.array([one[:n] != other[:n] for one, other in zip(ids[name], clean)]),
                log_likelihood=likelihoods[name],
            )
            for name, heads in self.arms.items()
        }
        lengths = np.array([len(ids) - 1.0 for ids in self.passages])
        controls = refusals.against_controls(by_arm, self.labels)
        result = Evaluation(refusals.summarise(by_arm, self.labels, lengths), controls, self.chosen_on, seconds)
        rows = [
            {
                **{"query": i, "id": query.id, "label": query.label, "category": query.category, "arm": name},
                "refused": bool(arm.refused[i]),
                "answer_tokens": len(ids[name][i]),
                "same_tokens": int(arm.same_tokens[i]),
                "text": texts[i][name],
            }
            for i, query in enumerate(self.queries)
            for name, arm in by_arm.items()
        ]
        self._write(result, rows)
        return result

    def _write(self, result: Evaluation, rows: Sequence[Mapping[str, Any]]) -> None:
        config = self.config
        schema = pa.schema([*_COLUMNS, *(columns("text string") if config.keep_completions else ())])
        with atomic_path(config.out / _ANSWERS) as unfinished:
            pq.write_table(table_from_records(rows, schema), unfinished)
        write_json(config.out / RESULT_FILE, self._to_json(result))
        heads = ", ".join(f"{layer}:{head}" for layer, head in self.heads)
        title = f"{config.model.name}, {self.kind}: {len(self.heads)} heads together ({heads})"
        if self.chosen_on.queries:
            title = f"Not held out, chosen on these queries. {title}"
        refusals.bars_png(config.out / _FIGURE, result.arms, title=title)

    def _to_json(self, result: Evaluation) -> dict[str, Any]:
        config = self.config
        return {
            "settings": {
                "model": model_fingerprint(config.model)["fingerprint"],
                "heads": self.heads,
                "heads_from": None if config.run is None else {"run": str(config.run), "top": len(self.heads)},
                "kind": self.kind,
                "epsilon": self.epsilon,
                "tokens": self.tokens,
                "changed_within": refusals.CHANGED_WITHIN,
                "draws": len(self.arms) - 2,
                "seed": config.seed,
                "queries": {label: self.labels.count(label) for label in sorted(set(self.labels))},
                "passages": len(self.passages),
                "as": config.form,
                "system_prompt": config.system_prompt,
                "dtype": config.dtype,
            },
            "about": {"model": str(config.model), "inputs": config.inputs, "versions": versions()},
            "engine_seconds": round(result.seconds, 2),
            "chosen_on_these_queries": self.chosen_on.to_json(),
            "arms": {arm.name: arm.to_json() for arm in result.arms},
            "refused_against_controls": {label: control._asdict() for label, control in result.controls.items()},
        }


def run_arms(
    engine: ProbedEngine, prompts: Sequence[Sequence[int]], arms: Arms, on_rows: OnRows = ignore_rows, **fields: Any
) -> list[dict[str, Finished]]:
    """Run prompts in each arm; the finished requests of each prompt by arm. fields: of the requests."""
    by_prompt: list[dict[str, Finished]] = [{} for _ in prompts]
    requests = (
        ((i, arm), ProbeRequest(ids, {}, 0, ablate=heads, **fields))
        for i, ids in enumerate(prompts)
        for arm, heads in arms.items()
    )
    for (i, arm), done, _ in engine.run(requests):
        by_prompt[i][arm] = done
        on_rows(1)
    return by_prompt


def log_likelihoods(by_passage: Sequence[Mapping[str, Finished]]) -> dict[str, Floats]:
    """By arm, the summed log-probability of each passage's tokens but the first, in nats. RuntimeError if one lacks."""
    sums = {arm: np.array([np.sum(done[arm].logprobs or np.nan) for done in by_passage]) for arm in by_passage[0]}
    if not all(np.isfinite(of_arm).all() for of_arm in sums.values()):
        raise RuntimeError("the engine gave no log-probability for some tokens of the text; do not trust its numbers")
    return sums


def _choose_heads(config: EvaluateConfig) -> tuple[tuple[Head, ...], str, float, frozenset[str] | None]:
    """The heads to ablate, the kind, epsilon, and hashes of the queries that chose the heads, None if not known.

    JobError if the options contradict each other or choose none.
    """
    kind, epsilon, chose = config.kind or ablation.UNDIFFERENTIATED, EPSILON, None
    if config.run is not None and config.heads is not None:
        raise JobError("--heads and --from both choose heads: give one of them")
    if config.run is None and config.top is not None:
        raise JobError("--top is the number of heads to take from a run: give its folder too, --from RUN")
    if config.run is not None:
        leading = leading_heads(config.run, config.top)
        if config.top is None:
            raise JobError(f"--from {config.run} has {leading.available} heads: give the number to take, as in --top 5")
        heads, kind, epsilon = leading.heads, config.kind or leading.kind, leading.epsilon
        chose = leading.chosen_on
    elif config.heads:
        heads = config.heads
    else:
        raise JobError("no head to ablate: name some (--heads 3:0,11:7), or a run of ships (--from RUN --top 5)")
    return heads, kind, epsilon if config.epsilon is None else config.epsilon, chose


def _without(rows: Sequence[Row], chose: frozenset[str] | None) -> tuple[list[Row], int]:
    """The rows that did not choose the heads, and how many did. JobError if that is not known, or none is left."""
    if chose is None:
        raise JobError(f"--choosing-queries {LEAVE_OUT}: which queries chose the heads is not known; see --from")
    kept = [row for row in rows if text_hash(row) not in chose]
    if not kept:
        raise JobError(f"all of the {len(rows)} queries chose the heads: give others")
    return kept, len(rows) - len(kept)


def _draw_controls(heads: Sequence[Head], every: Sequence[Head], draws: int, seed: int) -> dict[str, tuple[Head, ...]]:
    """Arms with as many heads, drawn from the others."""
    others = [head for head in every if head not in heads]
    if draws and len(others) < len(heads):
        raise JobError(
            f"{len(heads)} heads to ablate and only {len(others)} others to compare with: take fewer, or --draws 0"
        )
    random = np.random.default_rng(seed)
    controls = {}
    for draw in range(draws):
        chosen = random.choice(len(others), len(heads), replace=False)
        controls[f"{refusals.CONTROL} {draw + 1}"] = tuple(others[i] for i in sorted(chosen.tolist()))
    return controls


def _limit_labels(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """The first `limit` rows of each label. JobError if a row has no label, or no row is an attack."""
    counts: Counter[str] = Counter()
    kept = []
    for row in rows:
        if row.label is None:
            raise JobError(
                f"{row.source}, row {row.row}: it has no label; add a column label (attack or benign), or label all "
                "rows of a file, as in --labels attack"
            )
        counts[row.label] += 1
        if limit is None or counts[row.label] <= limit:
            kept.append(row)
    if refusals.ATTACK not in counts:
        raise JobError("no query is labelled attack: there are no refusals to evaluate without one")
    return kept


def _same_tokens(answer: Sequence[int], clean: Sequence[int]) -> int:
    """Number of leading tokens that an answer shares with the clean one."""
    pairs = list(zip(answer, clean))
    return next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))
