"""The config of a scoring job: which rows it takes, and what a resumed run must have in common with the first one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from headrift import signal
from headrift.probed_engine import REGIONS
from headrift.signal import ScoreRange, Window
from headrift.signals import get

if TYPE_CHECKING:
    from headrift.calibration.artifact import Calibration

STEPS = 12
MASS_REGIONS = ("tool", "bos")  # which --save mass adds
MAX_REGIONS = 8  # of a recorder
# A run has about this many shards, each with rows in these bounds: small enough to lose little, large enough to be few.
_SHARDS = 1000
_MIN_SHARD_ROWS, _MAX_SHARD_ROWS = 1000, 10_000
# Options whose name on the command line is not the setting's.
_OPTIONS = {"columns": "column", "regions": "region", "fail_terms": "fail-term"}


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rows of the input a run takes; first `sample`, then `shard`, then `limit` applies. None: all rows.

    The rows that are taken are numbered from 0. Shard k of the output is [k * size, (k + 1) * size) of these.
    """

    limit: int | None = None  # the first rows
    sample: int | None = None  # this many of the whole input, drawn with `seed`
    seed: int = 0
    shard: tuple[int, int] | None = None  # (i, n): every n-th row from the i-th, counted from 1

    @property
    def max_read(self) -> int | None:
        """How many rows of the input suffice; None if that is not known beforehand."""
        if self.limit is None or self.sample is not None:
            return None
        return self.limit * (self.shard[1] if self.shard else 1)

    def count(self, total: int) -> int:
        """Count the rows that are taken of `total`."""
        taken = total if self.sample is None else min(self.sample, total)
        if self.shard is not None:
            first, step = self.shard
            taken = len(range(first - 1, taken, step))
        return taken if self.limit is None else min(taken, self.limit)

    def selected(self, total: int) -> Iterator[bool]:
        """Tell of each of `total` rows in order whether it is taken; ends after the last one that is."""
        random, left, position, taken = Random(self.seed), self.sample, 0, 0
        most = self.count(total)
        for number in range(total):
            if taken == most:
                return
            drawn = True
            if left is not None:  # Knuth's selection sampling: exactly as many as asked for, in one pass
                drawn = random.random() * (total - number) < left
                left -= drawn
            own = drawn and (self.shard is None or position % self.shard[1] == self.shard[0] - 1)
            position += drawn
            taken += own
            yield own


def parse_shard(text: str) -> tuple[int, int]:
    """Parse "i/n"; ValueError unless 1 <= i <= n."""
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--shard is i/n with 1 <= i <= n, as in 2/8 (the second of eight), got {text!r}")
    return int(match[1]), int(match[2])


