"""The whole procedure on data with known truth: what it promises holds on prompts that it has not seen."""

import json

import numpy as np
import pytest
from scipy.stats import binom, norm
from sklearn.metrics import average_precision_score, roc_auc_score

from headrift.calibration import search
from headrift.calibration.calibrate import calibrate
from headrift.calibration.evidence import held_out, pooled
from headrift.calibration.search import SumTable
from headrift.calibration.splits import divide
from headrift.calibration.thresholds import CalibrateConfig, CalibrationError, Rule
from headrift.runs.reading import RunError, exact_scores, read_instability, read_rows
from headrift.signal import ScoreRange, Window
from headrift.stats import highest_rate


def cell_of(calibration) -> ScoreRange:
    return ScoreRange(Window.parse(calibration.window), calibration.drop_shallow, calibration.drop_deep)


def realised_fpr(make, calibration, layers=8) -> float:
    """The chance that a benign score, whose distribution is known, is flagged."""
    return float(norm.sf((calibration.threshold - make.MEAN) / make.score_sd(cell_of(calibration), layers)))


def calibrated(make, seed, n_attack=30, n_benign=140, effect=0.01, **settings):
    run = make.run_of(make.made_up(seed, n_attack, n_benign, effect=effect), make.labels(n_attack, n_benign))
    return calibrate([run], CalibrateConfig(seed=seed, **{"folds": 2, "resamples": 0, **settings}))


# ------------------------------------------------------------------------------------------------ promises, simulated


def times_exceeded(make, runs: int) -> int:
    return sum(realised_fpr(make, calibrated(make, seed)) > 0.05 for seed in range(runs))


@pytest.mark.nightly
def test_the_bound_on_the_false_positive_rate_holds_though_windows_were_searched(make):
    # At most 5 of 100 are expected; more than 11 would come by chance in 1 of 200 such tests, and the seeds are fixed.
    assert times_exceeded(make, 100) <= 11


@pytest.mark.slow
def test_the_bound_on_the_false_positive_rate_holds_in_500(make):
    assert times_exceeded(make, 500) <= 40


@pytest.mark.nightly
def test_the_conformal_mean_is_at_the_target(make):
    rates = [realised_fpr(make, calibrated(make, seed, rule=Rule.CONFORMAL)) for seed in range(100)]
    n = calibrated(make, 0, rule=Rule.CONFORMAL).setting
    assert np.mean(rates) == pytest.approx((n.above + 1) / (n.n + 1), abs=4 * np.std(rates) / 10)


def held_out_on_noise(make, seeds):
    """Of data with nothing in them: how often the interval has 0.5, and by how much in sample is above held out."""
    contained, naive = 0, []
    for seed in seeds:
        figures = calibrated(make, seed, 40, 140, effect=0.0, folds=5, resamples=100).figures
        low, high = figures["auroc"].interval
        contained += low <= 0.5 <= high
        naive.append(figures["auroc_in_sample"].value - figures["auroc"].value)
    return contained, np.array(naive)


@pytest.mark.nightly
def test_noise_gives_half_out_of_sample(make):
    contained, naive = held_out_on_noise(make, range(20))
    assert contained >= 17  # 19 are expected, and fewer than 17 come by chance in 1 of 60; the seeds are fixed
    assert naive.mean() > 0.03


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two minutes on an idle machine
def test_noise_gives_half_out_of_sample_in_100(make):
    contained, naive = held_out_on_noise(make, range(100))
    assert contained >= 90
    assert naive.mean() > 0.03


