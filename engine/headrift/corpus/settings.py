"""What a scoring job is asked for, and what of it a resumed run must have in common with the one that was begun."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrift.corpus.shards import Selection
from headrift.probed_engine import REGIONS

MAX_REGIONS = 8
_OPTIONS = {"columns": "column", "regions": "region"}  # that are called otherwise on the command line


@dataclass(frozen=True, slots=True)
class Settings:
    """What `headrift score` is asked for. labels: one per input. save: kinds of parts.part_schema. regions: names that
    rows with token ids may use beside system, user and tool. redact: write no prompt and no answer anywhere. selection:
    the rows to score. columns: for keys of a row that an input calls otherwise, its name there. engine: local, or ray:
    on a Ray cluster; workers: how many engines are there, None for what suits the cluster."""

    inputs: tuple[str, ...]
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
    selection: Selection = field(default_factory=Selection)
    columns: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "auto"
    attention_backend: str = "auto"
    engine: str = "local"
    workers: int | None = None

    def of_run(self, window: str) -> dict[str, Any]:
        """All that makes numbers, rows and columns, as run.json has it; the same for the same results."""
        prompt, shard = self.system_prompt, self.selection.shard
        hidden = prompt is not None and self.redact
        return {
            "steps": self.steps,
            "window": window,
            "drop_shallow": self.drop_shallow,
            "drop_deep": self.drop_deep,
            "logit_stats": self.logit_stats,
            "system_prompt": None if hidden else prompt,
            "system_prompt_sha256": None if prompt is None else hashlib.sha256(prompt.encode()).hexdigest(),
            "replay": self.replay,
            "save": list(self.save),
            "regions": list(self.regions),
            "redact": self.redact,
            "labels": None if self.labels is None else list(self.labels),
            "limit": self.selection.limit,
            "sample": self.selection.sample,
            "seed": None if self.selection.sample is None else self.selection.seed,
            "shard": None if shard is None else f"{shard[0]}/{shard[1]}",
            "columns": dict(self.columns),
            "dtype": self.dtype,
            "attention_backend": self.attention_backend,
        }


def check_together(settings: Settings) -> None:
    """ValueError where settings contradict each other."""
    if settings.replay and settings.logit_stats:
        raise ValueError("--replay computes no logits of the steps: leave out --logit-stats and --save entropy")
    if settings.redact and "text" in settings.save:
        raise ValueError("--redact keeps prompts and answers out and --save text keeps them: leave one out")
    if settings.workers is not None and settings.engine != "ray":
        raise ValueError("--workers is the number of engines on a Ray cluster: it goes with --engine ray")
    names = {*REGIONS, "tool", *settings.regions}
    if "" in settings.regions or len(names) > MAX_REGIONS:
        raise ValueError(
            f"--region names a region, and with {', '.join(REGIONS)} and tool at most {MAX_REGIONS} can be recorded"
        )


def check_context(steps: int, context: int | None) -> None:
    """ValueError where the steps do not fit a context of so many tokens."""
    if context is not None and steps + 2 > context:
        raise ValueError(
            f"--steps {steps} do not fit the model's context of {context} tokens, prompt included: record fewer steps"
        )


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was, a line each: of the settings, inputs, model and template of two runs (see ScoreJob)."""
    return [
        *_of_settings(then["settings"], now["settings"]),
        *_of_inputs(then["inputs"], now["inputs"]),
        *_of_model(then, now),
    ]


def _of_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name, value in then.items():
        if name == "system_prompt_sha256" and now[name] != value:
            yield "the system prompt is another one"
        elif not name.startswith("system_prompt") and now[name] != value:
            yield f"--{_OPTIONS.get(name, name).replace('_', '-')} was {_shown(value)} and is {_shown(now[name])}"


def _of_inputs(then: list[dict[str, Any]], now: list[dict[str, Any]]) -> Iterator[str]:
    if [of["name"] for of in then] != [of["name"] for of in now]:
        were, are = ({of["name"] for of in files} for files in (then, now))
        changes = [f"{len(files)} {what} ({sorted(files)[0]})" for what, files in _sides(were, are) if files]
        yield f"the input files are others: {', '.join(changes) or 'in another order'}"
        return
    for was, is_now in zip(then, now, strict=True):
        if was != is_now:
            sizes = f": {was['bytes']:,} bytes then, {is_now['bytes']:,} now" if was["bytes"] != is_now["bytes"] else ""
            yield f"the input {was['name']} has changed{sizes}"


def _sides(were: set[str], are: set[str]) -> list[tuple[str, set[str]]]:
    return [("gone", were - are), ("new", are - were)]


def _of_model(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if then["model"] != now["model"]:
        yield "the model is another one, or its files (weights, config.json, tokenizer, chat template) have changed"
    elif then["engine"] is not None and now["engine"] is not None and then["engine"] != now["engine"]:
        changed = [name for name in then["engine"] if then["engine"][name] != now["engine"].get(name)]
        yield f"the engine is another one: its {', '.join(changed)}"


def _shown(value: Any) -> str:
    return "not given" if value in (None, [], {}) else str(value)
