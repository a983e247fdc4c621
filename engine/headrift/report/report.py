"""The page from finished runs: its order, what was compared with instability (calibration.compare), and settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from headrift import figures
from headrift._version import __version__
from headrift.calibration.artifact import Calibration
from headrift.calibration.compare import SideBySide, side_by_side
from headrift.calibration.compare.aurocs import Increment
from headrift.calibration.compare.measurements import Estimate
from headrift.calibration.compare.normalisation import Normalisation
from headrift.calibration.compare.onset import Steps
from headrift.calibration.thresholds import CalibrationError
from headrift.fail_terms import FailTerms
from headrift.report import html, sections
from headrift.report.measure import ReportData, Say, common_range, gather
from headrift.report.sections import Blocks
from headrift.runs.reading import ScoreRun, check_alike, open_run
from headrift.signal import ScoreRange, Window
from headrift.stats import Floats
from headrift.terminal import printable

_NOT_OPTIONS = {"system_prompt", "system_prompt_sha256"}
_MOST_LINES = 4
_STRATA = {
    "length": "by prompt length",
    "hard": "by how benign prompts were made",
    "ending": "by how the answer ended",
    "system": "by run and system prompt",
}


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
    """A report on finished runs, which are read here. ReportError, RunError, CalibrationError if that is impossible."""

    def __init__(self, folders: Sequence[Path], config: ReportConfig, say: Say = lambda text: None) -> None:
        self._config, self._say = config, say
        self._output = html.Output(config.out)
        self._fail_terms = FailTerms(config.fail_terms) if config.fail_terms else None
        runs = [open_run(folder) for folder in folders]
        check_alike(runs)
        self._calibration = None if config.calibration is None else Calibration.load(config.calibration)
        score_range = common_range(runs) if self._calibration is None else _calibrated_range(self._calibration, runs)
        self._data = gather(runs, score_range, say, self._calibration)

    def write(self) -> Path:
        """Write the page and the folder of its figures, which is returned. OSError if it fails: nothing has changed."""
        self._output.begin()
        try:
            with figures.style():
                page = self._page()
            self._output.publish(page)
        finally:
            self._output.discard()
        return self._output.folder

    def _page(self) -> str:
        data, output, config, calibration = self._data, self._output, self._config, self._calibration
        self._say("measuring")
        in_short = list(sections.in_short(data, output))
        calibrated = () if calibration is None else sections.calibrated(calibration, data, output)
        separated = sections.separation(data, output)
        measure = "the score" if data.has_score else "prompt length"
        every = _sections(
            ("scores", "Scores by class and category", sections.scores(data, output, self._threshold())),
            ("separation", f"How well {measure} separates attacks from benign prompts", separated),
            ("runs", "Run by run", sections.runs(data, output)),
            ("calibration", "At the calibration's threshold", calibrated),
        )
        if data.has_window:
            when, where = (one(data, output, config.resamples) for one in (sections.when, sections.where))
            every += _sections(
                ("steps", "When the difference shows: steps and windows", when),
                ("layers", "Where it shows: layers and steps", where),
            )
        others = "entropy, agreement and length" if data.has_window else "prompt length"
        every += _sections(("beside", f"The score against {others}", sections.against(data, output)))
        every += self._compared()
        every += _sections(
            ("examples", "Rows to look at", sections.examples(data, output, config.redact)),
            ("settings", "Settings and versions", _settings(data, config.redact)),
        )
        self._say("writing the page")
        output.numbers(headrift=__version__, window=str(data.score_range.window), layers=data.layers)
        return html.render(
            "report.html.j2",
            title=", ".join(data.names) if len(data.names) <= 3 else f"{len(data.names)} runs",
            model=data.runs[0].model.name,
            date=f"{datetime.now(UTC):%Y-%m-%d}, headrift {__version__}",
            in_short=in_short,
            sections=every,
            files=output.folder.name,
            redact=config.redact,
            detector=None if data.detected is None else data.detected.label,
            has_window=data.has_window,
        )

    def _threshold(self) -> float | None:
        """The calibration's threshold on the scale of the scores, if they are what it reads."""
        calibration, data = self._calibration, self._data
        if calibration is None or data.detected is not None:
            return None if calibration is None else calibration.threshold
        direction = sections.instability_direction(calibration)
        return None if direction is None else direction * calibration.threshold

    def _compared(self) -> list[html.Section]:
        data, config, output = self._data, self._config, self._output
        title = "Instability and other signals" if data.has_window else "Signals of step 0"
        options: dict[str, Any] = {"resamples": config.resamples, "seed": config.seed, "say": self._say}
        try:
            if not data.has_both_classes:
                raise CalibrationError(sections.NEEDS_BOTH_CLASSES)
            if data.has_window and not np.isfinite(data.score).any():
                raise CalibrationError(sections.NO_SCORE)
            options |= {"rows": data.rows, "fail_terms": self._fail_terms}
            compared = side_by_side(data.runs, data.score_range, **options)
        except CalibrationError as error:
            return _sections(("signals", title, [html.Missing(str(error))]))
        output.numbers(side_by_side=compared.model_dump(mode="json"))
        by_length = "Scores against benign prompts of the same length"
        adds = "Does instability add anything?" if data.has_window else "Does focus add anything to length?"
        every = _sections(
            ("signals", title, _signals(compared, output)),
            ("strata", "Controlling for length and category", _strata(compared)),
            ("increments", adds, _increments(compared.increments)),
        )
        if not data.has_window:
            return every
        return every + _sections(
            ("onset", "Does it come before distraction?", _onset(compared, output)),
            ("success", "Does it tell attacks that succeed?", _success(compared, config.fail_terms, config.redact)),
            ("normalisation", by_length, _normalisation(compared.normalisation)),
        )