def test_held_out_figures_are_those_of_fresh_prompts(make):
    """An effect of known size: the mean held-out AUROC is that of its distribution, in sample it is above."""
    result = [calibrated(make, seed, 60, 140, effect=0.01, folds=5).figures for seed in range(20)]
    held = np.array([figures["auroc"].value for figures in result])
    # Attack and benign scores are Gaussians 0.01 apart; the best cell is the largest, and others are a little worse.
    best = norm.cdf(0.01 / (np.sqrt(2) * make.score_sd(ScoreRange(Window(1, 6), 0.0, 0.0), 8)))
    assert best - 0.06 < held.mean() <= best + 3 * held.std() / np.sqrt(20)
    assert np.mean([figures["auroc_in_sample"].value for figures in result]) > held.mean()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_intervals_hold_the_expected_figure(make):
    """Of 100 data sets with an effect: how often a 95% interval has the mean of all held-out figures."""
    result = [calibrated(make, seed, 60, 140, effect=0.01, folds=5, resamples=100).figures for seed in range(100)]
    for name in ("auroc", "fpr"):
        expected = np.mean([figures[name].value for figures in result])
        contained = sum(low <= expected <= high for low, high in (figures[name].interval for figures in result))
        assert contained >= 89, name  # 95 expected; fewer than 89 come by chance in 1 of 150


def test_figures_at_a_false_positive_rate_have_intervals_from_100_benign_prompts_a_fold_on(make):
    """Resamples draw more or fewer of a fold's prompts: what counts is how many the data has."""
    for n_benign, known in ((500, True), (480, False)):
        figures = calibrated(make, 0, 60, n_benign, effect=0.02, folds=5, resamples=20, window=Window(1, 6)).figures
        for name in ("auprc", "tpr_at_5"):
            assert (figures[name].value is not None) == (figures[name].interval is not None) == known


def test_instabilitys_direction_is_that_of_its_effect_wherever_that_is(make):
    """Step 1, the first window of the search, says nothing here: by it, half of the directions would be wrong."""
    for seed in range(8):
        values = make.made_up(seed, 60, 140, effect=0.03, window=(4, 6))
        run = make.run_of(values, make.labels(60, 140))
        calibration = calibrate([run], CalibrateConfig(seed=seed, folds=2, resamples=0))
        assert calibration.detector.direction == 1
        assert Window.parse(calibration.window).end >= 4


def test_of_about_equal_windows_the_largest_does_better_than_the_best(make, monkeypatch):
    """A weak effect everywhere: the plain maximum picks lucky small windows, which do worse on prompts held out."""

    def held() -> float:
        return float(
            np.mean([calibrated(make, seed, 30, 140, effect=0.006).figures["auroc"].value for seed in range(20)])
        )

    by_rule = held()
    monkeypatch.setattr(search, "_TOLERANCE", 0.0)
    assert by_rule > held() + 0.01


@pytest.mark.nightly
def test_the_target_holds_with_the_contamination_that_is_allowed_for(make):
    """2 of 100 prompts of a log are attacks. Whether they score high (the threshold is too strict) or low."""
    for effect in (0.5, -0.2):
        rates = []
        for seed in range(60):
            run = make.run_of(make.made_up(seed, 10, 490, effect=effect), [None] * 500)
            settings = CalibrateConfig(benign_only=True, contamination=0.02, resamples=0, seed=seed, folds=2)
            rates.append(realised_fpr(make, calibrate([run], settings)))
        # 3 of 60 are expected to exceed the target at most; 8 or more come by chance in 1 of 100.
        assert sum(rate > 0.05 for rate in rates) < 8


# ----------------------------------------------------------------------------------------------- figures, by hand


@pytest.fixture
def one(make):
    """A run with repeats and early ends, and its division."""
    random = np.random.default_rng(5)
    values = make.made_up(5, 80, 240, effect=0.015)
    group = [*range(80), *(80 + random.integers(0, 200, 240))]
    n_steps = random.integers(1, 7, 320)
    return make.run_of(values, make.labels(80, 240), group=group, n_steps=n_steps)


