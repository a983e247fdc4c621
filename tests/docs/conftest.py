"""The pages of the repository, and the commands that they show."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "datasets/README.md", "requirements/README.md")]
PAGES += [page for page in sorted(ROOT.glob("docs/**/*.md")) if page != ROOT / "docs/reference/cli.md"]  # generated
STARTS = ("headrift", "make", "python", "pip", "ray")
LEFT_OUT = "..."


class Shown(SimpleNamespace):
    """A command that a page shows.

    Attributes:
        page, line: where it is.
        text: as written.
        words: its arguments, without comments and without the brackets around optional ones.
        open: something is left out (`...`).
        block: it is in a code block, not in a sentence.
    """

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text}"


def _logical(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Join lines that are continued, after a backslash or by indentation; of a session (`$ `), only what is typed."""
    joined: list[tuple[int, str]] = []
    session = any(line.startswith("$ ") for line in lines)
    for number, line in enumerate(lines):
        before = joined[-1][1] if joined else ""
        if before.endswith("\\") or (before and not session and line.startswith(" ")):
            joined[-1] = (joined[-1][0], f"{before.removesuffix(chr(92))} {line.strip()}")
        elif not session or line.startswith("$ "):
            joined.append((number, line.removeprefix("$ ")))
    return iter(joined)


def _shown(page: Path, line: int, text: str, block: bool) -> Shown | None:
    first = text.split()[0].rpartition("/")[2] if text.strip() else ""
    if first not in STARTS or (not block and " " not in text.strip()):
        return None
    # A remark after a command is three blanks away, or after a #.
    bare = re.split(r" {3,}", text.strip())[0]
    if first == "headrift":
        bare = bare.replace("[", "").replace("]", "")
    words = shlex.split(bare, comments=True)
    opened = any(word.endswith(LEFT_OUT) for word in words)
    words = [first, *(word.removesuffix(LEFT_OUT) for word in words[1:] if word != LEFT_OUT)]
    return Shown(page=page, line=line, text=text.strip(), words=words, open=opened or not block, block=block)


def _of_page(page: Path) -> Iterator[Shown]:
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        if token.type in ("code_block", "fence") and token.info != "python":
            for number, text in _logical(token.content.splitlines()):
                if shown := _shown(page, token.map[0] + number + 1, text, block=True):
                    yield shown
        for child in token.children or ():
            if child.type == "code_inline" and (shown := _shown(page, token.map[0] + 1, child.content, block=False)):
                yield shown


@pytest.fixture(scope="session")
def shown() -> list[Shown]:
    """All commands on all pages."""
    return [command for page in PAGES for command in _of_page(page)]
