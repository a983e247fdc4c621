"""Runs in, a page out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from headrift._version import __version__
from headrift.calibration.record import Calibration
from headrift.calibration.settings import CalibrationError
from headrift.calibration.side_by_side import side_by_side
from headrift.fail_terms import FailTerms
from headrift.report import calibrated, compared, plots, sections, words
from headrift.report.gather import Say, cell_of, gather, open_runs
from headrift.report.measure import by_run
from headrift.report.output import Output, Section
from headrift.report.settings import settings as settings_section


@dataclass(frozen=True, slots=True)
class Settings:
    """out: the page. redact: no prompt, answer, system prompt or fail term is in it. fail_terms: what the answer of an
    attack that succeeded holds. resamples: that intervals are from; seed: of all draws."""

    out: Path
    calibration: Path | None = None
    redact: bool = False
    fail_terms: tuple[str, ...] = ()
    resamples: int = 200
    seed: int = 0


class Report:
    """A report on finished runs, which are read here.

    ReportError and CalibrationError where the runs, the calibration or --out do not allow it; nothing is written then.
    """

    def __init__(self, folders: Sequence[Path], settings: Settings, say: Say = lambda text: None) -> None:
        self._settings, self._say = settings, say
        self._output = Output(settings.out)
        self._fail_terms = FailTerms(settings.fail_terms) if settings.fail_terms else None
        runs = open_runs(folders)
        self._calibration = None if settings.calibration is None else Calibration.load(settings.calibration)
        cell = cell_of(runs) if self._calibration is None else calibrated.cell_of(self._calibration, runs)
        self._of = gather(runs, cell, say)

    def write(self) -> Path:
        """Write the page and, beside it, the folder with its figures, which is returned.

        OSError where the disk fails: an older report is then as it was.
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
        of, output, settings = self._of, self._output, self._settings
        self._say("measuring")
        runs = by_run(of)
        found: list[Section | None] = [
            sections.distributions(of, output, None if self._calibration is None else self._calibration.threshold),
            sections.separation(of, output),
            sections.runs(runs, of, output),
            None if self._calibration is None else calibrated.calibrated(self._calibration, of, output),
            sections.when(of, output, settings.resamples),
            sections.where(of, output, settings.resamples),
            sections.beside(of, output),
            *self._compared(),
            sections.examples(of, output, settings.redact),
            settings_section(of, settings.redact),
        ]
        self._say("writing the page")
        summary = words.summary(of, runs)
        output.numbers(headrift=__version__, summary=summary, window=str(of.cell.window), layers=of.layers)
        return rendered(
            "report.html.j2",
            title=", ".join(of.names) if len(of.names) <= 3 else f"{len(of.names)} runs",
            model=of.runs[0].model.name,
            made=f"{datetime.now(UTC):%Y-%m-%d}, headrift {__version__}",
            summary=summary,
            sections=[section for section in found if section is not None],
            files=output.folder.name,
            redact=settings.redact,
        )

    def _compared(self) -> list[Section]:
        of, settings = self._of, self._settings
        if not of.both:
            return compared.absent(sections.NO_BOTH)
        if not np.isfinite(of.score).any():
            return compared.absent(sections.NO_SCORE)
        asked: dict[str, Any] = {"resamples": settings.resamples, "seed": settings.seed, "say": self._say}
        try:
            found = side_by_side(of.runs, of.cell, fail_terms=self._fail_terms, **asked)
        except CalibrationError as error:
            return compared.absent(str(error))
        return compared.compared(found, self._output, settings.fail_terms, settings.redact)


def _coded(text: str) -> Any:
    """The text, escaped, with what is in `backticks` set as code."""
    from markupsafe import Markup, escape

    parts = str(text).split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


def rendered(template: str, **content: Any) -> str:
    """A page of what its template names: see report.html.j2, which others extend."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("headrift.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["coded"] = _coded
    return environment.get_template(template).render(**content)