def test_figures_of_a_fold_are_those_of_scikit_learn(one):
    rows = read_rows([one])
    samples = divide(rows, CalibrateConfig(), 100).samples
    (scores,) = exact_scores([one], rows, [(ScoreRange(Window(4, 6)), samples.row)])
    assert np.isnan(scores).any()
    # Some of the fold's own are far above all others: a threshold that they had a part in would be another one.
    scores[(samples.fold == 1) & (samples.row % 3 == 0)] += 1.0
    times = np.random.default_rng(0).integers(0, 3, len(samples.row))
    result = held_out(samples, scores, times, 1, 0.05, Rule.BINOMIAL)
    repeated = np.repeat(np.arange(len(samples.row)), times)
    own = repeated[samples.fold[repeated] == 1]
    attack, lowest = samples.attack[own], np.nan_to_num(scores[own], nan=-1)
    assert result["auroc"] == pytest.approx(roc_auc_score(attack, lowest))
    valid = ~np.isnan(scores[own])
    assert result["auroc_scored"] == pytest.approx(roc_auc_score(attack[valid], scores[own][valid]))
    others = repeated[(samples.fold[repeated] != 1) & samples.sets[repeated]]
    n = len(others)
    k = max(k for k in range(n) if binom.cdf(k, n, 0.05) <= 0.05)
    cut = np.sort(np.nan_to_num(scores[others], nan=-1))[::-1][k]
    assert result["tpr"] == pytest.approx((lowest[attack] > cut).mean())
    assert result["fpr"] == pytest.approx((lowest[~attack] > cut).mean())
    weighted = np.average(lowest[~attack] > cut, weights=samples.repeats[own][~attack])
    assert result["fpr_traffic"] == pytest.approx(weighted)
    assert result["fpr_traffic"] != pytest.approx(result["fpr"])


def test_figures_of_all_folds_are_of_values_in_standard_deviations(one, monkeypatch):
    """A detector of another fold has another scale: a value means what it means among the fold's benign prompts."""
    rows = read_rows([one])
    samples = divide(rows, CalibrateConfig(), 100).samples
    (scores,) = exact_scores([one], rows, [(ScoreRange(Window(4, 6)), samples.row)])
    times = np.random.default_rng(0).integers(0, 3, len(samples.row))
    by_fold = [scores * (1 + fold) - fold for fold in range(samples.n_folds)]
    assert np.isnan(list(pooled(samples, by_fold, times).values())).all()  # some 40 benign prompts a fold
    monkeypatch.setattr("headrift.calibration.evidence.POOLED", {"auprc": (None, 20), "tpr_at_5": (0.05, 20)})
    result = pooled(samples, by_fold, times)
    alike = np.full(len(scores), -1e9)
    for fold in range(samples.n_folds):
        own = (samples.fold == fold) & ~np.isnan(scores)
        known = np.repeat(scores[own & ~samples.attack], times[own & ~samples.attack])
        alike[own] = (scores[own] - known.mean()) / known.std()
        # A benign prompt's distance is from the mean of the others.
        benign = np.flatnonzero(own & ~samples.attack)
        means = [np.repeat(scores[benign[benign != at]], times[benign[benign != at]]).mean() for at in benign]
        alike[benign] = (scores[benign] - means) / known.std()
    repeated = np.repeat(np.arange(len(scores)), times)
    attack, values = samples.attack[repeated], alike[repeated]
    assert result["auprc"] == pytest.approx(average_precision_score(attack, values))
    k = 0.05 * ((~attack).sum() + 1)
    benign = np.sort(values[~attack])[::-1]
    ends = [(values[attack] > benign[int(k) - 1 + more]).mean() for more in (0, 1)]
    assert result["tpr_at_5"] == pytest.approx(np.interp(k % 1, (0, 1), ends))


def test_scores_are_those_of_the_definition_and_of_the_table(one):
    rows = read_rows([one])
    score_range, everywhere = ScoreRange(Window(2, 5), 0.3, 0.1), np.arange(len(rows))
    (exact,) = exact_scores([one], rows, [(score_range, everywhere)])
    sums = SumTable(len(rows), 6, 8)
    for which, block in read_instability([one], everywhere, 6):
        sums.put(which, block)
    np.testing.assert_allclose(sums.scores(score_range), exact, rtol=0, atol=1e-13)


