"""What MkDocs does not do by itself for the site of docs/ (mkdocs.yml names this file).

Pages outside docs/ that are linked to from it are pages of the site too, under their path in the repository: links are
written as they work in the repository (`../bench/results/peers.md`), and turned into the site's here.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("bench/results/*.md", "bench/results/*.png", "datasets/README.md", "CHANGELOG.md", "CONTRIBUTING.md")

_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and figures outside docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they work in the repository become links as they work in the site."""
    uri = page.file.src_uri
    outside = not (ROOT / "docs" / uri).is_file()
    folder = posixpath.dirname(uri if outside else f"docs/{uri}")

    def in_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        target = target.removeprefix("docs/")
        return link[1] + posixpath.relpath(target, posixpath.dirname(uri) or ".") + link[3]

    return _LINK.sub(in_site, markdown)
