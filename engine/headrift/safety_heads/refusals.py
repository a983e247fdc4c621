"""Refusals recognised by rule: phrases of a refusal in the opening of a reply.

The phrases are in `refusals.txt`. A rule sees words, not sense: a reply that begins with a refusal and then helps
counts as refused, one that changes the subject does not. docs/safety-heads.md says how often the rules err.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from importlib.resources import files

# A refusal has to begin in this many characters; the sentence around the last of them is searched to its end.
OPENING = 300
_STRAIGHT = str.maketrans({"‘": "'", "’": "'", "ʼ": "'", "`": "'", "“": '"', "”": '"', "„": '"', "«": '"', "»": '"'})
_QUOTED = re.compile(r'(?<=\S )"[^"]*(?:"|$)')
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


def is_refusal(reply: str) -> bool:
    """Whether the opening of a reply has words of a refusal; an empty reply has none."""
    not_refusals, refusals = _expressions()
    return refusals.search(not_refusals.sub(" ", _opening(reply))) is not None


def _opening(reply: str) -> str:
    """The first sentences in lower case with straight quotes and single spaces, quotations removed."""
    text = unicodedata.normalize("NFKC", reply).translate(_STRAIGHT).casefold()
    text = " ".join(re.sub(r"[*_#>]+", " ", text).split())
    end = _SENTENCE_END.search(text, OPENING)
    # A reply entirely in quotation marks is not a quotation: only text with words before it is.
    return _QUOTED.sub(" ", text[: end.end() if end else None])


@cache
def _expressions() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """The expressions to remove from an opening, and those to search in what is left."""
    sections: dict[str, list[str]] = {}
    for line in (files("headrift.safety_heads") / "refusals.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            section.append(line)
    words = {name: f"(?:{'|'.join(sections[name])})" for name in ("self", "cannot", "verb")}

    def joined(section: str) -> re.Pattern[str]:
        lines = sections[section]
        for name, alternatives in words.items():
            lines = [line.replace(f"{{{name}}}", alternatives) for line in lines]
        return re.compile("|".join(lines))

    return joined("not a refusal"), joined("refusal")