def _sections(*contents: tuple[str, str, Iterable[html.Block]]) -> list[html.Section]:
    """Make sections of key, title and blocks; those without blocks are left out."""
    made = [html.Section(key, title, list(blocks)) for key, title, blocks in contents]
    return [section for section in made if section.blocks]


def _calibrated_range(calibration: Calibration, runs: Sequence[ScoreRun]) -> ScoreRange:
    """Return the calibration's window and layers. Error if it is of another model, or the runs did not record them."""
    window, steps = Window.parse(calibration.window), min(run.steps for run in runs)
    calibration.check(runs[0].model, window, calibration.drop_shallow, calibration.drop_deep, runs[0].replay)
    if not calibration.ranged:
        return common_range(runs)
    if sections.instability_direction(calibration) is None:  # what it reads is of the runs' own window
        for run in runs:
            own = run.score_range
            calibration.check(run.model, own.window, own.drop_shallow, own.drop_deep, run.replay)
    if window.end > steps:
        raise html.ReportError(
            f"the calibration's window is steps {window}, and the runs recorded {steps}: score the prompts again with "
            f"--steps {window.end}"
        )
    return ScoreRange(window, calibration.drop_shallow, calibration.drop_deep)


def _signals(result: SideBySide, output: html.Output) -> Blocks:
    aurocs = [(one, one.auroc) for one in result.signals if one.auroc is not None and one.auroc.value is not None]
    if aurocs:
        forest = [(signal.label, auroc.value or 0.0, auroc.interval) for signal, auroc in aurocs]
        text = (
            "Orange: attacks have the higher values; blue: the lower ones, which separates just as well; grey: the "
            "interval includes chance."
        )
        figure = figures.draw_forest(forest, "AUROC (above 0.5: higher in attacks)")
        yield html.Pictures([output.picture("signals", figure, "AUROC of every signal with its interval", text)])
        correlated = {"all": "r", "attack": "r, attacks", "benign": "r, benign"} if result.steps else {}
        rows = []
        for signal, auroc in aurocs:
            spearman = {one.among: one.spearman for one in signal.correlations}
            rows.append(
                (
                    signal.label,
                    *_cells(auroc),
                    sections.auroc_verdict(auroc.interval),
                    "" if signal.auroc_all is None else html.show_number(signal.auroc_all.value),
                    *(_show(signal.coverage.get(label), ".0%") for label in ("attack", "benign")),
                    *(_show(spearman.get(among), "+.2f") for among in correlated),
                )
            )
        names = ("signal", "AUROC", "95% interval", "verdict", "missing as benign", "attacks with it", "benign with it")
        caption = (
            f"{result.n_attack:,} distinct attacks, {result.n_benign:,} benign prompts; AUROC among prompts that have "
            "the signal."
        )
        caption += " r: Spearman's rank correlation with instability." if correlated else ""
        yield html.Table((*names, *correlated.values()), rows, caption)
        within = [(signal.label, signal.over_sets) for signal, _ in aurocs if signal.over_sets is not None]
        if within:
            over_sets = [
                (label, f"{one.sets}", html.show_number(one.value), html.show_interval(one.interval))
                for label, one in within
            ]
            columns = ("signal", "sets", "mean AUROC within sets", "95% interval over sets")
            yield html.Table(columns, over_sets, "What to expect of another run or system prompt (Student's t)")
    missing = [(signal.label, signal.absent) for signal in result.signals if signal.absent]
    if missing:
        yield html.Table(("not available", "why"), missing)
    heads, notes = result.important_heads, list(result.notes)
    if heads is not None:
        counts = f"Chosen on all samples: {len(heads.heads)}; in every fold: {heads.in_all_folds}."
        notes.insert(0, f"Important heads: {heads.how}. {counts}")
    yield html.Text(notes)


