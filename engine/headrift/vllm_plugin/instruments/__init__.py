"""The instruments of a probed engine: every subclass of `Instrument` in the modules of this package."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib import import_module
from typing import Any

from headrift.vllm_plugin.instruments.base import Instrument, Output
from headrift.vllm_plugin.probe import Probe, RecorderConfig

MASS_OUTPUTS = (Output("share"), Output("first", per_step=False), Output("mass"))


def instrument_types() -> list[type[Instrument]]:
    """Every instrument there is, by module: the order in which a step calls them."""
    _import_modules()
    return sorted(Instrument.__subclasses__(), key=lambda kind: kind.__module__)


@cache
def _import_modules() -> None:
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


def option_defaults() -> dict[str, int]:
    """The engine options of all instruments, with their defaults."""
    return {name: value for kind in instrument_types() for name, value in kind.options.items()}


def recording_outputs() -> dict[str, Output]:
    """Every array that a recording may have, by name."""
    outputs = (*MASS_OUTPUTS, *(output for kind in instrument_types() for output in kind.outputs))
    return {output.name: output for output in outputs}


def parse_config(values: Mapping[str, Any]) -> RecorderConfig:
    """What an engine records, from the flat `additional_config["headrift"]`.

    Raises:
        ValueError: an option is unknown or out of range.
    """
    # The model's shape and the ranks are not settings: the engine and its workers fill them in.
    core = {field.name for field in fields(RecorderConfig)} - {"options", "layers", "heads", "ranks"}
    options = option_defaults()
    unknown = values.keys() - core - options.keys()
    if unknown:
        known = ", ".join(sorted(core | options.keys()))
        raise ValueError(f"headrift has no setting {sorted(unknown)[0]!r}; it has {known}")
    return RecorderConfig(
        **{name: value for name, value in values.items() if name in core},
        options={name: values.get(name, default) for name, default in options.items()},
    )


def parse_probe(extra: Mapping[str, Any], config: RecorderConfig) -> Probe:
    """One request's `extra_args["headrift"]`, all of it checked.

    Raises:
        ValueError: it cannot be recorded, or asks for an instrument that this engine does not have.
    """
    probe = Probe.parse(extra, config)
    unknown = set(probe.fields)
    for kind in instrument_types():
        named = probe.fields.keys() & kind.fields.keys()
        unknown -= named
        if named and not kind.is_on(config.options):
            missing = " and ".join(
                f"{name}={True if value is False else '...'}" for name, value in kind.options.items()
            )
            raise ValueError(f"{', '.join(sorted(named))} is off in this engine: set {missing}")
        if named:
            kind.check(probe, config)
    if unknown:
        raise ValueError(f'extra_args["headrift"] has {sorted(unknown)[0]!r}, which headrift does not take')
    return probe


def unlimited_config() -> RecorderConfig:
    """A config that every well-formed probe fits, for checks where the engine's own is not known."""
    most = 2**31
    return RecorderConfig(slots=most, steps=most, regions=8, options=dict.fromkeys(option_defaults(), most))
