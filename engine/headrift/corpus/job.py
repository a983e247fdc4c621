"""A scoring job: inputs to an output folder, through the engine. `headrift score` is this with options around it.

ScoreJob checks all it can before a model is loaded; then `start`, `describe` and `run`, in this order.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from headrift import scorer as scoring
from headrift.corpus import parts, readers
from headrift.corpus.reasons import REASONS
from headrift.corpus.rows import BadRow, Row
from headrift.corpus.summary import SCORE, Summary
from headrift.machine import processor
from headrift.model_facts import ModelFacts, read_model
from headrift.probed_engine import REGIONS, EngineError
from headrift.vllm_plugin.plugin import RefusedError

if TYPE_CHECKING:
    from headrift.scorer import Prompt, Rejected, Scorer, ScoreResult

MAX_REGIONS = 8
_MAX_DETAIL = 500  # characters: a detail may quote the row
_TEXT_BYTES = 4096  # a guess at what a row's texts take, for the space a run needs


@dataclass(frozen=True, slots=True)
class Settings:
    """What `headrift score` is asked for. labels: one per input. save: kinds of parts.part_schema. regions: names that
    rows with token ids may use beside system, user and tool. redact: write no prompt and no answer anywhere."""

    inputs: tuple[Path, ...]
    model: Path
    out: Path
    labels: tuple[str, ...] | None = None
    system_prompt: str | None = None
    steps: int = 12
    window: str | None = None
    drop_shallow: float = 0.25
    drop_deep: float = 0.15
    replay: bool = False
    save: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    logit_stats: bool = False
    redact: bool = False
    limit: int | None = None
    dtype: str = "auto"


class ScoreJob:
    """Checked on creation: ValueError where the settings cannot be, and nothing was begun but the (empty) out folder.

    notices: what the user should know before it starts. summary: of the rows so far. kept: rows in complete files.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        _check_together(settings)
        self.window = scoring.check_settings(settings.steps, settings.window, settings.drop_shallow, settings.drop_deep)
        self.notices: list[str] = []
        self._rows = readers.read_rows(settings.inputs, settings.labels)
        self._total = self._count()
        model = read_model(settings.model)
        _check_context(settings.steps, model.context)
        parts.make_folder(settings.out)
        self._check_space(model)
        self.summary = Summary(self.window.end)
        self.kept = 0
        self.seconds = {"start": 0.0, "scoring": 0.0}
        self._begun = time.monotonic()
        self._run: dict[str, Any] = {
            "status": "running",
            "started": _now(),
            "finished": None,
            "settings": self._settings_of_run(),
        }

    def _count(self) -> int:
        """How many rows there are; ValueError for none."""
        total, limit = 0, self.settings.limit
        for path in self.settings.inputs:
            n = readers.count_rows(path, None if limit is None else limit - total)
            if not n and total != limit:
                self.notices.append(f"{path} has no rows")
            total += n
        if not total:
            names = ", ".join(map(str, self.settings.inputs))
            raise readers.InputError(f"no rows in {names}: there is nothing to score")
        return total

    def _check_space(self, model: ModelFacts) -> None:
        steps, layers, heads = self.settings.steps + 1, model.layers or 0, model.heads or 0
        row = 4 * steps * layers + 512
        row += 2 * steps * layers * heads * ("shares" in self.settings.save)
        row += 4 * steps * layers * heads * (len(REGIONS) + 1) * ("mass" in self.settings.save)
        row += _TEXT_BYTES * ("text" in self.settings.save)
        need, free = row * self._total, shutil.disk_usage(self.settings.out).free
        if need > free:
            room = f"the results may take {need / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free"
            fix = "make room, choose another disk, or save less"
            raise parts.OutputError(f"--out {self.settings.out}: {room}: {fix}")

    def _settings_of_run(self) -> dict[str, Any]:
        asked, prompt = self.settings, self.settings.system_prompt
        hidden = prompt is not None and asked.redact
        return {
            "steps": asked.steps,
            "window": str(self.window),
            "drop_shallow": asked.drop_shallow,
            "drop_deep": asked.drop_deep,
            "logit_stats": asked.logit_stats,
            "system_prompt": None if hidden else prompt,
            "system_prompt_sha256": None if prompt is None else hashlib.sha256(prompt.encode()).hexdigest(),
            "replay": asked.replay,
            "save": list(asked.save),
            "regions": list(asked.regions),
            "redact": asked.redact,
            "labels": None if asked.labels is None else list(asked.labels),
            "limit": asked.limit,
            "dtype": asked.dtype,
        }

    def start(self, *, verbose: bool = False) -> Scorer:
        """Load the model. EngineError or RefusedError, saying what to do, where that cannot be."""
        asked, self._begun = self.settings, time.monotonic()
        try:
            return scoring.Scorer(
                asked.model,
                system_prompt=asked.system_prompt,
                steps=asked.steps,
                window=self.window,
                drop_shallow=asked.drop_shallow,
                drop_deep=asked.drop_deep,
                logit_stats=asked.logit_stats,
                keep_mass="mass" in asked.save,
                regions=("tool", *asked.regions) if "mass" in asked.save else asked.regions,
                engine_args={} if asked.dtype == "auto" else {"dtype": asked.dtype},
                verbose=verbose,
            )
        except RefusedError:
            raise
        except Exception as error:  # a model's files can break vLLM, transformers and torch in any way
            raise EngineError(f"vLLM cannot start with --model {asked.model}: {plainly(error)}") from error

    def describe(self, scorer: Scorer) -> dict[str, Any]:
        """Note what run.json says of the engine; returns that. ValueError where the model's tokenizer cannot be used,
        or its context is too short for the steps."""
        asked, engine = self.settings, scorer.engine
        scorer.renderer  # noqa: B018  made now, so that a tokenizer that cannot be used stops the run before the first row
        _check_context(asked.steps, engine.max_model_len)
        shape = ("dtype", "layers", "heads", "regions", "max_model_len", "recorder_bytes")
        template = scorer.tokenizer.get_chat_template()
        self._run |= {
            "versions": parts.versions(),
            "model": {"path": str(asked.model), **parts.model_fingerprint(asked.model)},
            "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
            "engine": {name: getattr(engine, name) for name in shape},
            "host": {"cpu": processor()[0], "cores": os.cpu_count()},
            "inputs": [{"name": str(path), **parts.file_fingerprint(path)} for path in asked.inputs],
        }
        self.seconds["start"] = time.monotonic() - self._begun
        return dict(self._run["engine"])

    def run(self, scorer: Scorer, *, progress: bool = False) -> None:
        """Score every row into the folder. Whatever breaks it off, what was scored before is kept and counted.

        OSError where the disk fails, RuntimeError where the engine does.
        """
        asked, begun = self.settings, time.monotonic()
        engine = self._run["engine"]
        schema = parts.part_schema(asked.save, **{key: engine[key] for key in ("layers", "heads", "regions")})
        files = parts.Parts(asked.out, schema)
        parts.write_run(asked.out, self._run)
        status = "unfinished"
        try:
            prompts = _InFlight(islice(self._rows, asked.limit), self._total)
            results = scorer.score(prompts, replay=asked.replay, progress=progress)
            # Closed by hand where it breaks off, or else the progress bar would outlive the engine.
            with files, closing(results):
                for result in results:
                    self._keep(prompts.taken.pop(result.index), result, files)
            status = "done"
        finally:
            self.kept = files.kept
            self.seconds["scoring"] = time.monotonic() - begun
            self._run |= {"status": status, "finished": _now(), "seconds": self.seconds}
            self._run |= {"counts": self.summary.counts(), "classes": self.summary.by_class()}
            if status == "done":
                self._run["comparisons"] = [comparison.numbers() for comparison in self.summary.comparisons()]
            parts.write_run(asked.out, self._run)
        self._draw()

    def _keep(self, row: Row | BadRow, result: ScoreResult | Rejected, files: parts.Parts) -> None:
        """Put a row where it belongs, into the parts or the rejects."""
        if isinstance(row, Row) and isinstance(result, scoring.ScoreResult):
            record = parts.record_of(row, result)
            files.add(record)
            self.summary.add(record)
        else:
            why = row if isinstance(row, BadRow) else result
            assert not isinstance(why, scoring.ScoreResult)
            detail = REASONS[why.reason] if self.settings.redact else why.detail
            files.reject(row, why.reason, detail if len(detail) <= _MAX_DETAIL else f"{detail[:_MAX_DETAIL]}...")
            self.summary.reject(why.reason)

    def _draw(self) -> None:
        from headrift.figures import Curve, scores_png

        curves = []
        for comparison in self.summary.comparisons()[:1]:
            shown = {name: of for name, of in comparison.measures.items() if name != "answer length"}
            curves = [Curve(name, of.fpr, of.tprs, of.auroc, of.grid, of.band) for name, of in shown.items()]
            assert curves[0].name == SCORE
        window = f"steps {self.window.start} to {self.window.end}"
        title = f"{', '.join(path.stem for path in self.settings.inputs)} on {self.settings.model.name}, {window}"
        scores_png(self.settings.out / "scores.png", self.summary.by_category(), curves, title=title)


