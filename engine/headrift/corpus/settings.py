"""What a scoring job is asked for, and what of it a resumed run must have in common with the one that was begun."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrift import signal
from headrift.corpus.shards import Selection
from headrift.probed_engine import REGIONS
from headrift.signal import ScoreRange, Window

if TYPE_CHECKING:
    from headrift.calibration.artifact import Calibration

STEPS = 12
WITH_MASS = ("tool", "bos")  # regions that --save mass adds
MAX_REGIONS = 8  # that the recorder takes
_OPTIONS = {
    "columns": "column",
    "regions": "region",
    "fail_terms": "fail-term",
}  # that are called otherwise on the command line


@dataclass(frozen=True, slots=True)
class Settings:
    """What `headrift score` is asked for. labels: one per input. save: kinds of parts.part_schema. regions: names
    that rows with token ids may use beside system, user, tool and bos. redact: write no prompt and no answer
    anywhere. selection: the rows to score. columns: for keys of a row that an input calls otherwise, its name there.
    compile: torch.compile on a CPU too. engine: local, or ray: on a Ray cluster; workers: how many engines are there,
    None for what suits the cluster. calibration: what scores are judged by, in its window and layers (see window_of);
    calibration_anyway: also where it is for another model. score_range: of steps, window and the fractions dropped.

    ValueError if these contradict each other."""

    inputs: tuple[str, ...]
    model: Path
    out: Path
    labels: tuple[str, ...] | None = None
    system_prompt: str | None = None
    steps: int = STEPS
    window: str | None = None
    drop_shallow: float = signal.DROP_SHALLOW
    drop_deep: float = signal.DROP_DEEP
    replay: bool = False
    save: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    logit_stats: bool = False
    redact: bool = False
    selection: Selection = field(default_factory=Selection)
    columns: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "auto"
    attention_backend: str = "auto"
    compile: bool = False
    engine: str = "local"
    workers: int | None = None
    calibration: Calibration | None = None
    calibration_anyway: bool = False
    score_range: ScoreRange = field(init=False)

    def __post_init__(self) -> None:
        score_range = ScoreRange.within(self.steps, self.window, self.drop_shallow, self.drop_deep)
        object.__setattr__(self, "score_range", score_range)

    def of_run(self) -> dict[str, Any]:
        """All that makes numbers, rows and columns, as run.json has it; the same for the same results."""
        prompt, shard = self.system_prompt, self.selection.shard
        hidden = prompt is not None and self.redact
        return {
            "steps": self.steps,
            "window": str(self.score_range.window),
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
            "compile": self.compile,
            "calibration": None if self.calibration is None else self.calibration.sha256,
        }


def window_of(
    calibration: Calibration | None,
    *,
    steps: int | None = None,
    window: str | None = None,
    drop_shallow: float | None = None,
    drop_deep: float | None = None,
) -> dict[str, Any]:
    """The Settings for the steps to record, window and trims, where None was not asked for: what the calibration is
    for, with no fewer steps than usual, or without one the defaults. ValueError where the calibration is for another
    window or other trims than were asked for, or needs more steps."""
    if calibration is None:
        asked = {"steps": steps, "window": window, "drop_shallow": drop_shallow, "drop_deep": drop_deep}
        return {name: value for name, value in asked.items() if value is not None}
    own = {"window": calibration.window, "drop_shallow": calibration.drop_shallow, "drop_deep": calibration.drop_deep}
    given = {
        "window": None if window is None else str(Window.parse(window)),
        "drop_shallow": drop_shallow,
        "drop_deep": drop_deep,
    }
    for name, value in given.items():
        if value not in (None, own[name]):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} {value}: the --calibration is for {option} {own[name]}: leave {option} out")
    end = Window.parse(calibration.window).end
    if steps is not None and steps < end:
        raise ValueError(
            f"--steps {steps} ends before the calibration's window does, {calibration.window}: "
            f"leave --steps out, or give at least {end}"
        )
    return {**own, "steps": max(STEPS, end) if steps is None else steps}


def check_together(settings: Settings) -> None:
    """ValueError where settings contradict each other."""
    if settings.replay and settings.logit_stats:
        raise ValueError("--replay computes no logits of the steps: leave out --logit-stats and --save entropy")
    if settings.redact and "text" in settings.save:
        raise ValueError("--redact keeps prompts and answers out and --save text keeps them: leave one out")
    if settings.calibration is not None:
        window = str(settings.score_range.window)
        trims = {"drop_shallow": settings.drop_shallow, "drop_deep": settings.drop_deep}
        window_of(settings.calibration, steps=settings.steps, window=window, **trims)
    elif settings.calibration_anyway:
        raise ValueError("--calibration-anyway goes with --calibration: name the file, or leave it out")
    if settings.workers is not None and settings.engine != "ray":
        raise ValueError("--workers is the number of engines on a Ray cluster: it goes with --engine ray")
    names = {*REGIONS, *WITH_MASS, *settings.regions}
    if "" in settings.regions or len(names) > MAX_REGIONS:
        raise ValueError(
            f"--region names a region, and with {', '.join((*REGIONS, *WITH_MASS))} at most {MAX_REGIONS} can be "
            "recorded"
        )


def check_context(steps: int, context: int | None, option: str = "steps") -> None:
    """ValueError where so many steps do not fit a context of so many tokens. option: what they were asked for by."""
    if context is not None and steps + 2 > context:
        raise ValueError(
            f"--{option} {steps} do not fit the model's context of {context} tokens, prompt included: give fewer"
        )


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was, a line each: of the settings, inputs, model and template of two runs (see ScoreJob)."""
    return [
        *_of_settings(then["settings"], now["settings"]),
        *_of_inputs(then["inputs"], now["inputs"]),
        *_of_model(then, now),
    ]


def _of_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in {**then, **now}:  # an earlier version, or another command, may not have had a setting
        value, is_now = then.get(name), now.get(name)
        if value == is_now or not (value or is_now):
            continue
        if name == "system_prompt_sha256":
            yield "the system prompt is another one"
        elif name == "command":
            yield f"it is a run of `headrift {value or 'score'}`"
        elif name == "calibration":
            was = "without one" if value is None else "with another one" if is_now is not None else "with one"
            yield f"--calibration: the run was begun {was}"
        elif not name.startswith("system_prompt"):
            yield f"--{_OPTIONS.get(name, name).replace('_', '-')} was {_shown(value)} and is {_shown(is_now)}"


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