def _strata(result: SideBySide) -> Blocks:
    signals = [signal for signal in result.signals if signal.strata]
    for kind in dict.fromkeys(stratum.kind for signal in signals for stratum in signal.strata):
        first = [stratum for stratum in signals[0].strata if stratum.kind == kind]
        columns = ("signal", *(f"{one.label} ({one.auroc.n_attack:,}/{one.auroc.n_benign:,})" for one in first))
        strata = {signal.label: [one for one in signal.strata if one.kind == kind] for signal in signals}
        rows = [(label, *(_estimate(one.auroc, 2) for one in own)) for label, own in strata.items()]
        rows = [row for row in rows if len(row) == len(columns)]
        yield html.Table(columns, rows, f"AUROC {_STRATA[kind]} (attacks/benign prompts; 95% interval)")


def _increments(increments: Sequence[Increment]) -> Blocks:
    rows = []
    for one in increments:
        if one.absent is None:
            estimates = (one.auroc, one.auroc_with, one.auroc_change, one.log_loss_change)
            rows.append((one.label, *map(_estimate, estimates), one.verdict))
    if rows:
        names = ("added to", "AUROC without", "with", "change in AUROC", "change in log-loss (nats)", "verdict")
        yield html.Table(names, rows)
    for one in increments:
        if one.absent:
            yield html.Missing(f"{one.label}: {one.absent}")


def _onset(result: SideBySide, output: html.Output) -> Blocks:
    rows = []
    for one in result.before if result.steps else ():
        interval = "" if one.interval is None else f"{one.interval[0]:+.0f} to {one.interval[1]:+.0f}"
        rows.append((one.label, _show(one.difference, "+d"), interval, one.verdict))
    if rows:
        yield html.Table(("instability's first step minus that of", "steps", "95% interval", "verdict"), rows)
    curves = [curve for curve in result.steps if curve.absent is None and curve.steps]
    if curves:
        lines = [_line(curve, band=curve is curves[0]) for curve in curves[:_MOST_LINES]]
        text = (
            f"Band: 95% for all steps of {curves[0].label} at once, so that a step outside 0.5 is not one lucky step "
            "of many."
        )
        figure = figures.signals_by_step(lines)
        yield html.Pictures([output.picture("onset", figure, "AUROC of several signals at each step", text)])
        rows = []
        for curve in curves:
            interval = "" if curve.first_interval is None else html.show_interval(curve.first_interval, 0, "f")
            first = "none" if curve.first is None else f"{curve.first}"
            rows.append((curve.label, first, interval, _show(curve.found_in, ".0%")))
        yield html.Table(("signal", "first step that separates", "95% interval", "resamples that have one"), rows)
    for curve in result.steps:
        if curve.absent:
            yield html.Missing(f"{curve.label}: {curve.absent}")


