"""headrift scores prompts for inter-head instability: how much attention heads disagree about the system prompt.

``import headrift`` is light: what is named here is loaded when it is first used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from headrift.calibration.record import Calibration
    from headrift.scorer import Scorer, ScoreResult

__all__ = ["Calibration", "ScoreResult", "Scorer", "__version__"]

_LAZY = {
    "Calibration": "headrift.calibration.record",
    "ScoreResult": "headrift.scorer",
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