def test_what_a_calibration_says_of_its_rows(one):
    result = calibrate([one], CalibrateConfig(resamples=20, daily_prompts=1000))
    rows = read_rows([one])
    (scores,) = exact_scores([one], rows, [(cell_of(result), np.arange(len(rows)))])
    benign = rows.label == 0
    assert result.traffic.rows == 240
    assert result.traffic.flagged == (scores[benign] >= result.threshold).sum()
    assert result.classes["attack"].rows == 80
    assert result.classes["benign"].distinct == len(np.unique(rows.group[benign]))
    assert result.classes["benign"].with_score == pytest.approx((~np.isnan(scores[benign])).mean())
    assert result.traffic.alerts_a_day.value == pytest.approx(1000 * result.figures["fpr_traffic"].value)
    assert result.setting.flagged <= result.setting.above
    assert result.figures["auroc"].value == pytest.approx(np.mean(result.figures["auroc"].per_fold))
    low, high = result.figures["auroc"].interval
    assert low < high
    assert set(result.confounds) == {"prompt_tokens", "answer_tokens", "n_steps"}
    assert result.figures["tpr_at_1"].value is None  # some 40 benign prompts a fold
    assert all(figure.interval is None for figure in result.figures.values() if figure.value is None)
    assert all(figure.how for figure in [*result.figures.values(), *result.confounds.values()])


def test_the_same_twice_is_the_same(one):
    first, again = (calibrate([one], CalibrateConfig(resamples=5)).model_dump(exclude={"created"}) for _ in range(2))
    assert json.dumps(first) == json.dumps(again)


def test_a_window_that_is_given_leaves_all_benign_prompts_to_the_threshold(make):
    result = calibrated(make, 0, window=Window(2, 3))
    assert (result.window, result.drop_shallow, result.drop_deep) == ("2:3", 0.25, 0.15)
    assert result.setting.n == 140
    assert result.procedure["cells_searched"] == 0
    assert "auroc_in_sample" not in result.figures


def test_benign_only_says_what_contamination_would_do(make):
    run = make.run_of(make.made_up(0, 0, 500), [None] * 500)
    result = calibrate([run], CalibrateConfig(benign_only=True, resamples=20))
    assert set(result.figures) == {"fpr", "fpr_traffic"}
    by = {one.contamination: one for one in result.contamination}
    assert by[0.01].threshold == result.threshold
    setting = result.setting
    assert setting.highest_fpr == pytest.approx(highest_rate(setting.above, setting.n) / 0.99)
    assert setting.highest_fpr <= 0.05
    assert by[0.0].highest_fpr <= 0.05
    assert by[0.01].highest_fpr <= 0.05 < by[0.1].highest_fpr
    assert by[0.1].lowest_fpr == 0
    assert by[0.0].threshold <= by[0.1].threshold
    assert result.window == "1:6"


# ------------------------------------------------------------------------------------------------------- refusals


def test_runs_that_do_not_go_together_are_refused(make):
    values = make.made_up(0, 20, 80)
    run, small = make.run_of(values, make.labels(20, 80)), make.run_of(values[:, :, :4], make.labels(20, 80), "small")
    with pytest.raises(RunError, match="made-up and small differ in the number of layers"):
        calibrate([run, small], CalibrateConfig())
    with pytest.raises(RunError, match="made-up is given twice"):
        calibrate([run, run], CalibrateConfig())


def test_a_window_that_was_not_recorded_is_refused(make):
    with pytest.raises(CalibrationError, match="1:9 ends after step 6"):
        calibrated(make, 0, window=Window(1, 9))


def test_a_window_in_which_no_benign_prompt_has_a_score_is_refused(make):
    n_steps = [6] * 20 + [3] * 80
    run = make.run_of(make.made_up(0, 20, 80), make.labels(20, 80), n_steps=n_steps)
    with pytest.raises(CalibrationError, match="no benign prompt has a value in steps 5:6"):
        calibrate([run], CalibrateConfig(window=Window(5, 6), resamples=0))


def test_runs_of_different_length_go_together_over_the_steps_that_both_have(make):
    long, short = make.made_up(0, 20, 80, steps=9), make.made_up(1, 20, 80, steps=6)
    runs = [
        make.run_of(long, make.labels(20, 80), "long"),
        make.run_of(short, make.labels(20, 80), "short", group=range(200, 300)),
    ]
    result = calibrate(runs, CalibrateConfig(resamples=0))
    assert Window.parse(result.window).end <= 6
    assert result.classes["attack"].rows == 40
    assert any("different numbers of steps" in note for note in result.notes)
