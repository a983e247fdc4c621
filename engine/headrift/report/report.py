"""Make the page from finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from headrift._version import __version__
from headrift.calibration.artifact import Calibration
from headrift.calibration.compare import side_by_side
from headrift.calibration.thresholds import CalibrationError
from headrift.fail_terms import FailTerms
from headrift.report import comparisons, html, plots, sections
from headrift.report.gather import ReportData, Say, common_range, gather, open_runs
from headrift.report.measure import by_run
from headrift.terminal import printable

_NOT_OPTIONS = {"system_prompt", "system_prompt_sha256"}


@dataclass(frozen=True, slots=True)
class ReportConfig:
    """What `headrift report` is asked for."""

    out: Path  # the page
    calibration: Path | None = None
    redact: bool = False  # leave out prompts, answers, system prompts and fail terms
    fail_terms: tuple[str, ...] = ()  # words that show an attack succeeded
    resamples: int = 200
    seed: int = 0


class Report:
    """A report on finished runs, which are read here.

    Raises:
        ReportError, CalibrationError: If the runs, the calibration or the page's name do not allow it.
    """

    def __init__(self, folders: Sequence[Path], config: ReportConfig, say: Say = lambda text: None) -> None:
        self._config, self._say = config, say
        self._output = html.Output(config.out)
        self._fail_terms = FailTerms(config.fail_terms) if config.fail_terms else None
        runs = open_runs(folders)
        self._calibration = None if config.calibration is None else Calibration.load(config.calibration)
        calibration = self._calibration
        score_range = common_range(runs) if calibration is None else comparisons.calibrated_range(calibration, runs)
        self._data = gather(runs, score_range, say)

    def write(self) -> Path:
        """Write the page and the folder of its figures, which is returned.

        Raises:
            OSError: If the disk fails; an older report is then unchanged.
        """
        self._output.begin()
        try:
            with plots.style():
                page = self._page()
            self._output.publish(page)
        finally:
            self._output.discard()
        return self._output.folder

    def _page(self) -> str:
        data, output, config, calibration = self._data, self._output, self._config, self._calibration
        self._say("measuring")
        in_short = sections.in_short(data, output)
        every: list[html.Section | None] = [
            sections.scores(data, output, None if calibration is None else calibration.threshold),
            sections.separation(data, output),
            sections.runs(by_run(data), data, output),
            None if calibration is None else comparisons.calibrated(calibration, data, output),
            sections.when(data, output, config.resamples),
            sections.where(data, output, config.resamples),
            sections.against(data, output),
            *self._compare_signals(),
            sections.examples(data, output, config.redact),
            _settings(data, config.redact),
        ]
        self._say("writing the page")
        output.numbers(headrift=__version__, window=str(data.score_range.window), layers=data.layers)
        return html.render(
            "report.html.j2",
            title=", ".join(data.names) if len(data.names) <= 3 else f"{len(data.names)} runs",
            model=data.runs[0].model.name,
            date=f"{datetime.now(UTC):%Y-%m-%d}, headrift {__version__}",
            in_short=in_short,
            sections=[section for section in every if section is not None],
            files=output.folder.name,
            redact=config.redact,
        )

    def _compare_signals(self) -> list[html.Section]:
        data, config = self._data, self._config
        if not data.has_both_classes:
            return comparisons.not_compared(sections.NEEDS_BOTH_CLASSES)
        if not np.isfinite(data.score).any():
            return comparisons.not_compared(sections.NO_SCORE)
        options: dict[str, Any] = {"resamples": config.resamples, "seed": config.seed, "say": self._say}
        try:
            result = side_by_side(data.runs, data.score_range, rows=data.rows, fail_terms=self._fail_terms, **options)
        except CalibrationError as error:
            return comparisons.not_compared(str(error))
        return comparisons.compared(result, self._output, config.fail_terms, config.redact)


def _settings(data: ReportData, redact: bool) -> html.Section:
    """Settings, versions and system prompts of the runs."""
    described = [_describe(run_json) for run_json in data.run_json]
    values = {name: [one.get(name, "") for one in described] for name in dict.fromkeys(n for d in described for n in d)}
    same = [(name, texts[0]) for name, texts in values.items() if len(set(texts)) == 1]
    differ = {name: texts for name, texts in values.items() if len(set(texts)) > 1}
    columns = ("setting", "of all runs" if len(data.runs) > 1 else "value")
    blocks: list[html.Block] = [html.Table(columns, [("report made by", f"headrift {__version__}"), *same])]
    if differ:
        rows = [(run, *(texts[i] for texts in differ.values())) for i, run in enumerate(data.names)]
        blocks.append(html.Table(("run", *differ), rows))
    prompts = {
        f"system prompt of {name}": _system_prompt(run_json["settings"], redact)
        for name, run_json in zip(data.names, data.run_json)
    }
    blocks.append(html.Details({name: text for name, text in prompts.items() if text}))
    return html.Section("settings", "Settings and versions", blocks)


def _describe(run_json: Mapping[str, Any]) -> dict[str, str]:
    """What a run.json says, as text by name; without what is empty."""
    engine = {key: run_json["engine"].get(key) for key in ("dtype", "layers", "heads", "max_model_len")}
    options = {key: value for key, value in run_json["settings"].items() if key not in _NOT_OPTIONS}
    host, inputs = run_json.get("host") or {}, run_json.get("inputs", [])
    values = {
        "model": Path(run_json["model"]["path"]).name,
        "model's fingerprint": _short(run_json["model"].get("fingerprint")),
        "chat template": _short(run_json.get("chat_template_sha256")),
        **engine,
        **{f"--{key.replace('_', '-')}": value for key, value in options.items()},
        **{f"version of {key}": value for key, value in run_json.get("versions", {}).items()},
        "scored on": [f"{value} {key}" if key == "cores" else value for key, value in host.items()],
        "scored at": run_json.get("finished", ""),
        "inputs": [f"{Path(one['name']).name} ({_short(one.get('sha256'))})" for one in inputs],
    }
    return {
        name: printable(", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for name, value in values.items()
        if value not in (None, "", [], {}, False)
    }


def _system_prompt(settings: Mapping[str, Any], redact: bool) -> str:
    prompt, digest = settings.get("system_prompt"), settings.get("system_prompt_sha256")
    if prompt and not redact:
        return printable(str(prompt))
    return f"left out; its SHA-256 is {digest}" if digest else ""


def _short(digest: Any) -> str:
    """The beginning of a hash, which is enough to tell two apart."""
    return str(digest)[:12] if digest else ""
