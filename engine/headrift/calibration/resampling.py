"""The bootstrap of a comparison: groups of exact and near repeats are drawn whole, as many of a class as there are."""

from __future__ import annotations

from headrift.calibration.comparison import Estimate
from headrift.stats import Bools, ClusterBootstrap, Floats, Interval, Ints


class Draws(ClusterBootstrap):
    """Resamples of attacks and benign prompts."""

    def __init__(self, attack: Bools, group: Ints, resamples: int, seed: int) -> None:
        super().__init__(group, resamples, seed=seed, strata=~attack)
        self.attack = attack

    def aurocs(
        self, values: Floats, mask: Bools, pair_strata: Ints | None = None, positive: Bools | None = None
    ) -> Floats:
        """`auroc`, of attacks against benign prompts if nothing else is given."""
        return self.auroc(values, self.attack if positive is None else positive, mask, pair_strata)

    def estimate(self, drawn: Floats, mask: Bools, positive: Bools | None = None) -> Estimate:
        """A statistic of the masked samples, of both classes or of one, from its value in each draw."""
        positive = self.attack if positive is None else positive
        n_attack, n_benign = int((mask & positive).sum()), int((mask & ~positive).sum())
        result = Interval.from_draws(drawn, min([n for n in (n_attack, n_benign) if n], default=0))
        missing = bool(drawn[0] != drawn[0])
        return Estimate(
            value=None if missing else result.value,
            interval=result.bounds,
            n_attack=n_attack,
            n_benign=n_benign,
            reason="one of the classes has no such prompt" if missing else None,
        )
