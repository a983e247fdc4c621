#!/usr/bin/env python3
"""Write those passages of docs/ that are made from the code.

    python scripts/generate_docs.py             write them
    python scripts/generate_docs.py --check     exit with 1 if one is not as the code makes it

A passage is between `<!-- NAME: made by scripts/generate_docs.py -->` and `<!-- end of NAME -->`. For a new one add a
function that returns its Markdown, and a line to PASSAGES.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import typer

from headrift.cli import app
from headrift.corpus.rows import REASONS
from headrift.signals import signals

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import utils

ROOT = Path(__file__).resolve().parents[1]


def commands() -> str:
    """A table of the commands: name and first sentence of the help."""
    command = typer.main.get_command(app)
    rows = [(f"headrift {name}", each.help or "") for name, each in command.commands.items()]  # type: ignore[attr-defined]
    sentences = [(name, re.split(r"\n\n|(?<=[.?])\s", text.strip())[0].replace("\n", " ")) for name, text in rows]
    return table(("command", "what it does"), [(f"`{name}`", sentence) for name, sentence in sentences])


def reasons() -> str:
    """A table of the reasons that rows are rejected for."""
    return table(("reason", "what to do"), [(f"`{name}`", text) for name, text in sorted(REASONS.items())])


def reference() -> str:
    """Every command with its arguments and options."""
    command = [sys.executable, "-P", "-m", "typer", "headrift.cli", "utils", "docs", "--name", "headrift"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = text.replace("\b\n", "").replace("Exit codes:\n", "Exit codes:\n\n")
    text = re.sub(r"^  (\d+) +", r"* \1: ", text, flags=re.MULTILINE)
    text = re.sub(r"(?<=-)\*(?=\.)", r"\*", text)  # the asterisk of part-*.parquet is no emphasis
    return re.sub(r"\A# .*\n+", "", text)


def signal_table() -> str:
    """A table of the registered signals."""
    rows = [
        (
            f"`{entry.name}`",
            entry.label,
            entry.unit,
            "each step" if entry.steps else "prompt",
            "yes" if entry.column else "",
            ", ".join(f"`{name}`" for name in entry.saves),
            {1: "higher", -1: "lower", 0: ""}[entry.direction],
            entry.how,
        )
        for entry in signals()
    ]
    return table(
        ("name", "signal", "unit", "a number for each", "column", "`--save`", "expected in attacks", "how"), rows
    )


def table(names: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [names, ("---",) * len(names), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


PASSAGES: tuple[tuple[str, str, Callable[[], str]], ...] = (
    ("docs/cli.md", "commands", commands),
    ("docs/cli.md", "reasons", reasons),
    ("docs/reference/cli.md", "reference", reference),
    ("docs/calibration.md", "signals", signal_table),
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the passages of docs/ that are made from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a passage is out of date")
    check = parser.parse_args().check
    outdated = []
    for name in sorted({name for name, _, _ in PASSAGES}):
        page = (ROOT / name).read_text(encoding="utf-8")
        new = page
        for _, passage, make in (each for each in PASSAGES if each[0] == name):
            new = utils.fill(new, "scripts/generate_docs.py", {passage: make()})
        if new != page:
            outdated.append(name)
            if not check:
                (ROOT / name).write_text(new, encoding="utf-8")
    if check and outdated:
        print(f"out of date: {', '.join(outdated)}: run scripts/generate_docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
