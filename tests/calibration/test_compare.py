"""What is found in signals with known truth: planted effects, signals in disguise, and noise."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp
from sklearn.metrics import roc_auc_score

from headrift.calibration import splits
from headrift.calibration.compare import SideBySide, across, side_by_side
from headrift.calibration.compare.aurocs import _verdict as verdict_of
from headrift.calibration.compare.aurocs import increments, separate, strata, success
from headrift.calibration.compare.measurements import ComparisonBootstrap, Measurements
from headrift.calibration.compare.normalisation import normalisation, normalised
from headrift.calibration.compare.onset import onset
from headrift.calibration.thresholds import CalibrationError
from headrift.fail_terms import FailTerms
from headrift.runs.reading import RunError, read_rows
from headrift.signal import ScoreRange, Window
from headrift.signals import signals

RANGE = ScoreRange(Window(1, 6))
BY_STEP = [entry.name for entry in signals(compared=True, by_step=True)]


@pytest.fixture(autouse=True)
def one_division(monkeypatch):
    """Folds are drawn once: the regressions take the longest by far."""
    monkeypatch.setattr("headrift.calibration.compare.aurocs._DIVISIONS", 1)


class Made:
    """Samples of a run with made-up signals. lengths: in tokens; others: columns of the run."""

    def __init__(self, make, n_attack, n_benign, lengths=None, seed=0, resamples=200, **others):
        n = n_attack + n_benign
        self.random = np.random.default_rng(seed)
        self.lengths = self.random.integers(20, 200, n) if lengths is None else np.asarray(lengths)
        given = {"prompt_tokens": self.lengths, **others}
        run = make.run_of(make.made_up(0, n_attack, n_benign), make.labels(n_attack, n_benign), **given)
        self.samples = splits.take_samples([run], read_rows([run]), seed)
        self.attack = self.samples.attack
        self.draws = ComparisonBootstrap(self.samples, resamples, seed)

    def noise(self, shift=0.0):
        return self.random.standard_normal(len(self.attack)) + shift * self.attack

    def signals(self, steps=None, succeeded=None, **values):
        values = {name: np.asarray(one, np.float64) for name, one in values.items()}
        for name in ("prompt_tokens", "n_steps"):
            values.setdefault(name, self.samples.counts[name].astype(np.float64))
        return Measurements(
            values=values,
            steps=steps or {},
            how=dict.fromkeys(values, "made up"),
            absent={},
            steps_absent={name: "made up without" for name in BY_STEP if name not in (steps or {})},
            important=None,
            succeeded=np.full(len(self.attack), -1, np.int8) if succeeded is None else succeeded,
        )

    def compared(self, name="instability", **values):
        return separate(name, self.signals(**values), self.samples, strata(self.samples, RANGE), self.draws)


def test_aurocs_of_draws_are_those_of_the_samples_drawn(make):
    """Ties, repeats and strata: each draw's AUROC is scikit-learn's of its samples, weights the times they count."""
    made = Made(make, 60, 90, resamples=5)
    values = np.round(made.noise(0.5), 1)
    mask = made.random.random(150) < 0.8
    pairs = made.random.integers(0, 3, 150)
    result, within = (made.draws.auroc(values, made.attack, mask, by) for by in (None, pairs))
    for draw, times in enumerate(made.draws.times):
        weight = times[mask].astype(float)
        assert result[draw] == pytest.approx(roc_auc_score(made.attack[mask], values[mask], sample_weight=weight))
        won = n = 0.0
        for at in range(3):
            some = mask & (pairs == at)
            pairs_there = times[some & made.attack].sum() * float(times[some & ~made.attack].sum())
            won += pairs_there * roc_auc_score(made.attack[some], values[some], sample_weight=times[some])
            n += pairs_there
        assert within[draw] == pytest.approx(won / n)
    assert (made.draws.times[0] == 1).all()
    assert made.draws.times[1:, made.attack].sum(axis=1).tolist() == [60] * 5


def test_groups_are_drawn_whole(make):
    """A prompt that is an attack in one row and benign in another counts as often in both."""
    made = Made(make, 40, 60, group=[*range(40), *range(20, 80)], resamples=20)
    of_group = {group: np.flatnonzero(made.samples.group == group) for group in range(20, 40)}
    for members in of_group.values():
        assert len(members) == 2
        assert (made.draws.times[:, members[0]] == made.draws.times[:, members[1]]).all()


def test_thresholds_of_draws_keep_the_rate(make):
    made = Made(make, 20, 200, resamples=20)
    values, benign = made.noise(), ~made.attack
    threshold = made.draws.threshold(values, benign, 0.05)
    rate = made.draws.rate_above(values, benign, threshold)
    assert (rate <= 0.05 + 1e-9).all()
    below = np.array([values[benign & (values < at)].max() for at in threshold])
    assert (made.draws.rate_above(values, benign, below) > 0.05).all()


# What separates


def test_noise_separates_nothing(make):
    """The 95% interval holds 0.5 for at least 34 of 40 seeds: fewer has a chance of 1 in 100 at 95%, of 1 in 12 at
    the 92% that percentile intervals of so few prompts have. No seed is drawn anew."""
    n_within = 0
    for seed in range(40):
        made = Made(make, 40, 60, seed=seed)
        low, high = made.compared(instability=made.noise()).auroc.interval
        n_within += low <= 0.5 <= high
    assert n_within >= 34


@pytest.mark.parametrize(("shift", "sign"), [(1.0, 1), (-1.0, -1), (0.0, None)])
def test_the_sign_is_the_one_the_data_show(make, shift, sign):
    made = Made(make, 60, 100)
    result = made.compared(instability=made.noise(shift))
    assert result.sign == sign
    assert (result.auroc.value > 0.7, result.auroc.value < 0.3) == (sign == 1, sign == -1)


def test_prompts_without_a_signal_are_counted_as_never_flagged(make):
    made = Made(make, 60, 100)
    values = made.noise(1.5)
    values[:30] = np.nan  # attacks
    for one, other in ((values, 1), (-values, -1)):
        result = made.compared(instability=one)
        assert result.coverage == {"attack": 0.5, "benign": 1.0}
        assert (result.auroc.n_attack, result.auroc_all.n_attack) == (30, 60)
        # Half of the attacks are below all benign prompts.
        expected = 0.5 + other * (result.auroc.value - 0.5)
        assert 0.5 + other * (result.auroc_all.value - 0.5) == pytest.approx(expected / 2)


def test_a_signal_that_is_only_length_does_not_separate_prompts_of_a_length(make):
    lengths = np.concatenate([np.random.default_rng(1).integers(90, 240, 100), np.arange(20, 200)])
    made = Made(make, 100, 180, lengths=lengths)
    result = made.compared(instability=lengths + made.random.standard_normal(280))
    by_name = {one.name: one.auroc for one in result.strata}
    assert result.auroc.interval[0] > 0.65
    assert by_name["short"].n_attack == 0
    assert by_name["short"].value is None
    assert by_name["short"].reason
    assert by_name["same_third"].value < result.auroc.value - 0.1


def test_strata_are_the_prompts_they_say(make):
    category = [None] * 40 + ["hard_topic"] * 30 + ["hard_length"] * 15 + ["hard_rare"] * 5 + ["ordinary"] * 50
    n_steps = [6] * 30 + [3] * 10 + [6] * 90 + [0] * 10
    made = Made(make, 40, 100, category=category, n_steps=n_steps)
    values = made.noise(1.0)
    values[40:90] += 2.0  # hard benign prompts look like attacks, and more
    by_name = {one.name: one.auroc for one in made.compared(instability=values).strata}
    benign = np.flatnonzero(~made.attack)
    for name, one in (("hard", benign[:50]), ("not_hard", benign[50:]), ("hard_topic", benign[:30])):
        mask = np.concatenate([np.arange(40), one])
        assert by_name[name].value == pytest.approx(roc_auc_score(made.attack[mask], values[mask]))
    assert by_name["hard"].interval[1] < 0.5 < by_name["not_hard"].interval[0]
    assert "hard_rare" not in by_name
    assert (by_name["full"].n_attack, by_name["full"].n_benign) == (30, 90)
    assert (by_name["ended"].n_attack, by_name["ended"].n_benign) == (10, 10)


def test_levels_of_sets_are_told_from_separation_within(make):
    """Attacks are higher in every set, and most are of the set whose level is low: together they look lower."""
    hashes = ["a"] * 55 + ["b"] * 5 + ["a"] * 20 + ["b"] * 100
    made = Made(make, 60, 120, system_hash=hashes)
    result = made.compared(instability=made.noise(1.5) + 5 * (np.array(hashes) == "b"))
    same = next(one for one in result.strata if one.name == "same_set")
    assert result.sign == -1
    assert same.auroc.interval[0] > 0.7


def test_the_mean_over_sets_has_an_interval_over_sets(make):
    hashes = np.tile(["a", "b", "c", "d"], 45)
    made = Made(make, 60, 120, system_hash=hashes.tolist())
    values = made.noise() + made.attack * np.repeat(np.arange(4.0), 1)[np.searchsorted(["a", "b", "c", "d"], hashes)]
    result = made.compared(instability=values).over_sets
    own = [roc_auc_score(made.attack[hashes == name], values[hashes == name]) for name in ("a", "b", "c", "d")]
    assert result.value == pytest.approx(np.mean(own))
    assert result.interval == pytest.approx(tuple(ttest_1samp(own, 0).confidence_interval(0.95)))
    assert result.sets == 4
    assert Made(make, 30, 40).compared(instability=np.arange(70.0)).over_sets is None


def test_few_prompts_under_many_system_prompts_have_no_interval(make):
    """A hundred rows of five attacks: rows are not what counts."""
    groups, hashes = (np.arange(200) // 20).tolist(), [str(number % 20) for number in range(200)]
    made = Made(make, 100, 100, group=groups, system_hash=hashes)
    result = made.compared(instability=made.noise(1.0))
    assert (result.auroc.n_attack, result.auroc.interval, result.sign) == (100, None, None)


def test_correlations_are_within_class_too(make):
    """Two signals that attacks move alike, and that have nothing to do with each other otherwise."""
    made = Made(make, 100, 150)
    result = made.compared("entropy", instability=made.noise(3), entropy=made.noise(3))
    one = {one.among: one for one in result.correlations}
    assert one["all"].pearson > 0.5
    assert one["all"].spearman > 0.5
    for among, n in (("attack", 100), ("benign", 150)):
        assert one[among].n == n
        assert abs(one[among].pearson) < 3 / np.sqrt(n)
    constant = made.compared("entropy", instability=made.noise(), entropy=np.ones(250))
    assert {one.pearson for one in constant.correlations} == {None}


# What instability adds


def increment(made, base=("focus", "prompt_tokens"), **values):
    (result,) = increments(made.signals(**values), made.samples, made.draws, 0, [(base, "instability")])
    return result


def test_length_in_disguise_adds_nothing_to_length(make):
    lengths = np.random.default_rng(2).integers(20, 200, 300) + 60 * (np.arange(300) < 120)
    made = Made(make, 120, 180, lengths=lengths)
    disguised = np.log1p(lengths) + 0.02 * made.noise()
    result = increment(made, instability=disguised, focus=made.noise())
    assert made.compared(instability=disguised).auroc.interval[0] > 0.6  # it does separate, alone
    assert result.log_loss_change.interval[0] <= 0 <= result.log_loss_change.interval[1]
    assert result.auroc_change.interval[0] <= 0 <= result.auroc_change.interval[1]
    assert result.verdict == "not shown"


def test_what_focus_does_not_hold_adds_to_it(make):
    made = Made(make, 120, 180)
    values = {"instability": made.noise(1.0), "focus": made.noise(-1.0)}
    result = increment(made, **values)
    assert result.log_loss_change.interval[1] < 0
    assert result.auroc_change.value == pytest.approx(result.auroc_with.value - result.auroc.value)
    assert result.auroc_change.interval[0] > 0
    # Two independent signals, each d = 1: together d = sqrt 2, AUROC Phi(1); so many prompts give it to 0.03.
    assert result.auroc_with.value == pytest.approx(0.841, abs=0.07)
    assert result.verdict.startswith("adds: ")


def test_a_copy_of_focus_adds_nothing_to_it(make):
    made = Made(make, 120, 180)
    focus = made.noise(-1.0)
    result = increment(made, focus=focus, instability=-3 * focus + 0.05 * made.noise())
    assert result.log_loss_change.interval[0] <= 0 <= result.log_loss_change.interval[1]


def test_predictions_are_of_prompts_that_the_regression_has_not_seen(make):
    """On prompts that it was fitted on, noise would lower the log-loss each time."""
    changes = []
    for seed in range(10):
        made = Made(make, 30, 40, seed=seed, resamples=0)
        changes.append(increment(made, instability=made.noise(), focus=made.noise()).log_loss_change.value)
    assert np.mean(changes) > 0


def test_prompts_without_a_signal_are_left_out_of_both_regressions(make):
    made = Made(make, 60, 90)
    instability = made.noise()
    instability[:20] = np.nan
    result = increment(made, instability=instability, focus=made.noise())
    assert {(one.n_attack, one.n_benign) for one in (result.log_loss, result.log_loss_with, result.auroc_change)} == {
        (40, 90)
    }
    instability[:45] = np.nan
    assert (
        "20 attacks and as many benign prompts" in increment(made, instability=instability, focus=made.noise()).absent
    )


def test_sets_with_other_shares_of_attacks_are_no_signal(make):
    """A signal that only tells the sets apart adds nothing, though the sets differ in their share of attacks."""
    hashes = ["a"] * 90 + ["b"] * 30 + ["a"] * 60 + ["b"] * 120
    made = Made(make, 120, 180, system_hash=hashes)
    result = increment(made, focus=made.noise(), instability=(np.array(hashes) == "a") + 0.1 * made.noise())
    assert result.log_loss_change.interval[0] <= 0 <= result.log_loss_change.interval[1]


def test_predictions_that_get_worse_are_no_verdict():
    """Of a signal that says nothing they do so in 4 of 10 data sets, by fitting it."""
    assert verdict_of((0.001, 0.02), (0.4, 0.6), (-0.02, 0.01)) == "not shown"
    assert verdict_of((-0.02, -0.001), (0.6, 0.8), (-0.02, 0.01)) == "adds: the held-out log-loss falls"
    assert verdict_of((-0.02, 0.01), (0.6, 0.8), (0.01, 0.1)).startswith("ranks held-out prompts better")
    assert verdict_of(None, (0.6, 0.8), (0.01, 0.1)) == "not known: too few prompts"


# Step by step


def series(made, onset_at, shift=1.5, steps=12):
    values = made.random.standard_normal((len(made.attack), steps + 1))
    if onset_at is not None:
        values[:, onset_at:] += shift * made.attack[:, None]
    return values


def test_planted_onsets_are_recovered(make):
    made = Made(make, 100, 150)
    steps = {
        "instability": series(made, 3),
        "focus": series(made, 7, -1.5),
        "system_share": series(made, 3),
        "focus_important": series(made, None),
    }
    by_step, before = onset(made.signals(steps=steps), made.samples, made.draws, 0)
    first = {one.name: one.first for one in by_step}
    assert first == {
        "instability": 3,
        "focus": 7,
        "system_share": 3,
        "focus_important": None,
        "instability_without_bos": None,
        "entropy": None,
    }
    one = {one.other: one for one in before}
    assert one["focus"].difference == -4
    assert one["focus"].interval[1] < 0
    assert one["focus"].verdict == "earlier"
    assert one["system_share"].difference == 0
    assert one["system_share"].same > 0.9
    assert one["system_share"].verdict == "not shown"
    assert "focus, important heads separates at no step" in one["focus_important"].verdict
    instability = next(one for one in by_step if one.name == "instability")
    assert instability.steps == list(range(13))
    assert instability.n_attack == [100] * 13
    for step in range(13):
        assert instability.joint_low[step] <= instability.low[step] <= instability.auroc[step]


def test_noise_seldom_separates_at_any_of_many_steps(make):
    """The chance is about 5% for all steps together: of 40 seeds at most 6 (a chance of 1 in 70 at 5%). Step by step,
    with 41 tries, nearly every seed would find a step."""
    result = each = 0
    for seed in range(40):
        made = Made(make, 40, 60, seed=seed, resamples=100)
        (instability, *_), _ = onset(
            made.signals(steps={"instability": series(made, None, steps=40)}), made.samples, made.draws, seed
        )
        result += instability.first is not None
        each += any(low > 0.5 or high < 0.5 for low, high in zip(instability.low, instability.high))
    assert result <= 6
    assert each >= 20


def test_noise_of_groups_seldom_separates_at_any_step(make):
    """Values that are alike in a group, and groups of one class: labels of single prompts would find steps in half."""
    result = 0
    for seed in range(20):
        groups, hashes = (np.arange(120) // 4).tolist(), [str(number % 4) for number in range(120)]
        made = Made(make, 60, 60, seed=seed, resamples=2, group=groups, system_hash=hashes)
        shared = made.random.standard_normal((30, 13))[np.arange(120) // 4]
        steps = {"instability": 0.9 * shared + 0.4 * series(made, None)}
        (instability, *_), _ = onset(made.signals(steps=steps), made.samples, made.draws, seed)
        result += instability.first is not None
    assert result <= 4


def test_steps_that_few_answers_reach_are_not_shown(make):
    made = Made(make, 40, 60)
    values = series(made, 2)
    values[5:40, 6:] = np.nan
    (instability, *_), _ = onset(made.signals(steps={"instability": values}), made.samples, made.draws, 0)
    assert instability.steps == list(range(6))


# Success


def test_success_is_told_among_attacks_only(make):
    made = Made(make, 100, 100)
    succeeded = np.full(200, -1, np.int8)
    succeeded[:100] = np.arange(100) % 3 == 0
    values = made.noise() + 1.5 * (succeeded == 1)
    result = success(made.signals(instability=values, succeeded=succeeded), made.samples, made.draws, has_terms=True)
    assert (result.n_attacks, result.n_succeeded) == (100, 34)
    assert result.aurocs["instability"].value == pytest.approx(roc_auc_score(succeeded[:100], values[:100]))
    assert result.aurocs["instability"].interval[0] > 0.7
    assert (result.aurocs["instability"].n_attack, result.aurocs["instability"].n_benign) == (34, 66)
    assert "higher in attacks that succeed" in result.verdict


@pytest.mark.parametrize(
    ("n_succeeded", "has_terms", "message"),
    [(30, False, "no fail terms were given"), (0, True, "no answers"), (9, True, "9 of 60 attacks have a fail term")],
)
def test_what_is_not_known_of_success_is_said(make, n_succeeded, has_terms, message):
    made = Made(make, 60, 60)
    succeeded = np.full(120, -1, np.int8)
    if n_succeeded:
        succeeded[:60] = np.arange(60) < n_succeeded
    result = success(
        made.signals(instability=made.noise(), succeeded=succeeded), made.samples, made.draws, has_terms=has_terms
    )
    assert message in result.absent
    assert result.aurocs == {}


# Normalisation


def test_a_planted_length_trend_is_removed(make):
    """Scores rise with length, and their spread does; attacks are a little higher at each length."""
    lengths = np.random.default_rng(3).integers(20, 400, 900)
    made = Made(make, 300, 600, lengths=lengths)
    trend = np.log(lengths)
    scores = 5 * trend + trend * made.noise(1.0)
    values = normalised(scores, made.samples)
    benign = ~made.attack
    assert np.corrcoef(trend[benign], scores[benign])[0, 1] > 0.35
    assert abs(np.corrcoef(trend[benign], values[benign])[0, 1]) < 3 / np.sqrt(600)
    assert np.median(values[benign]) == pytest.approx(0, abs=0.1)
    # 600 prompts give a 10% rate to a standard error of 0.012.
    assert (values[benign] > 1).mean() == pytest.approx(0.1, abs=0.04)
    result = normalisation(scores, made.samples, made.draws)
    assert result.auroc_change.interval[0] > 0
    raw, after = ([getattr(one, kind) for one in result.lengths] for kind in ("raw", "normalised"))
    assert raw[0] < 0.02 < 0.09 < raw[2]
    assert max(after) < raw[2]
    assert result.spread_change.interval[1] < 0
    assert result.verdict == "false positive rates across lengths: nearer to the target; the AUROC rises"


def test_one_threshold_serves_sets_of_another_level(make):
    hashes = [*["a"] * 100, *["b"] * 100, *["a"] * 200, *["b"] * 200]
    made = Made(make, 200, 400, system_hash=hashes)
    level = np.where(np.array(hashes) == "a", 0.0, 10.0)
    result = normalisation(level + made.noise(1.0), made.samples, made.draws)
    a, b = result.sets
    assert (a.raw, b.raw) == (0.0, 1.0)
    # 200 prompts give a rate of 5% to a standard error of 0.022, the threshold's own included.
    assert (a.normalised, b.normalised) == (pytest.approx(0.05, abs=0.06), pytest.approx(0.05, abs=0.06))
    assert result.spread_change.interval[1] < 0
    assert "across sets" in result.verdict


def test_where_length_tells_attacks_apart_normalising_costs(make):
    lengths = np.random.default_rng(4).integers(20, 200, 600) + 100 * (np.arange(600) < 200)
    made = Made(make, 200, 400, lengths=lengths)
    result = normalisation(3 * np.log(lengths) + made.noise(), made.samples, made.draws)
    assert result.auroc_change.interval[1] < 0
    assert "the AUROC falls: length told attacks apart" in result.verdict


def test_too_few_benign_prompts_are_not_normalised(make):
    made = Made(make, 40, 45)  # 36 outside each fold
    result = normalisation(made.noise(), made.samples, made.draws)
    assert "40 benign prompts" in result.absent
    assert result.sets == result.lengths == []


def test_runs_of_several_models_are_normalised_together(make):
    """The same prompts in both: two samples each, of one group."""
    random = np.random.default_rng(0)
    label = make.labels(80, 160)
    runs = [
        make.run_of(
            make.made_up(0, 80, 160, layers=layers),
            label,
            name=f"model {layers}",
            score=layers + scale * random.standard_normal(240),
            prompt_tokens=random.integers(20, 200, 240),
        )
        for layers, scale in ((4, 1.0), (9, 0.1))
    ]
    result = across(runs, resamples=100, seed=0)
    assert [one.name for one in result.sets] == ["model 4", "model 9"]
    assert (result.sets[0].n_benign, result.sets[0].n_attack) == (160, 80)
    assert result.sets[1].raw == 1.0
    assert result.sets[1].normalised < 0.2


# All of it


def test_everything_from_a_run(make):
    mass = make.masses(0, 160)
    mass[:60, 3:, :, ::2, 0] *= 0.2  # from step 3 on attacks take every other head off the system prompt
    text = ["lantern" if at % 3 else "no" for at in range(160)]
    run = make.run_with_mass(mass, make.labels(60, 100), text=text, category=["hard_x"] * 90 + ["plain"] * 70)
    stages = []
    result = side_by_side(
        [run], ScoreRange(Window(2, 5)), resamples=50, seed=0, fail_terms=FailTerms(["lantern"]), say=stages.append
    )
    assert SideBySide.model_validate_json(result.model_dump_json()) == result
    assert (result.n_attack, result.n_benign, result.window, result.layers) == (60, 100, "2:5", (2, 6))
    by_name = {one.name: one for one in result.signals}
    for name in ("instability", "instability_without_bos"):
        assert by_name[name].sign == 1
        assert by_name[name].auroc.interval[0] > 0.9
    assert by_name["system_share"].sign == -1
    assert by_name["focus"].sign is None  # step 0
    assert "score with --save entropy" in by_name["entropy"].absent
    assert by_name["entropy"].auroc is None
    first = {one.name: one.first for one in result.steps}
    assert (first["instability"], first["system_share"], first["focus"]) == (3, 3, 3)
    assert result.success.n_succeeded == 40
    added = {(tuple(one.base), one.added): one for one in result.increments}
    assert added[("focus", "prompt_tokens"), "instability"].log_loss_change.interval[1] < 0
    assert len(result.findings) >= 8
    assert stages
    again = side_by_side([run], ScoreRange(Window(2, 5)), resamples=50, seed=0, fail_terms=FailTerms(["lantern"]))
    assert again == result


def test_scores_alone_are_compared_with_what_there_is(make):
    run = make.run_of(make.made_up(0, 40, 80, effect=0.02), make.labels(40, 80), prompt_tokens=np.arange(120) % 50 + 20)
    result = side_by_side([run], RANGE, resamples=20, seed=0, fail_terms=None)
    absent = {one.name for one in result.signals if one.absent}
    assert {"focus", "focus_important", "entropy", "head_agreement", "system_share"} <= absent
    added = {(tuple(one.base), one.added): one for one in result.increments}
    assert "focus" in added[("focus", "prompt_tokens"), "instability"].absent
    assert added[("prompt_tokens",), "instability"].absent is None
    assert result.success.absent
    assert all("not known" in one.verdict for one in result.before)


def test_no_resamples_no_intervals(make):
    run = make.run_with_mass(make.masses(0, 100), make.labels(40, 60))
    result = side_by_side([run], RANGE, resamples=0, seed=0, fail_terms=None, important_heads=False)
    assert all(one.auroc is None or one.auroc.interval is None for one in result.signals)
    assert {one.absent for one in result.signals if one.name == "focus_important"} == {"not requested"}
    assert all(one.absent or (one.auroc and not one.low and one.first_interval is None) for one in result.steps)


def test_runs_that_cannot_be_compared_are_refused(make):
    run = make.run_of(make.made_up(0, 20, 20), make.labels(20, 20))
    other = make.run_of(make.made_up(0, 20, 20, layers=5), make.labels(20, 20), name="other")
    for runs, score_range, message in (
        ([run, other], RANGE, "number of layers"),
        ([run], ScoreRange(Window(1, 9)), "ends after step 6"),
    ):
        with pytest.raises((CalibrationError, RunError), match=message):
            side_by_side(runs, score_range, resamples=0, seed=0, fail_terms=None)


def test_a_draw_and_rows_left_out_are_noted(make, monkeypatch):
    monkeypatch.setattr(splits, "_MOST_COMPARED", 60)
    label = [*make.labels(70, 90), None]
    result = side_by_side([make.run_of(make.made_up(0, 0, 161), label)], RANGE, resamples=0, seed=0, fail_terms=None)
    assert "60 of 70 distinct attacks were compared, drawn at random" in result.notes
    assert "60 of 90 distinct benign prompts were compared, drawn at random" in result.notes
    assert "1 rows without a label were left out" in result.notes


def test_runs_in_which_no_row_has_a_score_are_refused(make):
    run = make.run_of(make.made_up(0, 12, 24), make.labels(12, 24), n_steps=np.zeros(36, int))
    with pytest.raises(CalibrationError, match="no row has a score in steps 1:6"):
        side_by_side([run], RANGE, resamples=0, seed=0, fail_terms=None)
