#!/usr/bin/env python3
"""Check that no name in the code is a word listed below; each has a plainer one to write instead.

Every binding counts: modules, classes, functions, arguments, assigned variables and attributes, import aliases,
exception and pattern names. Strings don't, so keys of file formats may keep such a word, and neither do the names of
tests, which are sentences.

    python scripts/check_names.py [FILE or FOLDER ...]     (default: all of the repository's code)

Prints `file:line: name -> what to write`, and exits with 1 if there is any.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ("engine", "kernels", "bench", "scripts", "tests")

# The whole name, without leading underscores: what to write instead.
WORDS = {
    "aligned_keys": "key_alignment",
    "anew": "again",
    "asked": "config or request",
    "beside": "atomic_files",
    "found": "result, or the thing's name",
    "holds": "contains",
    "lies": "is",
    "machine": "provenance",
    "mine": "own",
    "of": "the thing's name (summary, run, signal)",
    "preparing": "prepare",
    "said": "message, or the thing's name",
    "screen": "terminal",
    "stands": "is",
    "taken_up": "resumed",
    "there": "valid, present, or what the mask selects",
    "told": "reported, or the thing's name",
    "turned": "principal_angles",
    "waiting": "scheduling",
    "wanted": "selected",
}
# Any part of a snake_case or CamelCase name, in singular or plural: what to write instead.
PARTS = {
    "buried": "discarded",
    "bury": "discard",
    "killer": "poison row",
    "reread": "skip_prefix_cache",
    "rubbish": "malformed",
    "straw": "fake",
    "tenant": "request",
    "torture": "fault injection",
    "unwritten": "missing_steps",
}
# Classes that need their room's name: TrainConfig, ScoreConfig, ...
CLASSES = {
    "Asked": "the room's name and Config",
    "Figure": "the room's name in it",
    "Outcome": "the room's name in it",
    "Run": "the room's name in it",
    "Settings": "the room's name and Config",
}


def replacement(name: str, is_class: bool = False) -> str | None:
    """Return what to write instead of `name`, or None if it is fine."""
    if is_class and name.lstrip("_") in CLASSES:
        return CLASSES[name.lstrip("_")]
    if name.startswith("test_"):
        return None
    if name.strip("_") in WORDS:
        return WORDS[name.strip("_")]
    for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name):
        word = part.lower()
        for known in (word, word.removesuffix("s")):
            if known in PARTS:
                return PARTS[known]
    return None


def bindings(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """Yield line, name and whether it is a class, for each name that the code binds."""
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef():
                yield node.lineno, node.name, True
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield node.lineno, node.name, False
            case ast.arg():
                yield node.lineno, node.arg, False
            case ast.Name(ctx=ast.Store()):
                yield node.lineno, node.id, False
            case ast.Attribute(ctx=ast.Store()):
                yield node.lineno, node.attr, False
            case ast.alias(asname=str(name)):
                yield node.lineno, name, False
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield node.lineno, name, False
            case ast.MatchMapping(rest=str(name)):
                yield node.lineno, name, False


def check_file(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line, name and what to write instead, for each name in `path` that is in the lists."""
    module = path.parent.name if path.name == "__init__.py" else path.stem
    if (instead := replacement(module.removeprefix("test_"))) is not None:
        yield 1, path.name, instead
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    for line, name, is_class in sorted(bindings(tree)):
        if (instead := replacement(name, is_class)) is not None:
            yield line, name, instead


def main() -> int:
    parser = argparse.ArgumentParser(description="Check that names are plain words; the lists are in this file.")
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", default=[ROOT / folder for folder in CODE])
    n_names = 0
    for start in parser.parse_args().paths:
        for path in sorted(start.rglob("*.py")) if start.is_dir() else [start]:
            for line, name, instead in check_file(path):
                n_names += 1
                shown = path.resolve()
                shown = shown.relative_to(ROOT) if shown.is_relative_to(ROOT) else shown
                print(f"{shown}:{line}: {name} -> {instead}")
    if n_names:
        print(f"check_names: {n_names} names to replace", file=sys.stderr)
    return 1 if n_names else 0


if __name__ == "__main__":
    sys.exit(main())