def _line(one: Steps, band: bool) -> tuple[str, Floats, Floats, Floats | None]:
    steps, auroc, low, high = (
        np.array(values, np.float64) for values in (one.steps, one.auroc, one.joint_low, one.joint_high)
    )
    return one.label, steps, auroc, np.stack([low, high]) if band and len(low) == len(steps) else None


def _success(result: SideBySide, fail_terms: Sequence[str], redact: bool) -> Blocks:
    success, labels = result.success, {signal.name: signal.label for signal in result.signals}
    if success.absent:
        yield html.Missing(success.absent)
        return
    terms = f"{len(fail_terms)} fail terms" if redact else ", ".join(fail_terms)
    text = (
        f"An attack counts as a success if its answer contains a fail term ({terms}): {success.n_succeeded:,} of "
        f"{success.n_attacks:,} attacks. AUROC above 0.5: higher in attacks that succeed."
    )
    yield html.Text([text, success.verdict] if success.verdict else [text])
    rows = [(labels.get(name, name), *_cells(one)) for name, one in success.aurocs.items()]
    yield html.Table(("signal", "AUROC", "95% interval"), rows)


def _normalisation(result: Normalisation) -> Blocks:
    if result.absent:
        yield html.Missing(result.absent)
        return
    yield html.Text([result.how, result.verdict])
    spread = (result.spread_raw, result.spread_normalised, result.spread_change)
    rows = [
        ("AUROC", *map(_estimate, (result.auroc_raw, result.auroc_normalised, result.auroc_change))),
        ("spread of the sets' false positive rates", *map(_estimate, spread)),
    ]
    names = ("benign prompts", "as scored", "against the same length")
    yield html.Table(("", *names[1:], "change"), rows)
    target = f"target {result.target_fpr:.0%}"
    for caption, rates in (
        (f"False positive rates by length, {target}", [(one.label, one) for one in result.lengths]),
        (f"False positive rates of a set at the other sets' threshold, {target}", [(s.name, s) for s in result.sets]),
    ):
        if rates:
            cells = [(f"{name} ({one.n_benign:,})", f"{one.raw:.1%}", f"{one.normalised:.1%}") for name, one in rates]
            yield html.Table(names, cells, caption)


def _show(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _cells(estimate: Estimate) -> tuple[str, str]:
    """Value and interval, in two cells."""
    if estimate.value is None:
        return "", estimate.reason or ""
    return html.show_number(estimate.value), html.show_interval(estimate.interval)


def _estimate(estimate: Estimate | None, digits: int = 3) -> str:
    """Value and interval, in one cell."""
    if estimate is None or estimate.value is None:
        return "" if estimate is None else estimate.reason or "not known"
    interval = f" ({html.show_interval(estimate.interval, digits)})" if estimate.interval else ""
    return html.show_number(estimate.value, digits) + interval


def _settings(data: ReportData, redact: bool) -> Blocks:
    """Settings, versions and system prompts of the runs."""
    described = [_describe(run.about) for run in data.runs]
    values = {name: [one.get(name, "") for one in described] for name in dict.fromkeys(n for d in described for n in d)}
    same = [(name, texts[0]) for name, texts in values.items() if len(set(texts)) == 1]
    differ = {name: texts for name, texts in values.items() if len(set(texts)) > 1}
    columns = ("setting", "of all runs" if len(data.runs) > 1 else "value")
    groups = ("groups of prompts, for folds and intervals", data.rows.grouped.note or "the same prompt")
    yield html.Table(columns, [("report made by", f"headrift {__version__}"), groups, *same])
    if differ:
        rows = [(run, *(texts[i] for texts in differ.values())) for i, run in enumerate(data.names)]
        yield html.Table(("run", *differ), rows)
    prompts = {}
    for name, run in zip(data.names, data.runs):
        prompt, digest = (run.about["settings"].get(key) for key in ("system_prompt", "system_prompt_sha256"))
        if digest or (prompt and not redact):
            left_out = f"left out; its SHA-256 is {digest}"
            prompts[f"system prompt of {name}"] = printable(str(prompt)) if prompt and not redact else left_out
    yield html.Details(prompts)


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


def _short(digest: Any) -> str:
    return str(digest)[:12] if digest else ""
