"""The site of docs/: it builds without a warning, every link in it leads somewhere, and a broken one would stop it."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer
from markdown_it import MarkdownIt

from headrift.cli import app

ROOT = Path(__file__).resolve().parents[2]


def build(*options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


class Page(HTMLParser):
    """What a page of the site names: its anchors, what it links to, and what a browser loads with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        elif "src" in values:
            self.loaded.add(values["src"])
        elif tag == "link" and values.get("rel") != "canonical":
            self.loaded.add(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Page]:
    """The pages of the site by their files."""
    folder = tmp_path_factory.mktemp("site")
    done = build("--site-dir", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path: Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html") if path.name != "404.html"}


def test_every_link_leads_somewhere(site):
    broken = []
    for path, page in site.items():
        for link in page.links | page.loaded:
            where = urlsplit(link)
            if where.scheme or where.netloc:
                continue
            target = (path.parent / unquote(where.path)).resolve() if where.path else path
            if not target.is_file():
                broken.append(f"{path.name}: {link}")
            elif where.fragment and target in site and unquote(where.fragment) not in site[target].anchors:
                broken.append(f"{path.name}: {link} (no such place in that page)")
    assert len(site) > 15
    assert broken == []


def test_a_page_loads_nothing_from_elsewhere(site):
    elsewhere = {link for page in site.values() for link in page.loaded if urlsplit(link).scheme not in ("", "data")}
    assert elsewhere == set()


def test_the_reference_has_every_command_and_option(site):
    (reference,) = (path for path in site if path.parts[-2:] == ("reference", "cli.html"))
    _, *parts = re.split(r"<h[23][^>]*><code>(.*?)</code>", reference.read_text(encoding="utf-8"))
    sections = dict(zip(parts[::2], parts[1::2], strict=True))

    def check(command, name):
        for sub, its in getattr(command, "commands", {}).items():
            known = {option for param in its.params for option in param.opts if option.startswith("--")}
            assert {option for option in known if option not in sections[f"{name} {sub}"]} == set()
            check(its, f"{name} {sub}")

    check(typer.main.get_command(app), "headrift")


@pytest.mark.parametrize(
    ("page", "target"),
    [
        ("[a page](nowhere.md)", "nowhere.md"),
        ("[a place](#nowhere)", "#nowhere"),
        ("![a figure](nowhere.png)", "nowhere.png"),
        ("[outside](../bench/results/nowhere.md)", "bench/results/nowhere.md"),
    ],
)
def test_a_broken_link_stops_the_build(page, target, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# A page\n\n{page}\n")
    settings = f"INHERIT: {ROOT}/mkdocs.yml\nnav: [index.md]\nnot_in_nav: '*'\nplugins: []\nwatch: []\nhooks: []\n"
    (tmp_path / "mkdocs.yml").write_text(settings)
    done = build("--config-file", tmp_path / "mkdocs.yml", "--site-dir", tmp_path / "site")
    assert done.returncode == 1
    assert target in done.stderr


def links(page: Path) -> set[Path]:
    """The files that a page in the repository links to, wherever they are."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    files = set()
    for child in (child for token in tokens for child in token.children or ()):
        target = urlsplit(str(child.attrs.get("href") or child.attrs.get("src") or ""))
        if target.path and not target.scheme:
            files.add((page.parent / unquote(target.path)).resolve())
    return files


def test_links_work_in_the_repository_too():
    pages = [ROOT / "README.md", ROOT / "datasets/README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/**/*.md")]
    assert [f"{page.relative_to(ROOT)}: {link}" for page in pages for link in links(page) if not link.exists()] == []


def test_every_page_is_two_clicks_from_the_readme():
    first = {page for page in links(ROOT / "README.md") if page.suffix == ".md"}
    second = first | {page for one in first for page in links(one)}
    assert {page.relative_to(ROOT) for page in ROOT.glob("docs/*.md")} <= {
        page.relative_to(ROOT) for page in second if page.is_relative_to(ROOT)
    }