def rows_per_shard(rows: int) -> int:
    """Choose the size of the shards of a run with this many rows."""
    return min(max(rows // _SHARDS, _MIN_SHARD_ROWS), _MAX_SHARD_ROWS)


@dataclass(frozen=True, slots=True)
class ScoreConfig:
    """Options of `headrift score`. ValueError if they contradict each other."""

    inputs: tuple[str, ...]
    model: Path
    out: Path
    labels: tuple[str, ...] | None = None  # one per input
    system_prompt: str | None = None
    steps: int = STEPS
    window: str | None = None
    drop_shallow: float = signal.DROP_SHALLOW
    drop_deep: float = signal.DROP_DEEP
    replay: bool = False
    save: tuple[str, ...] = ()  # see `parts.part_schema`
    regions: tuple[str, ...] = ()  # names that rows with token ids may use besides system, user, tool and bos
    logit_stats: bool = False
    redact: bool = False  # write no prompt and no answer anywhere
    selection: Selection = field(default_factory=Selection)
    columns: Mapping[str, str] = field(default_factory=dict)  # the inputs' own names for keys of a row
    dtype: str = "auto"
    attention_backend: str = "auto"
    compile: bool = False  # with torch.compile on a CPU too
    engine: str = "local"  # or ray
    workers: int | None = None  # engines on the Ray cluster; None for what suits it
    calibration: Calibration | None = None  # what judges the scores, in its window and layers
    calibration_anyway: bool = False  # also if it is for another model
    score_range: ScoreRange = field(init=False)

    def __post_init__(self) -> None:
        score_range = ScoreRange.within(self.steps, self.window, self.drop_shallow, self.drop_deep)
        object.__setattr__(self, "score_range", score_range)
        if self.replay and self.logit_stats:
            raise ValueError("--replay computes no logits of the steps: leave out --logit-stats and --save entropy")
        if self.redact and "text" in self.save:
            raise ValueError("--redact keeps prompts and answers out and --save text keeps them: leave one out")
        if self.calibration is not None:
            range_options(self.calibration, self.steps, str(score_range.window), self.drop_shallow, self.drop_deep)
            self._record_for(self.calibration)
        elif self.calibration_anyway:
            raise ValueError("--calibration-anyway goes with --calibration: name the file, or leave it out")
        if self.workers is not None and self.engine != "ray":
            raise ValueError("--workers is the number of engines on a Ray cluster: it goes with --engine ray")
        usual = (*REGIONS, *MASS_REGIONS)
        if "" in self.regions or len({*usual, *self.regions}) > MAX_REGIONS:
            raise ValueError(
                f"--region names a region, and with {', '.join(usual)} at most {MAX_REGIONS} can be recorded"
            )

    def _record_for(self, calibration: Calibration) -> None:
        """Record what the calibration's detector reads, beside what was asked for."""
        detector = calibration.detector
        if detector.kind == "chosen_heads" and "focus" not in self.save:
            object.__setattr__(self, "save", tuple(sorted({*self.save, "focus"})))
        if detector.kind == "directed" and "entropy" in get(detector.signal).saves:
            if self.replay:
                raise ValueError(f"--replay has no logits, and the calibration reads the {calibration.label}")
            object.__setattr__(self, "logit_stats", True)

    def identity(self) -> dict[str, Any]:
        """Return what determines numbers, rows and columns, as run.json has it."""
        prompt, shard = self.system_prompt, self.selection.shard
        return {
            "steps": self.steps,
            "window": str(self.score_range.window),
            "drop_shallow": self.drop_shallow,
            "drop_deep": self.drop_deep,
            "logit_stats": self.logit_stats,
            "system_prompt": None if self.redact else prompt,
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


def range_options(
    calibration: Calibration | None,
    steps: int | None = None,
    window: str | None = None,
    drop_shallow: float | None = None,
    drop_deep: float | None = None,
) -> dict[str, Any]:
    """Return ScoreConfig's steps, window and drops: the calibration's own or, without one, those that are not None.

    Raises:
        ValueError: The calibration is for another window or other drops, or needs more steps.
    """
    given: dict[str, Any] = {"window": window, "drop_shallow": drop_shallow, "drop_deep": drop_deep}
    if calibration is None:
        return {name: value for name, value in {"steps": steps, **given}.items() if value is not None}
    if not calibration.ranged:  # step 0 alone decides: the rest is free, and by default not recorded
        free = {name: value for name, value in {"steps": steps, **given}.items() if value is not None}
        return free if steps is not None or window is not None else {**free, "steps": 0}
    own = {name: getattr(calibration, name) for name in given}
    given["window"] = None if window is None else str(Window.parse(window))
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


def check_context(steps: int, context: int | None, option: str = "steps") -> None:
    """ValueError if the steps of this option, with a prompt, exceed the model's context."""
    if context is not None and steps + 2 > context:
        raise ValueError(f"--{option} {steps} exceeds the model's context of {context:,} tokens, prompt included")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe, a line each, how the identities of two runs differ: in settings, inputs, model and engine."""
    lines = []
    for name in {**before["settings"], **now["settings"]}:  # another version, or command, may not have had a setting
        old, new = before["settings"].get(name), now["settings"].get(name)
        if old == new or not (old or new):
            continue
        if name == "system_prompt_sha256":
            lines.append("the system prompt is another one")
        elif name == "command":
            lines.append(f"it is a run of `headrift {old or 'score'}`")
        elif name == "calibration":
            was = "without one" if old is None else "with another one" if new is not None else "with one"
            lines.append(f"--calibration: the run was begun {was}")
        elif not name.startswith("system_prompt"):
            was, value = ("not given" if one in (None, [], {}) else str(one) for one in (old, new))
            lines.append(f"--{_OPTIONS.get(name, name).replace('_', '-')} was {was} and is {value}")
    old_files, new_files = ({file["name"]: file for file in identity["inputs"]} for identity in (before, now))
    if list(old_files) != list(new_files):
        changed = {"gone": set(old_files) - set(new_files), "new": set(new_files) - set(old_files)}
        changes = [f"{len(names)} {what} ({min(names)})" for what, names in changed.items() if names]
        lines.append(f"the input files are others: {', '.join(changes) or 'in another order'}")
    else:
        for name, old in old_files.items():
            if old != (new := new_files[name]):
                sizes = f": {old['bytes']:,} bytes then, {new['bytes']:,} now" if old["bytes"] != new["bytes"] else ""
                lines.append(f"the input {name} has changed{sizes}")
    if before["model"] != now["model"]:
        what = "the model is another one, or its files (weights, config.json, tokenizer, chat template) have changed"
        lines.append(what)
    elif before["engine"] is not None and now["engine"] is not None and before["engine"] != now["engine"]:
        others = [name for name, value in before["engine"].items() if value != now["engine"].get(name)]
        lines.append(f"the engine is another one: its {', '.join(others)}")
    return lines
