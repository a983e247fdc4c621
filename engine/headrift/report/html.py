"""The building blocks of a page, and its folder: every figure as PNG and SVG, and figures.json with the numbers."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import BaseModel

from headrift.stats import Bounds, side

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERS = "figures.json"
NOT_SHOWN = "not shown"
_SUFFIXES = {".png", ".svg", ".json"}
_DPI = 150
_COLOURS = 256  # with a palette a PNG is a third as large and looks the same


class ReportError(ValueError):
    """No report can be made of these runs. The message says why and what to do."""


class Picture(NamedTuple):
    name: str  # of its files, without a suffix
    url: str  # the PNG as a data: URL
    width: int  # pixels
    height: int
    alt: str
    caption: str


class Card(NamedTuple):
    heading: str
    facts: Sequence[str]
    texts: Mapping[str, str]
    no_texts: str  # why there are none
    picture: Picture


# The blocks of a section, which the template tells apart by their class.


class Text(NamedTuple):
    paragraphs: Sequence[str]


class Missing(NamedTuple):
    reason: str  # why something is not on the page


class Pictures(NamedTuple):
    pictures: Sequence[Picture]  # side by side if there is room


class Table(NamedTuple):
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]  # of cells; the first column contains the rows' names
    caption: str = ""


class Cards(NamedTuple):
    title: str
    cards: Sequence[Card]


class Details(NamedTuple):
    texts: Mapping[str, str]  # by name, collapsed until they are clicked


Block = Text | Missing | Pictures | Table | Cards | Details


class Section(NamedTuple):
    key: str  # its anchor
    title: str
    blocks: Sequence[Block]


def show_number(value: float | None, digits: int = 3) -> str:
    """Format a number for a table, to so many significant digits; empty for None and NaN."""
    return "" if value is None or np.isnan(value) else f"{value:#.{digits}g}"


def show_interval(interval: Bounds | None, digits: int = 3, kind: str = "g") -> str:
    """Format a 95% interval for a table. kind: as in format specifications, "g", "f" or "%"."""
    form = f"#.{digits}{kind}" if kind == "g" else f".{digits}{kind}"
    return "too few" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def several(n: int) -> str:
    """What a reader of several intervals must know; empty for one."""
    return f"Intervals are 95% each: of {n} that show nothing, about one in 20 would say so." if n > 1 else ""


def verdict(interval: Bounds | None, above: str, below: str, null: float = 0.0) -> str:
    """Return what an interval shows: `above` or `below` if it leaves out `null`, the value that means no effect."""
    if interval is None:
        return "too few prompts"
    return {1: above, -1: below, None: NOT_SHOWN}[side(interval, null)]


class Output:
    """Collects figures and numbers in a hidden folder; `publish` renames it and the page when both are complete.

    ReportError if the page or its folder cannot be written, or the folder contains other files.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self.folder = out.with_name(f"{out.stem}-files")
        self._hidden = out.with_name(f".{out.stem}-files.tmp")
        self._numbers: dict[str, Any] = {}
        if out.is_dir() or not out.parent.is_dir():
            raise ReportError(f"--out {out} is a folder or in none: name a file, as report.html")
        if not out.stem or out.suffix not in (".html", ".htm"):
            raise ReportError(f"--out {out} is not the name of a page: it has to end in .html")
        if not os.access(out.parent, os.W_OK | os.X_OK):
            raise ReportError(f"--out {out}: its folder is not writable; choose another")
        if self.folder.exists() and not _is_report_folder(self.folder):
            raise ReportError(f"{self.folder}, the figures' folder, contains other files: choose another --out")

    def begin(self) -> None:
        shutil.rmtree(self._hidden, ignore_errors=True)
        self._hidden.mkdir()

    def picture(self, name: str, figure: Figure, title: str, text: str = "") -> Picture:
        """Write a figure as PNG and SVG. title: the alt text, unique on the page, and the beginning of the caption."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script that the font does not have
            png = _small_png(figure)
            figure.savefig(self._hidden / f"{name}.svg", format="svg", dpi=_DPI, metadata={"Date": None})
        (self._hidden / f"{name}.png").write_bytes(png)
        width, height = (int(side * _DPI) for side in figure.get_size_inches())
        url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        return Picture(name, url, width, height, title, f"{title}. {text}".strip())

    def numbers(self, **values: Any) -> None:
        """Add numbers to figures.json: dataclasses, pydantic models and arrays too."""
        self._numbers |= {name: plain(value) for name, value in values.items()}

    def publish(self, page: str) -> None:
        """Write the page and the numbers, then rename everything to its final name."""
        text = json.dumps(self._numbers, indent=1, ensure_ascii=False, allow_nan=False)
        (self._hidden / NUMBERS).write_text(text + "\n", encoding="utf-8")
        temporary = self._out.with_name(f".{self._out.name}.tmp")
        temporary.write_text(page, encoding="utf-8")
        shutil.rmtree(self.folder, ignore_errors=True)
        self._hidden.replace(self.folder)
        temporary.replace(self._out)

    def discard(self) -> None:
        shutil.rmtree(self._hidden, ignore_errors=True)
        self._out.with_name(f".{self._out.name}.tmp").unlink(missing_ok=True)


def render(template: str, **content: Any) -> str:
    """Render a template of report/templates. report.html.j2 is the base, and names what it needs."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("headrift.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"code": mark_code, "sentence": _sentence}
    return environment.get_template(template).render(**content)


def _sentence(text: str) -> Any:
    """Begin a statement with a capital letter and end it with a full stop."""
    return mark_code(f"{text[0].upper()}{text[1:]}{'' if text[-1] in '.!?:' else '.'}")


def mark_code(text: str) -> Any:
    """Escape a text and set what is in `backticks` as code."""
    from markupsafe import Markup, escape

    parts = str(text).split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


def plain(value: Any) -> Any:
    """Convert a value to what JSON has; NaN becomes None."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json"))
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {" / ".join(key) if isinstance(key, tuple) else str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return None if value != value else float(f"{value:.6g}")
    return value


def _small_png(figure: Figure) -> bytes:
    from PIL import Image

    full, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=_DPI)
    image = Image.open(full).convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    image.save(packed, "png", optimize=True)
    return packed.getvalue()


def _is_report_folder(folder: Path) -> bool:
    """Whether a folder contains a report's figures and nothing else."""
    paths = list(folder.iterdir()) if folder.is_dir() else [folder]
    return not paths or ((folder / NUMBERS) in paths and {path.suffix for path in paths} <= _SUFFIXES)
