"""The page's section on how the runs were made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrift._version import __version__
from headrift.explain import printable
from headrift.report.gather import Gathered
from headrift.report.output import Block, Details, Section, Table

_LEFT_OUT = {"system_prompt", "system_prompt_sha256"}


def settings(of: Gathered, redact: bool) -> Section:
    """Settings, versions and system prompts of the runs."""
    described = [_described(about) for about in of.about]
    alike: list[tuple[str, list[str]]] = []
    differ: list[tuple[str, list[str]]] = []
    for name in dict.fromkeys(name for one in described for name in one):
        values = [one.get(name, "") for one in described]
        (alike if len(set(values)) == 1 else differ).append((name, values))
    rows = [("report made by", f"headrift {__version__}"), *((name, values[0]) for name, values in alike)]
    blocks: list[Block] = [Table(("setting", "of all runs" if len(of.runs) > 1 else "value"), rows)]
    if differ:
        names = [name for name, _ in differ]
        blocks.append(
            Table(
                ("run", *names),
                [(run, *(values[i] for _, values in differ)) for i, run in enumerate(of.names)],
            )
        )
    texts = {f"system prompt of {name}": _system_prompt(about, redact) for name, about in zip(of.names, of.about)}
    blocks.append(Details({name: text for name, text in texts.items() if text}))
    return Section("settings", "Settings and versions", blocks)


def _described(about: Mapping[str, Any]) -> dict[str, str]:
    """What run.json says, as text by name."""
    found = {
        "model": Path(about["model"]["path"]).name,
        "model's fingerprint": _short(about["model"].get("fingerprint")),
        "chat template": _short(about.get("chat_template_sha256")),
    }
    engine = {key: about["engine"].get(key) for key in ("dtype", "layers", "heads", "max_model_len")}
    given = {key: value for key, value in about["settings"].items() if key not in _LEFT_OUT}
    for key, value in {**engine, **{f"--{key.replace('_', '-')}": value for key, value in given.items()}}.items():
        if value not in (None, [], {}, False):
            found[key] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    for key, value in about.get("versions", {}).items():
        found[f"version of {key}"] = str(value)
    host = about.get("host")
    if host:
        found["scored on"] = ", ".join(
            f"{value} {key}" if key == "cores" else str(value) for key, value in host.items()
        )
    found["scored at"] = str(about.get("finished", ""))
    inputs = about.get("inputs", [])
    found["inputs"] = ", ".join(f"{Path(at['name']).name} ({_short(at.get('sha256'))})" for at in inputs)
    return {name: printable(text) for name, text in found.items() if text}


def _system_prompt(about: Mapping[str, Any], redact: bool) -> str:
    prompt, digest = (about["settings"].get(key) for key in ("system_prompt", "system_prompt_sha256"))
    if prompt and not redact:
        return printable(str(prompt))
    return f"left out; its SHA-256 is {digest}" if digest else ""


def _short(digest: Any) -> str:
    """A hash's beginning, which is enough to tell two apart."""
    return str(digest)[:12] if digest else ""
