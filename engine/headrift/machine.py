"""What this machine is, as the system names it."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> tuple[str, set[str]]:
    """The processor's name and its instruction sets, as Linux names them; no instruction sets where it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return facts.get("model name") or platform.processor() or platform.machine(), set(facts.get("flags", "").split())
