"""What goes wrong with a fake engine (`headrift.testing`) when a test wants it to."""

from __future__ import annotations

from collections.abc import Callable

from headrift.requests import ProbeRequest


class FailAt:
    """For FakeEngine's on_submit: fails at the n-th request, once."""

    def __init__(self, n: int, fail: Callable[[], None]) -> None:
        self._n, self._fail = n, fail

    def __call__(self, request: ProbeRequest) -> None:
        self._n -= 1
        if not self._n:
            self._fail()


def raises(error: BaseException) -> Callable[[], None]:
    """What raises this error."""

    def fail() -> None:
        raise error

    return fail


def must_not_start(*args: object, **options: object) -> None:
    """An engine factory for what must not come to starting an engine."""
    raise AssertionError("an engine was started")
