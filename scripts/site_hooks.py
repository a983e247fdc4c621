"""What MkDocs does not do by itself for the site of docs/ (mkdocs.yml names this file).

Pages outside docs/ that are linked to from it are pages of the site too, under their path in the repository: links are
written as they work in the repository (`../bench/results/peers.md`), and turned into the site's here. The reference of
the command line is made from the commands themselves, by Typer.
"""

import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("bench/results/*.md", "bench/results/*.png", "datasets/README.md", "CHANGELOG.md")
COMMANDS = "reference/cli.md"

_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
_EXIT_CODE = re.compile(r"^  (\d+) +", re.MULTILINE)
_PATTERN = re.compile(r"(?<=-)\*(?=\.)")  # the asterisk of part-*.parquet, which is no emphasis


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and figures outside docs/, and the reference of the command line."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    files.append(File.generated(config, COMMANDS, content=commands()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they work in the repository become links as they work in the site."""
    uri = page.file.src_uri
    outside = not (ROOT / "docs" / uri).is_file()
    folder = posixpath.dirname(uri if outside else f"docs/{uri}")

    def in_site(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[2]))
        target = target.removeprefix("docs/")
        return found[1] + posixpath.relpath(target, posixpath.dirname(uri) or ".") + found[3]

    return markdown if uri == COMMANDS else _LINK.sub(in_site, markdown)


def commands() -> str:
    """The reference of the command line, in Markdown."""
    command = [sys.executable, "-P", "-m", "typer", "headrift.cli", "utils", "docs"]
    command += ["--name", "headrift", "--title", "Command line"]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    text = made.stdout.replace("\b\n", "").replace("Exit codes:\n", "Exit codes:\n\n")
    return _PATTERN.sub(r"\*", _EXIT_CODE.sub(r"* \1: ", text))