class _InFlight:
    """The rows' prompts, for Scorer.score. taken: the rows it has taken and not answered yet, by index.

    n: how many rows there are, for the progress bar.
    """

    def __init__(self, rows: Iterable[Row | BadRow], n: int) -> None:
        self._rows, self._n = rows, n
        self.taken: dict[int, Row | BadRow] = {}

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[Prompt]:
        for index, row in enumerate(self._rows):
            self.taken[index] = row
            # A row that cannot be read goes as a prompt of nothing: turned down before the engine, in its place.
            yield getattr(row, "prompt", scoring.Prompt())


def _check_together(settings: Settings) -> None:
    if settings.replay and settings.logit_stats:
        raise ValueError("--replay computes no logits of the steps: leave out --logit-stats and --save entropy")
    if settings.redact and "text" in settings.save:
        raise ValueError("--redact keeps prompts and answers out and --save text keeps them: leave one out")
    names = {*REGIONS, "tool", *settings.regions}
    if "" in settings.regions or len(names) > MAX_REGIONS:
        raise ValueError(
            f"--region names a region, and with {', '.join(REGIONS)} and tool at most {MAX_REGIONS} can be recorded"
        )


def _check_context(steps: int, context: int | None) -> None:
    if context is not None and steps + 2 > context:
        raise ValueError(
            f"--steps {steps} do not fit the model's context of {context} tokens, prompt included: record fewer steps"
        )


def plainly(error: Exception) -> str:
    """What an engine that did not start has to say, without pydantic's framing: a line, and what to do."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None and isinstance(cause, Exception):
        causes.append(cause)
    validation = next((cause for cause in causes if isinstance(cause, ValidationError)), None)
    said = [str(error)] if validation is None else [str(one["msg"]) for one in validation.errors()]
    lines = [text.removeprefix("Value error, ").strip().partition("\n")[0] for text in said]
    named = [] if isinstance(error, RuntimeError | ValueError | OSError) else [type(error).__name__]
    return f"{': '.join([*named, *lines])} (check the model's files, or take another model)"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
