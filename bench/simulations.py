"""Error rates of headrift's statistics where the truth is known: of made-up data, over many draws.

    python bench/simulations.py [--draws 1000] [--only NAME ...] [--short]

Each simulation makes data in which the truth is known, and asks for each draw whether the statistic was wrong, as it
is now and as it would be if every row counted alone. bench/results/simulations.md has the rates; the tests in
tests/unit/test_simulations.py ask for fewer draws.
"""

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
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

    from headrift.stats import rate_interval

    random, questions, trainings, rate = np.random.default_rng(seed), 12, 3, 0.2
    alike, each = (random.random((n, questions)) < rate for n in (1, trainings))
    happens = np.where(random.random(questions) < 0.7, alike, each).astype(float)
    by_training = happens.mean(axis=1)
    naive = t.interval(0.95, trainings - 1, by_training.mean(), sem(by_training) or 1e-12)
    question = np.tile(np.arange(questions), trainings)
    return tuple(float(not low <= rate <= high) for low, high in (naive, rate_interval(happens.ravel(), question)))


def sessions_rate(seed: int) -> tuple[float, float]:
    """Whether the interval of the rate of flagged prompts, of 20 sessions with 10 prompts each, misses it.

    A fifth is flagged; sessions differ (correlation 0.2 within one). The naive way takes prompts for independent.
    """
    from headrift.stats import exact_interval, rate_interval

    random, rate, within = np.random.default_rng(seed), 0.2, 0.2
    session = np.repeat(np.arange(20), 10)
    rates = random.beta(rate * (1 - within) / within, (1 - rate) * (1 - within) / within, 20)
    hits = random.random(200) < rates[session]
    intervals = exact_interval(int(hits.sum()), 200), rate_interval(hits, session)
    return tuple(float(not low <= rate <= high) for low, high in intervals)


def intervals_few_groups(seed: int) -> tuple[float, float]:
    """Whether an AUROC's interval, of 3 to 14 prompts a class with 20 rows each, misses it.

    Nine tenths of a value's variance are the prompt's. The naive way is the plain percentile interval, given as soon as
    there are ten rows.
    """
    from scipy.stats import norm

    from headrift.stats import ClusterBootstrap, separation

    random, truth, rows = np.random.default_rng(seed), 0.8, 20
    prompts = random.integers(3, 15)
    attack = np.repeat(np.arange(2 * prompts) < prompts, rows)
    group = np.repeat(np.arange(2 * prompts), rows)
    noise = np.sqrt(0.9) * random.normal(size=2 * prompts)[group] + np.sqrt(0.1) * random.normal(size=len(group))
    values = noise + np.sqrt(2) * norm.ppf(truth) * attack
    draws = ClusterBootstrap(group, 300).auroc(values, attack, np.ones(len(group), bool))
    naive = np.nanpercentile(draws[1:], (2.5, 97.5))
    now = separation(values, attack, group, resamples=300).auroc_interval
    return tuple(float(one is not None and not one[0] <= truth <= one[1]) for one in (naive, now))


TPR_AT_5 = 0.1985  # of values 0.8 standard deviations apart


def tpr_at_5_pooled(seed: int) -> tuple[float, float]:
    """Attacks found at 5% false positives, of five folds with 26 attacks and 100 benign prompts, on different scales.

    The naive way is the mean over folds of what the best threshold in hindsight finds.
    """
    from headrift.calibration.evidence import pooled
    from headrift.calibration.splits import CalibrationSamples
    from headrift.stats import ranks, roc_curve, tpr_at

    random, folds, n = np.random.default_rng(seed), 5, 126
    fold, attack = np.repeat(np.arange(folds), n), np.tile(np.arange(n) < 26, folds)
    ones = np.ones(len(fold), np.int64)
    samples = CalibrationSamples(
        row=np.arange(len(fold)),
        attack=attack,
        group=np.arange(len(fold)),
        source=0 * ones,
        repeats=ones,
        fold=fold,
        chooses=attack,
        sets=~attack,
        n_folds=folds,
    )
    values = random.normal(size=len(fold)) + 0.8 * attack
    naive = []
    for own in (fold == number for number in range(folds)):
        curve = roc_curve(ranks(values[own]), attack[own], np.ones(n))
        naive.append(tpr_at(*curve, np.array([0.05]))[0])
    return float(np.mean(naive)), pooled(samples, [values * (1 + one) for one in range(folds)], ones)["tpr_at_5"]


def rate_interval_few(seed: int) -> tuple[float, float]:
    """Whether the interval of a rate, of 8 trials, misses it. The naive way is Student's t over the trials."""
    from scipy.stats import sem, t

    from headrift.stats import wilson_interval

    random, n = np.random.default_rng(seed), 8
    rate = random.random()
    hits = (random.random(n) < rate).astype(float)
    naive = t.interval(0.95, n - 1, hits.mean(), sem(hits) or 1e-12)
    return tuple(float(not low <= rate <= high) for low, high in (naive, wilson_interval(hits.sum(), n)))


