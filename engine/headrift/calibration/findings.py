"""What a comparison of signals says, a sentence each."""

from __future__ import annotations

from collections.abc import Sequence

from headrift.calibration.comparison import Before, Estimate, Increment, Normalisation, Signal, Success

_CONFOUNDS = ("prompt_tokens", "answer_tokens", "n_steps")


def findings(
    signals: Sequence[Signal],
    increments: Sequence[Increment],
    before: Sequence[Before],
    success: Success,
    normalisation: Normalisation,
) -> list[str]:
    """The answers to what was asked, in the order in which it was."""
    known = {of.name: of for of in signals if of.absent is None and of.auroc is not None and of.auroc.value is not None}
    found = [*_separate(known), *_strata(known)]
    for increment in increments:
        if increment.added == "instability" and increment.absent is None:
            found.append(f"{_capital(increment.verdict)} ({_change(increment)}).")
    found += [f"{_capital(of.verdict)}{_difference(of)}." for of in before]
    found.append(f"Attack success: {success.verdict}.")
    found.append(f"Normalising by length: {normalisation.verdict}.")
    return found


def _separate(known: dict[str, Signal]) -> list[str]:
    separate = [of for of in known.values() if of.sign is not None and of.name not in _CONFOUNDS]
    alone = [of for of in known.values() if of.sign is not None and of.name in _CONFOUNDS]
    nothing = [of for of in known.values() if of.sign is None]
    by_size = sorted(separate, key=lambda of: -_size(of))
    found = []
    if by_size:
        found.append(f"These separate attacks from benign prompts, the best first: {'; '.join(map(_said, by_size))}.")
    if alone:
        found.append(f"So do, with no attention measured at all: {'; '.join(map(_said, alone))}.")
    if nothing:
        found.append(f"Not shown to separate (the interval holds 0.5): {'; '.join(map(_said, nothing))}.")
    return found


def _strata(known: dict[str, Signal]) -> list[str]:
    instability = known.get("instability")
    if instability is None:
        return []
    wanted = ("same_third", "hard", "not_hard", "full", "same_set")
    shown = [
        f"{_number(of.auroc)} among {of.label}"
        for of in instability.strata
        if of.name in wanted and of.auroc.value is not None
    ]
    without = known.get("instability_without_bos")
    if without is not None:
        shown.append(f"{_number(without.auroc)} with the first token (BOS) left out of the shares")
    return [f"Instability's AUROC is {_number(instability.auroc)} among all; {'; '.join(shown)}."] if shown else []


def _size(of: Signal) -> float:
    return abs(of.auroc.value - 0.5) if of.auroc is not None and of.auroc.value is not None else 0.0


def _said(of: Signal) -> str:
    direction = {1: ", attacks higher", -1: ", attacks lower", None: ""}[of.sign]
    return f"{of.label} ({_number(of.auroc)}{direction})"


def _number(of: Estimate | None, form: str = ".3f") -> str:
    if of is None or of.value is None:
        return "not known"
    return f"{of.value:{form}}" + (f", {of.interval[0]:{form}} to {of.interval[1]:{form}}" if of.interval else "")


def _change(of: Increment) -> str:
    before, after = (_number(one).partition(",")[0] for one in (of.auroc, of.auroc_with))
    return f"log-loss {_signed(of.log_loss_change)}; AUROC {before} to {after}, {_signed(of.auroc_change)}"


def _signed(of: Estimate | None) -> str:
    return _number(of, "+.3f")


def _difference(of: Before) -> str:
    if of.difference is None or of.interval is None:
        return ""
    return f" (first step minus the other's: {of.difference:+d}, {of.interval[0]:+.0f} to {of.interval[1]:+.0f})"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
