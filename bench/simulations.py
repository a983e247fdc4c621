"""Error rates of headrift's statistics where the truth is known: of made-up data, over many draws.

    python bench/simulations.py [--draws 1000] [--only NAME ...] [--short]

Each simulation makes data in which the truth is known, and asks for each draw whether the statistic was wrong, as it
is now and as it would be if every row counted alone. bench/results/simulations.md has the rates; the tests in
tests/unit/test_simulations.py ask for fewer draws.
"""

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import utils


@dataclass(frozen=True)
class Simulation:
    """A statistic on made-up data.

    Attributes:
        about: what is simulated, and what counts as an error.
        nominal: the error rate that is promised.
        draw: of a seed, the error of the naive way and of headrift's: 0 or 1, or a rate.
        draws: how many the committed results are of.
        exact: whether the rate should be nominal, and not only at most.
        few: how many a test of a few seconds can make.
    """

    about: str
    nominal: float
    draw: Callable[[int], tuple[float, float]]
    draws: int = 1000
    exact: bool = False
    few: int = 40


# The simulations, each a function of a seed


def seeds_rate(seed: int) -> tuple[float, float]:
    """Whether the interval of a rate, of 12 questions that three trainings are asked, misses it.

    Seven of ten questions are answered alike by all trainings. The naive way is Student's t over the trainings.
    """
    from scipy.stats import sem, t

    from headrift.consistency.summary import rate_interval
    from headrift.stats import ClusterBootstrap

    random, questions, trainings, rate = np.random.default_rng(seed), 12, 3, 0.2
    alike, each = (random.random((n, questions)) < rate for n in (1, trainings))
    happens = np.where(random.random(questions) < 0.7, alike, each).astype(float)
    by_training = happens.mean(axis=1)
    naive = t.interval(0.95, trainings - 1, by_training.mean(), sem(by_training) or 1e-12)
    question = np.tile(np.arange(questions), trainings)
    draws = ClusterBootstrap(question).mean(happens.ravel(), question >= 0)
    return tuple(float(not low <= rate <= high) for low, high in (naive, rate_interval(draws, question)))


SIMULATIONS: dict[str, Simulation] = {}
SIMULATIONS["seeds_rate"] = Simulation(
    "95% interval of a rate of 12 questions, over three trainings that are asked the same, misses it", 0.05, seeds_rate
)


# Their rates



def rates(name: str, draws: int, first: int = 0, processes: int | None = None) -> dict:
    """Mean errors over draws, naive and now, with the standard errors of these means."""
    seeds = range(first, first + draws)
    processes = processes or os.cpu_count() or 1
    if processes == 1:
        errors = [_draw((name, seed)) for seed in seeds]
    else:
        with ProcessPoolExecutor(processes) as pool:
            errors = list(pool.map(_draw, [(name, seed) for seed in seeds], chunksize=max(1, draws // (8 * processes))))
    table = np.array(errors, np.float64)
    simulation = SIMULATIONS[name]
    spread = table.std(axis=0, ddof=1) / np.sqrt(draws)
    # Of a rate that is nominal: what chance would allow for also if no error, or no variation, was seen.
    by_chance = np.sqrt(simulation.nominal * (1 - simulation.nominal) / draws)
    naive, now = ({"rate": float(r), "error": float(s)} for r, s in zip(table.mean(axis=0), spread))
    return {
        "about": simulation.about,
        "nominal": simulation.nominal,
        "draws": draws,
        "naive": naive,
        "now": now,
        "allowed": float(simulation.nominal + 3 * max(by_chance, now["error"])),
        "least": float(simulation.nominal - 3 * max(by_chance, now["error"])) if simulation.exact else None,
    }


def holds(result: Mapping) -> bool:
    """Whether the rate now is nominal within three standard errors."""
    rate = result["now"]["rate"]
    return rate <= result["allowed"] and (result["least"] is None or rate >= result["least"])


def _draw(which: tuple[str, int]) -> tuple[float, float]:
    name, seed = which
    warnings.simplefilter("ignore")
    return SIMULATIONS[name].draw(seed)


def table(report: Mapping) -> str:
    """Make the page."""
    rows = [
        [one["about"], f"{one['nominal']:.3g}"]
        + [f"{one[way]['rate']:.3f} ± {1.96 * one[way]['error']:.3f}" for way in ("naive", "now")]
        + [f"{one['draws']:,}"]
        for one in report["simulations"].values()
    ]
    return utils.page(
        "# Error rates where the truth is known",
        "Made by `python bench/simulations.py`: errors of statistics on made-up data, with 95% intervals over the draws. "
        "*Naive*: as if every row were a sample of its own, or as versions before had it.",
        utils.markdown(["error", "promised", "naive", "headrift", "draws"], rows),
    )


def main() -> None:
    options = utils.Options(__doc__, "simulations")
    options.amount("draws", 0, 20, "draws; 0 for each simulation's own")
    options.add_argument("--only", nargs="*", choices=sorted(SIMULATIONS), default=sorted(SIMULATIONS))
    args = options.parse()
    report = utils.read_json(args.out) if args.out.exists() else {"simulations": {}}
    for name in args.only:
        print(f"{name}: {SIMULATIONS[name].about}", flush=True)
        report["simulations"][name] = rates(name, args.draws or SIMULATIONS[name].draws)
    report["simulations"] = {name: report["simulations"][name] for name in SIMULATIONS if name in report["simulations"]}
    utils.write({"versions": utils.versions(), **report}, table(report), args.out)


if __name__ == "__main__":
    main()