def _prompts_by_system_prompts(random: np.random.Generator) -> np.ndarray:
    """Effects [40 prompts, 40 system prompts]: a prompt's, a system prompt's and noise, all of one size."""
    prompt, system, rest = (random.normal(size=size) for size in ((40, 1), 40, (40, 40)))
    return prompt + system + rest


def _prompts_bootstrap(statistic: Callable[[np.ndarray], float], random: np.random.Generator) -> bool:
    """Whether the interval of a statistic of resampled prompts leaves out 0."""
    low, high = np.percentile([statistic(random.integers(0, 40, 40)) for _ in range(100)], (2.5, 97.5))
    return bool(low > 0 or high < 0)


def _is_shown(estimate) -> bool:
    from headrift.internals.page import Finding, judge

    return judge([Finding("", estimate, claims=("shown", "shown"))])[0].verdict == "shown"


def internals_length(seed: int) -> tuple[float, float]:
    """Whether longer system prompts are said to change more, or less, where length changes nothing.

    The naive way is Spearman's correlation over all rows with an interval over prompts.
    """
    from headrift.internals.analysis import with_length
    from headrift.internals.estimates import spearman

    random = np.random.default_rng(seed)
    effects, tokens = _prompts_by_system_prompts(random), random.geometric(0.01, 40).astype(float)
    lengths = np.tile(tokens, 40)
    naive = _prompts_bootstrap(lambda drawn: float(spearman(lengths, effects[drawn].ravel())), random)
    return float(naive), float(_is_shown(with_length(effects, tokens)["spearman"]))


def internals_features(seed: int) -> tuple[float, float]:
    """Whether a feature that 15 of 40 system prompts have is said to change an answer more, or less; it does neither.

    The naive way is the difference of means with an interval over prompts.
    """
    from headrift.internals.analysis import with_feature

    random = np.random.default_rng(seed)
    effects, has = _prompts_by_system_prompts(random), np.arange(40) < 15
    by_prompt = effects[:, has].mean(axis=1) - effects[:, ~has].mean(axis=1)
    naive = _prompts_bootstrap(lambda drawn: by_prompt[drawn].mean(), random)
    return float(naive), float(_is_shown(with_feature(effects, has)))


def _benign_run(values: np.ndarray, **columns):
    """A run of benign prompts, whose values are the instability of its one step and layer."""
    from helpers import made_runs

    instability = np.repeat(values[:, None, None], 2, axis=1).astype(np.float32)
    return made_runs.run_of(instability, ["benign"] * len(values), **columns)


def _false_positive_rate(cut: float, spread: float) -> float:
    """Of new prompts, whose values are Gaussian with this spread."""
    from scipy.stats import norm

    return float(norm.sf(cut / spread))


def _thresholds(values: np.ndarray, **columns) -> tuple[float, float]:
    """The threshold for 5% with 95% confidence if every prompt counts alone, and headrift's."""
    from headrift.calibration.splits import divide
    from headrift.calibration.thresholds import CalibrateConfig, Rule, threshold
    from headrift.runs.reading import read_rows

    division = divide(read_rows([_benign_run(values, **columns)]), CalibrateConfig(benign_only=True), 1)
    cuts = [
        threshold(part, np.ones(len(part), np.int64), 0.05, Rule.BINOMIAL) for part in (values, values[division.part_b])
    ]
    return cuts[0], cuts[1]


TEMPLATES, EACH = 80, 10


def threshold_groups(seed: int) -> tuple[float, float]:
    """Whether over 5% of new prompts are flagged, if 800 prompts of 80 templates, named by the rows, set the threshold.

    Four fifths of a value's variance are the template's. The naive way takes the prompts for independent.
    """
    random = np.random.default_rng(seed)
    template = np.arange(TEMPLATES * EACH) % TEMPLATES
    values = 2 * random.normal(size=TEMPLATES)[template] + random.normal(size=len(template))
    prompt = [f"{number:016x}" for number in range(len(template))]
    cuts = _thresholds(values, group=1_000_000 + template, prompt_hash=prompt)
    return tuple(float(_false_positive_rate(cut, np.sqrt(5)) > 0.05) for cut in cuts)


@cache
def _sketches(prompts: int) -> list[bytes]:
    """Of texts made from templates: 24 words of the template's and 6 of their own."""
    from headrift.near_duplicates import minhash

    random = np.random.default_rng(0)
    words = [f"word{number}" for number in range(3000)]
    begins = [" ".join(random.choice(words, 24)) for _ in range(TEMPLATES)]
    return [
        minhash(f"{begins[number % TEMPLATES]} {' '.join(random.choice(words, 6))}").tobytes()
        for number in range(prompts)
    ]


def threshold_near_duplicates(seed: int) -> tuple[float, float]:
    """The same of 1,200 prompts whose template nobody names: near duplicates are found."""
    random = np.random.default_rng(seed)
    template = np.arange(1_200) % TEMPLATES
    values = 2 * random.normal(size=TEMPLATES)[template] + random.normal(size=len(template))
    cuts = _thresholds(values, minhash=_sketches(len(template)))
    return tuple(float(_false_positive_rate(cut, np.sqrt(5)) > 0.05) for cut in cuts)


