"""Errors that more than one part of headrift raises or handles."""


class EngineError(RuntimeError):
    """The engine could not be started with these settings; the message says why and what to change."""


class RefusedError(RuntimeError):
    """The engine, as configured, cannot be measured; the message lists every reason."""

    def __init__(self, reasons: list[str]):
        self.reasons = reasons
        lines = "".join(f"\n  - {reason}" for reason in reasons)
        super().__init__(f"headrift cannot measure this engine:{lines}")
