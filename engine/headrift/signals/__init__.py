"""The registry of signals: every number of a prompt that `score` writes and `calibrate` and `report` compare."""

from headrift.signals import builtin
from headrift.signals.registry import PromptData, Signal, get, measure_columns, register, registered, signals

__all__ = ["PromptData", "Signal", "builtin", "get", "measure_columns", "register", "registered", "signals"]
