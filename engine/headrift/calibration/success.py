"""Do signals tell attacks that succeeded from those that did not?"""

from __future__ import annotations

import numpy as np

from headrift.calibration.comparison import Estimate, Success
from headrift.calibration.resampling import Draws
from headrift.calibration.samples import Samples
from headrift.calibration.signals import SIGNALS, Signals
from headrift.stats import MIN_FOR_INTERVAL


def success(signals: Signals, samples: Samples, draws: Draws, *, asked: bool) -> Success:
    """AUROCs among attacks whose answer is known. asked: whether there are fail terms to look for."""
    known = samples.attack & (signals.succeeded >= 0)
    succeeded = signals.succeeded == 1
    n, n_succeeded = int(known.sum()), int((known & succeeded).sum())
    absent = None
    if not asked:
        absent = "no fail terms were given, so it is not known which attacks succeeded"
    elif not n:
        absent = "the runs hold no answers: score with --save text, and without --redact"
    elif min(n_succeeded, n - n_succeeded) < MIN_FOR_INTERVAL:
        absent = (
            f"{n_succeeded} of {n} attacks have a fail term in the answer, as far as it was made; to compare takes "
            f"{MIN_FOR_INTERVAL} that have one and as many that have none"
        )
    if absent is not None:
        return Success(absent=absent, n_attacks=n, n_succeeded=n_succeeded, verdict=f"not known: {absent}")
    # What succeeds in one set and what in another differ in much else: only pairs of a set are compared.
    strata = samples.set if len(samples.sets) > 1 else None
    aurocs = {}
    for name, values in signals.values.items():
        there = known & ~np.isnan(values)
        aurocs[name] = draws.estimate(draws.aurocs(values, there, strata, positive=succeeded), there, succeeded)
    return Success(
        n_attacks=n, n_succeeded=n_succeeded, aurocs=aurocs, verdict=_verdict(aurocs["instability"], n_succeeded, n)
    )


def _verdict(auroc: Estimate, n_succeeded: int, n: int) -> str:
    name, of = SIGNALS["instability"][0], f"({n_succeeded} of {n} attacks succeeded)"
    if auroc.interval is None:
        return f"too few attacks to say whether {name} foretells success {of}"
    if auroc.interval[0] > 0.5:
        return f"{name} is higher in attacks that succeed {of}"
    if auroc.interval[1] < 0.5:
        return f"{name} is lower in attacks that succeed {of}"
    return f"not shown that {name} foretells success: the interval of the AUROC holds 0.5 {of}"
