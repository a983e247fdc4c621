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
    """A command as a page shows it. page, line: where it is. text: as it is. words: its arguments, without comments,
    with what stands in [brackets]. open: more belongs to it (`...`). block: it stands by itself, not in a sentence."""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text}"


def _logical(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Lines with what continues them: after a backslash, or in a usage line further in. Of a session, in which a prompt
    stands before what is typed, only that."""
    found: list[tuple[int, str]] = []
    session = any(line.startswith("$ ") for line in lines)
    for number, line in enumerate(lines):
        before = found[-1][1] if found else ""
        if before.endswith("\\") or (before and not session and line.startswith(" ")):
            found[-1] = (found[-1][0], f"{before.removesuffix(chr(92))} {line.strip()}")
        elif not session or line.startswith("$ "):
            found.append((number, line.removeprefix("$ ")))
    return iter(found)


def _shown(page: Path, line: int, text: str, block: bool) -> Shown | None:
    first = text.split()[0].rpartition("/")[2] if text.strip() else ""
    if first not in STARTS or (not block and " " not in text.strip()):
        return None
    # A remark beside a command stands three blanks off, or after a #.
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
    return [found for page in PAGES for found in _of_page(page)]
