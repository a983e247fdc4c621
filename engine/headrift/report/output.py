"""What the page is made of, and the folder beside it: each figure as PNG and SVG, and figures.json with the numbers."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import BaseModel

from headrift.report.gather import ReportError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERS = "figures.json"
_KINDS = {".png", ".svg", ".json"}
_DPI = 150
_COLOURS = 256  # of a palette: a PNG is a third as large, and looks the same


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure: its file's name without an ending, the PNG as a data: address, its size in pixels, and words."""

    name: str
    address: str
    width: int
    height: int
    alt: str
    caption: str


@dataclass(frozen=True, slots=True)
class Text:
    """Paragraphs."""

    kind: ClassVar[str] = "text"
    paragraphs: Sequence[str]


@dataclass(frozen=True, slots=True)
class Points:
    """Statements, one below the other."""

    kind: ClassVar[str] = "points"
    points: Sequence[str]


@dataclass(frozen=True, slots=True)
class Missing:
    """Why something is not here."""

    kind: ClassVar[str] = "missing"
    why: str


@dataclass(frozen=True, slots=True)
class Pictures:
    """Figures, beside each other where there is room."""

    kind: ClassVar[str] = "pictures"
    pictures: Sequence[Picture]


@dataclass(frozen=True, slots=True)
class Table:
    """Cells under their columns' names; the first column is for labels."""

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """A row of the data: facts, texts by their name (or why there are none), and its heatmap."""

    heading: str
    facts: Sequence[str]
    texts: Mapping[str, str]
    no_texts: str
    picture: Picture


@dataclass(frozen=True, slots=True)
class Cards:
    """Rows of the data, under a title."""

    kind: ClassVar[str] = "cards"
    title: str
    cards: Sequence[Card]


@dataclass(frozen=True, slots=True)
class Details:
    """Texts by name that are shown when asked for."""

    kind: ClassVar[str] = "details"
    texts: Mapping[str, str]


Block = Text | Points | Missing | Pictures | Table | Cards | Details


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page. key: for links to it."""

    key: str
    title: str
    blocks: Sequence[Block]


class Output:
    """Takes figures and numbers into a hidden folder; `publish` gives it and the page their names.

    out: the page. ReportError where it, or the folder, is something else already. OSError where the disk fails.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self.folder = out.with_name(f"{out.stem}-files")
        self._hidden = out.with_name(f".{out.stem}-files.tmp")
        self._check()
        self._numbers: dict[str, Any] = {}

    def _check(self) -> None:
        if self._out.is_dir() or not self._out.parent.is_dir():
            raise ReportError(
                f"--out {self._out} is a folder, or is in none: name a file, as report.html, in a folder that exists"
            )
        if not self._out.stem or self._out.suffix not in (".html", ".htm"):
            raise ReportError(f"--out {self._out} is no name of a page: let it end in .html")
        if not os.access(self._out.parent, os.W_OK | os.X_OK):
            raise ReportError(f"--out {self._out}: its folder cannot be written to; choose another")
        if self.folder.exists() and not _is_ours(self.folder):
            raise ReportError(
                f"{self.folder}, where the figures go, holds other things: choose another name for --out, or move them"
            )

    def begin(self) -> None:
        """Make the hidden folder."""
        shutil.rmtree(self._hidden, ignore_errors=True)
        self._hidden.mkdir()

    def picture(self, name: str, figure: Figure, alt: str, caption: str) -> Picture:
        """A figure, written as PNG and SVG."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script that the font does not have
            png = _small_png(figure)
            figure.savefig(self._hidden / f"{name}.svg", format="svg", dpi=_DPI, metadata={"Date": None})
        (self._hidden / f"{name}.png").write_bytes(png)
        width, height = (int(side * _DPI) for side in figure.get_size_inches())
        return Picture(name, f"data:image/png;base64,{base64.b64encode(png).decode()}", width, height, alt, caption)

    def numbers(self, **of: Any) -> None:
        """Numbers for figures.json: dataclasses, pydantic models and arrays too."""
        self._numbers |= {name: plain(value) for name, value in of.items()}

    def publish(self, page: str) -> None:
        """Write the page and the numbers, and name everything."""
        text = json.dumps(self._numbers, indent=1, ensure_ascii=False, allow_nan=False)
        (self._hidden / NUMBERS).write_text(text + "\n", encoding="utf-8")
        temporary = self._out.with_name(f".{self._out.name}.tmp")
        temporary.write_text(page, encoding="utf-8")
        shutil.rmtree(self.folder, ignore_errors=True)
        self._hidden.replace(self.folder)
        temporary.replace(self._out)

    def discard(self) -> None:
        """Leave nothing of an unfinished report."""
        shutil.rmtree(self._hidden, ignore_errors=True)
        self._out.with_name(f".{self._out.name}.tmp").unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """A value as JSON has it; None for NaN."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json"))
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {" / ".join(key) if isinstance(key, tuple) else str(key): plain(of) for key, of in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(of) for of in value]
    if isinstance(value, float):
        return None if value != value else float(f"{value:.6g}")
    return value


def _small_png(figure: Figure) -> bytes:
    from PIL import Image

    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    image = Image.open(drawn).convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    image.save(packed, "png", optimize=True)
    return packed.getvalue()


def _is_ours(folder: Path) -> bool:
    """Whether it is a folder that holds a report's figures and nothing else."""
    if not folder.is_dir():
        return False
    found = list(folder.iterdir())
    return not found or ((folder / NUMBERS) in found and {path.suffix for path in found} <= _KINDS)
