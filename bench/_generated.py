"""Pages with parts that scripts write: `<!-- NAME: made by SCRIPT -->`, the part, `<!-- end of NAME -->`."""

from __future__ import annotations

import re
from collections.abc import Mapping


def filled(page: str, script: str, parts: Mapping[str, str]) -> str:
    """The page with these parts in their places; ValueError where it has no place for one of them."""
    for name, part in parts.items():
        begin, end = f"<!-- {name}: made by {script} -->", f"<!-- end of {name} -->"
        place = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if len(place.findall(page)) != 1:
            raise ValueError(f"the page must have one place for {name}: {begin} ... {end}")
        whole = f"{begin}\n{part.strip()}\n{end}"
        page = place.sub(lambda _, whole=whole: whole, page)
    return page