def review_list(seed: int) -> tuple[float, float]:
    """The benign part of a review list, of a log in which popular prompts score higher.

    40 of 400 benign prompts are asked 25 times each, the others once; 60 attacks. The calibration has 1,000 prompts of
    the same mixture. The naive way takes the p-values of rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from headrift.calibration.artifact import ReferenceScores, discoveries
    from headrift.corpus.judging import ReviewList

    random = np.random.default_rng(seed)

    def benign(n: int, popular: np.ndarray) -> np.ndarray:
        return random.normal(size=n) + 1.5 * popular

    known = ReferenceScores.from_scores(benign(1_000, np.arange(1_000) < 100))
    popular = np.arange(400) < 40
    values = np.concatenate([benign(400, popular), 2.5 + random.normal(size=60)])
    attack, times = np.arange(460) >= 400, np.concatenate([np.where(popular, 25, 1), np.ones(60, np.int64)])
    row = np.repeat(np.arange(460), times)
    p_values = known.p_values(values)
    by_row = discoveries(p_values[row])
    with tempfile.TemporaryDirectory() as folder:
        hashes = [f"{number:016x}" for number in row]
        table = pa.table({"p_value": p_values[row], "group": hashes, "system_hash": ["0" * 16] * len(row)})
        pq.write_table(table, Path(folder) / "part-00000.parquet")
        highest = ReviewList.of_folder(Path(folder), len(row)).highest_p_value
    listed = p_values <= (-1 if highest is None else highest)
    return tuple(
        float((~on_list_attack).mean()) if len(on_list_attack) else 0.0
        for on_list_attack in (attack[row][by_row], attack[listed])
    )


def drift_of_the_tail(seed: int) -> tuple[float, float]:
    """Whether it is not noticed that of 1,000 new prompts 9% have values far above; 300 set the threshold.

    The naive way compares the distributions alone.
    """
    from headrift.calibration import artifact, evidence
    from headrift.calibration.thresholds import CalibrateConfig, Rule, allowed, threshold

    random = np.random.default_rng(seed)
    known = random.normal(size=300)
    cut = threshold(known, np.ones(300, np.int64), 0.05, Rule.BINOMIAL)
    setting = evidence.threshold_setting(CalibrateConfig(), known, cut, allowed(300, 0.05, Rule.BINOMIAL))
    calibration = artifact.Calibration.model_construct(
        threshold=cut, setting=setting, scores=artifact.ReferenceScores.from_scores(known)
    )
    moved = artifact.drift(random.normal(size=1_000) + 6 * (random.random(1_000) < 0.09), calibration)
    by_distance = moved.p_value < 0.01 and moved.distance > 0.1
    return float(not by_distance), float(moved.warning is None)


SIMULATIONS: dict[str, Simulation] = {}
SIMULATIONS["threshold_groups"] = Simulation(
    "over 5% of new prompts are flagged: 800 prompts of 80 templates, named by the rows, set the threshold",
    0.05,
    threshold_groups,
)
SIMULATIONS["threshold_near_duplicates"] = Simulation(
    "the same of 1,200 prompts, whose templates are found as near duplicates",
    0.05,
    threshold_near_duplicates,
    draws=500,
    few=20,
)
SIMULATIONS["review_list"] = Simulation(
    "benign part of the review list, of a log in which popular prompts score higher", 0.1, review_list
)
SIMULATIONS["drift_of_the_tail"] = Simulation(
    "drift of 9% of 1,000 prompts is not noticed (promised: in no more than a tenth)", 0.1, drift_of_the_tail
)
SIMULATIONS["intervals_few_groups"] = Simulation(
    "95% interval of an AUROC of 3 to 14 prompts a class, 20 rows each, misses it", 0.05, intervals_few_groups
)
SIMULATIONS["tpr_at_5_pooled"] = Simulation(
    "attacks found at 5% false positives, of folds with 100 benign prompts (no error: to be as promised)",
    TPR_AT_5,
    tpr_at_5_pooled,
    exact=True,
)
SIMULATIONS["rate_interval_few"] = Simulation("95% interval of a rate of 8 trials misses it", 0.05, rate_interval_few)
SIMULATIONS["seeds_rate"] = Simulation(
    "95% interval of a rate of 12 questions, over three trainings that are asked the same, misses it", 0.05, seeds_rate
)
SIMULATIONS["sessions_rate"] = Simulation(
    "95% interval of the rate of flagged prompts, of 20 sessions with 10 each, misses it", 0.05, sessions_rate
)
SIMULATIONS["internals_length"] = Simulation(
    "length of 40 system prompts is said to matter, and does not (40 prompts)", 0.05, internals_length, few=20
)
SIMULATIONS["internals_features"] = Simulation(
    "a feature of 40 system prompts is said to matter, and does not (40 prompts)", 0.05, internals_features
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
    # Of an error rate: what chance would allow for also if no error, or no variation, was seen.
    by_chance = 0 if simulation.exact else np.sqrt(simulation.nominal * (1 - simulation.nominal) / draws)
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


def is_nominal(result: Mapping) -> bool:
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
        "Made by `python bench/simulations.py`: errors of statistics on made-up data, with 95% intervals over draws. "
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
