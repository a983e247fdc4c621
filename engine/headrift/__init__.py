"""headrift scores prompts for inter-head instability: how much attention heads disagree about the system prompt.

``import headrift`` is light: what is named here is loaded when it is first used.
"""

from typing import TYPE_CHECKING, Any

from headrift._version import __version__

if TYPE_CHECKING:
    from headrift.calibration.artifact import Calibration
    from headrift.results import ScoreResult
    from headrift.scorer import Scorer

__all__ = ["Calibration", "ScoreResult", "Scorer", "__version__"]

_LAZY = {
    "Calibration": "headrift.calibration.artifact",
    "ScoreResult": "headrift.results",
    "Scorer": "headrift.scorer",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
