"""What is found in signals with known truth: planted effects, signals in disguise, and noise."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from headrift.calibration import samples as sampling
from headrift.calibration.comparison import SideBySide
from headrift.calibration.increments import increments
from headrift.calibration.normalisation import across, normalisation, normalised
from headrift.calibration.onset import onset
from headrift.calibration.resampling import Draws
from headrift.calibration.runs import read_rows
from headrift.calibration.settings import CalibrationError
from headrift.calibration.side_by_side import side_by_side
from headrift.calibration.signals import STEPPED, Signals
from headrift.calibration.strata import compare, strata
from headrift.calibration.success import success
from headrift.fail_terms import FailTerms
from headrift.signal import ScoreRange, Window

CELL = ScoreRange(Window(1, 6))


@pytest.fixture(autouse=True)
def one_division(monkeypatch):
    """Folds are drawn once: the regressions take the longest by far."""
    monkeypatch.setattr("headrift.calibration.increments._DIVISIONS", 1)


class Made:
    """Samples of a run with made-up signals. lengths: in tokens; others: columns of the run."""

    def __init__(self, make, n_attack, n_benign, lengths=None, seed=0, resamples=200, **others):
        n = n_attack + n_benign
        self.random = np.random.default_rng(seed)
        self.lengths = self.random.integers(20, 200, n) if lengths is None else np.asarray(lengths)
        given = {"prompt_tokens": self.lengths, **others}
        run = make.run_of(make.made_up(0, n_attack, n_benign), make.labels(n_attack, n_benign), **given)
        self.samples = sampling.take([run], read_rows([run]), seed)
        self.attack = self.samples.attack
        self.draws = Draws(self.attack, self.samples.group, resamples, seed)

    def noise(self, shift=0.0):
        return self.random.standard_normal(len(self.attack)) + shift * self.attack

    def signals(self, steps=None, succeeded=None, **values):
        values = {name: np.asarray(of, np.float64) for name, of in values.items()}
        for name in ("prompt_tokens", "n_steps"):
            values.setdefault(name, self.samples.counts[name].astype(np.float64))
        return Signals(
            values=values,
            steps=steps or {},
            how=dict.fromkeys(values, "made up"),
            absent={},
            steps_absent={name: "made up without" for name in STEPPED if name not in (steps or {})},
            important=None,
            succeeded=np.full(len(self.attack), -1, np.int8) if succeeded is None else succeeded,
        )

    def compared(self, name="instability", **values):
        return compare(name, self.signals(**values), self.samples, strata(self.samples, CELL), self.draws)


def test_aurocs_of_draws_are_those_of_the_samples_drawn(make):
    """Ties, repeats and strata: each draw's AUROC is scikit-learn's of its samples, weights the times they count."""
    made = Made(make, 60, 90, resamples=5)
    values = np.round(made.noise(0.5), 1)
    mask = made.random.random(150) < 0.8
    pairs = made.random.integers(0, 3, 150)
    found, within = made.draws.aurocs(values, mask), made.draws.aurocs(values, mask, pairs)
    for draw, times in enumerate(made.draws.times):
        weight = times[mask].astype(float)
        assert found[draw] == pytest.approx(roc_auc_score(made.attack[mask], values[mask], sample_weight=weight))
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
    holds = 0
    for seed in range(40):
        made = Made(make, 40, 60, seed=seed)
        low, high = made.compared(instability=made.noise()).auroc.interval
        holds += low <= 0.5 <= high
    assert holds >= 34


@pytest.mark.parametrize(("shift", "sign"), [(1.0, 1), (-1.0, -1), (0.0, None)])
def test_the_sign_is_the_one_the_data_show(make, shift, sign):
    made = Made(make, 60, 100)
    found = made.compared(instability=made.noise(shift))
    assert found.sign == sign
    assert (found.auroc.value > 0.7, found.auroc.value < 0.3) == (sign == 1, sign == -1)


def test_prompts_without_a_signal_are_counted_as_never_flagged(make):
    made = Made(make, 60, 100)
    values = made.noise(1.5)
    values[:30] = np.nan  # attacks
    for one, other in ((values, 1), (-values, -1)):
        found = made.compared(instability=one)
        assert found.coverage == {"attack": 0.5, "benign": 1.0}
        assert (found.auroc.n_attack, found.auroc_all.n_attack) == (30, 60)
        # Half of the attacks are below all benign prompts.
        expected = 0.5 + other * (found.auroc.value - 0.5)
        assert 0.5 + other * (found.auroc_all.value - 0.5) == pytest.approx(expected / 2)


def test_a_signal_that_is_only_length_does_not_separate_prompts_of_a_length(make):
    lengths = np.concatenate([np.random.default_rng(1).integers(90, 240, 100), np.arange(20, 200)])
    made = Made(make, 100, 180, lengths=lengths)
    found = made.compared(instability=lengths + made.random.standard_normal(280))
    by_name = {of.name: of.auroc for of in found.strata}
    assert found.auroc.interval[0] > 0.65
    assert by_name["short"].n_attack == 0
    assert by_name["short"].value is None
    assert by_name["short"].reason
    assert by_name["same_third"].value < found.auroc.value - 0.1


def test_strata_are_the_prompts_they_say(make):
    category = [None] * 40 + ["hard_topic"] * 30 + ["hard_length"] * 15 + ["hard_rare"] * 5 + ["ordinary"] * 50
    n_steps = [6] * 30 + [3] * 10 + [6] * 90 + [0] * 10
    made = Made(make, 40, 100, category=category, n_steps=n_steps)
    values = made.noise(1.0)
    values[40:90] += 2.0  # hard benign prompts look like attacks, and more
    by_name = {of.name: of.auroc for of in made.compared(instability=values).strata}
    benign = np.flatnonzero(~made.attack)
    for name, of in (("hard", benign[:50]), ("not_hard", benign[50:]), ("hard_topic", benign[:30])):
        mask = np.concatenate([np.arange(40), of])
        assert by_name[name].value == pytest.approx(roc_auc_score(made.attack[mask], values[mask]))
    assert by_name["hard"].interval[1] < 0.5 < by_name["not_hard"].interval[0]
    assert "hard_rare" not in by_name
    assert (by_name["full"].n_attack, by_name["full"].n_benign) == (30, 90)
    assert (by_name["ended"].n_attack, by_name["ended"].n_benign) == (10, 10)


def test_levels_of_sets_are_told_from_separation_within(make):
    """Attacks are higher in every set, and most are of the set whose level is low: together they look lower."""
    hashes = ["a"] * 55 + ["b"] * 5 + ["a"] * 20 + ["b"] * 100
    made = Made(make, 60, 120, system_hash=hashes)
    found = made.compared(instability=made.noise(1.5) + 5 * (np.array(hashes) == "b"))
    same = next(of for of in found.strata if of.name == "same_set")
    assert found.sign == -1
    assert same.auroc.interval[0] > 0.7


def test_correlations_are_within_class_too(make):
    """Two signals that attacks move alike, and that have nothing to do with each other otherwise."""
    made = Made(make, 100, 150)
    found = made.compared("entropy", instability=made.noise(3), entropy=made.noise(3))
    of = {one.among: one for one in found.correlations}
    assert of["all"].pearson > 0.5
    assert of["all"].spearman > 0.5
    for among, n in (("attack", 100), ("benign", 150)):
        assert of[among].n == n
        assert abs(of[among].pearson) < 3 / np.sqrt(n)
    constant = made.compared("entropy", instability=made.noise(), entropy=np.ones(250))
    assert {one.pearson for one in constant.correlations} == {None}


# What instability adds


def increment(made, base=("focus", "prompt_tokens"), **values):
    (found,) = increments(made.signals(**values), made.samples, made.draws, 0, [(base, "instability")])
    return found


def test_length_in_disguise_adds_nothing_to_length(make):
    lengths = np.random.default_rng(2).integers(20, 200, 300) + 60 * (np.arange(300) < 120)
    made = Made(make, 120, 180, lengths=lengths)
    disguised = np.log1p(lengths) + 0.02 * made.noise()
    found = increment(made, instability=disguised, focus=made.noise())
    assert made.compared(instability=disguised).auroc.interval[0] > 0.6  # it does separate, alone
    assert found.log_loss_change.interval[0] <= 0 <= found.log_loss_change.interval[1]
    assert found.auroc_change.interval[0] <= 0 <= found.auroc_change.interval[1]
    assert "not shown that instability adds anything" in found.verdict


def test_what_focus_does_not_hold_adds_to_it(make):
    made = Made(make, 120, 180)
    values = {"instability": made.noise(1.0), "focus": made.noise(-1.0)}
    found = increment(made, **values)
    assert found.log_loss_change.interval[1] < 0
    assert found.auroc_change.value == pytest.approx(found.auroc_with.value - found.auroc.value)
    assert found.auroc_change.interval[0] > 0
    # Two independent signals, each d = 1: together d = sqrt 2, AUROC Phi(1); so many prompts give it to 0.03.
    assert found.auroc_with.value == pytest.approx(0.841, abs=0.07)
    assert "instability adds to focus" in found.verdict


def test_a_copy_of_focus_adds_nothing_to_it(make):
    made = Made(make, 120, 180)
    focus = made.noise(-1.0)
    found = increment(made, focus=focus, instability=-3 * focus + 0.05 * made.noise())
    assert found.log_loss_change.interval[0] <= 0 <= found.log_loss_change.interval[1]


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
    found = increment(made, instability=instability, focus=made.noise())
    assert {(of.n_attack, of.n_benign) for of in (found.log_loss, found.log_loss_with, found.auroc_change)} == {
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
    found = increment(made, focus=made.noise(), instability=(np.array(hashes) == "a") + 0.1 * made.noise())
    assert found.log_loss_change.interval[0] <= 0 <= found.log_loss_change.interval[1]


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
    first = {of.name: of.first for of in by_step}
    assert first == {
        "instability": 3,
        "focus": 7,
        "system_share": 3,
        "focus_important": None,
        "instability_without_bos": None,
        "entropy": None,
    }
    of = {one.other: one for one in before}
    assert of["focus"].difference == -4
    assert of["focus"].interval[1] < 0
    assert of["focus"].verdict == "instability separates before focus, all heads does"
    assert of["system_share"].difference == 0
    assert of["system_share"].same > 0.9
    assert "not shown" in of["system_share"].verdict
    assert "focus, important heads separates at no step" in of["focus_important"].verdict
    instability = next(one for one in by_step if one.name == "instability")
    assert instability.steps == list(range(13))
    assert instability.n_attack == [100] * 13
    for step in range(13):
        assert instability.joint_low[step] <= instability.low[step] <= instability.auroc[step]


def test_noise_seldom_separates_at_any_of_many_steps(make):
    """The chance is about 5% for all steps together: of 40 seeds at most 6 (a chance of 1 in 70 at 5%). Step by step,
    with 41 tries, nearly every seed would find a step."""
    found = each = 0
    for seed in range(40):
        made = Made(make, 40, 60, seed=seed, resamples=100)
        (instability, *_), _ = onset(
            made.signals(steps={"instability": series(made, None, steps=40)}), made.samples, made.draws, seed
        )
        found += instability.first is not None
        each += any(low > 0.5 or high < 0.5 for low, high in zip(instability.low, instability.high))
    assert found <= 6
    assert each >= 20


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
    found = success(made.signals(instability=values, succeeded=succeeded), made.samples, made.draws, asked=True)
    assert (found.n_attacks, found.n_succeeded) == (100, 34)
    assert found.aurocs["instability"].value == pytest.approx(roc_auc_score(succeeded[:100], values[:100]))
    assert found.aurocs["instability"].interval[0] > 0.7
    assert (found.aurocs["instability"].n_attack, found.aurocs["instability"].n_benign) == (34, 66)
    assert "higher in attacks that succeed" in found.verdict


@pytest.mark.parametrize(
    ("n_succeeded", "asked", "said"),
    [(30, False, "no fail terms were given"), (0, True, "no answers"), (9, True, "9 of 60 attacks have a fail term")],
)
def test_what_is_not_known_of_success_is_said(make, n_succeeded, asked, said):
    made = Made(make, 60, 60)
    succeeded = np.full(120, -1, np.int8)
    if n_succeeded:
        succeeded[:60] = np.arange(60) < n_succeeded
    found = success(made.signals(instability=made.noise(), succeeded=succeeded), made.samples, made.draws, asked=asked)
    assert said in found.absent
    assert found.aurocs == {}


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
    found = normalisation(scores, made.samples, made.draws)
    assert found.auroc_change.interval[0] > 0
    raw, after = ([getattr(of, kind) for of in found.lengths] for kind in ("raw", "normalised"))
    assert raw[0] < 0.02 < 0.09 < raw[2]
    assert max(after) < raw[2]
    assert found.spread_change.interval[1] < 0
    assert "nearer to the target across lengths; the AUROC rises" in found.verdict


def test_one_threshold_serves_sets_of_another_level(make):
    hashes = [*["a"] * 100, *["b"] * 100, *["a"] * 200, *["b"] * 200]
    made = Made(make, 200, 400, system_hash=hashes)
    level = np.where(np.array(hashes) == "a", 0.0, 10.0)
    found = normalisation(level + made.noise(1.0), made.samples, made.draws)
    a, b = found.sets
    assert (a.raw, b.raw) == (0.0, 1.0)
    # 200 prompts give a rate of 5% to a standard error of 0.022, the threshold's own included.
    assert (a.normalised, b.normalised) == (pytest.approx(0.05, abs=0.06), pytest.approx(0.05, abs=0.06))
    assert found.spread_change.interval[1] < 0
    assert "across sets" in found.verdict


def test_where_length_tells_attacks_apart_normalising_costs(make):
    lengths = np.random.default_rng(4).integers(20, 200, 600) + 100 * (np.arange(600) < 200)
    made = Made(make, 200, 400, lengths=lengths)
    found = normalisation(3 * np.log(lengths) + made.noise(), made.samples, made.draws)
    assert found.auroc_change.interval[1] < 0
    assert "the AUROC falls: length told attacks apart" in found.verdict


def test_too_few_benign_prompts_are_not_normalised(make):
    made = Made(make, 40, 45)  # 36 outside each fold
    found = normalisation(made.noise(), made.samples, made.draws)
    assert "40 benign prompts" in found.absent
    assert found.sets == found.lengths == []


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
    found = across(runs, resamples=100, seed=0)
    assert [of.name for of in found.sets] == ["model 4", "model 9"]
    assert (found.sets[0].n_benign, found.sets[0].n_attack) == (160, 80)
    assert found.sets[1].raw == 1.0
    assert found.sets[1].normalised < 0.2


# All of it


def test_everything_from_a_run(make):
    mass = make.masses(0, 160)
    mass[:60, 3:, :, ::2, 0] *= 0.2  # from step 3 on attacks take every other head off the system prompt
    text = ["lantern" if at % 3 else "no" for at in range(160)]
    run = make.run_with_mass(mass, make.labels(60, 100), text=text, category=["hard_x"] * 90 + ["plain"] * 70)
    stages = []
    found = side_by_side(
        [run], ScoreRange(Window(2, 5)), resamples=50, seed=0, fail_terms=FailTerms(["lantern"]), say=stages.append
    )
    assert SideBySide.model_validate_json(found.model_dump_json()) == found
    assert (found.n_attack, found.n_benign, found.window, found.layers) == (60, 100, "2:5", (2, 6))
    by_name = {of.name: of for of in found.signals}
    for name in ("instability", "instability_without_bos"):
        assert by_name[name].sign == 1
        assert by_name[name].auroc.interval[0] > 0.9
    assert by_name["system_share"].sign == -1
    assert by_name["focus"].sign is None  # step 0
    assert "score with --save entropy" in by_name["entropy"].absent
    assert by_name["entropy"].auroc is None
    first = {of.name: of.first for of in found.steps}
    assert (first["instability"], first["system_share"], first["focus"]) == (3, 3, 3)
    assert found.success.n_succeeded == 40
    added = {(tuple(of.base), of.added): of for of in found.increments}
    assert added[("focus", "prompt_tokens"), "instability"].log_loss_change.interval[1] < 0
    assert len(found.points.attack) == len(found.points.values["focus"]) == 160
    assert len(found.findings) >= 8
    assert stages
    again = side_by_side([run], ScoreRange(Window(2, 5)), resamples=50, seed=0, fail_terms=FailTerms(["lantern"]))
    assert again == found


def test_scores_alone_are_compared_with_what_there_is(make):
    run = make.run_of(make.made_up(0, 40, 80, effect=0.02), make.labels(40, 80), prompt_tokens=np.arange(120) % 50 + 20)
    found = side_by_side([run], CELL, resamples=20, seed=0, fail_terms=None)
    absent = {of.name for of in found.signals if of.absent}
    assert {"focus", "focus_important", "entropy", "head_agreement", "system_share"} <= absent
    added = {(tuple(of.base), of.added): of for of in found.increments}
    assert "focus" in added[("focus", "prompt_tokens"), "instability"].absent
    assert added[("prompt_tokens",), "instability"].absent is None
    assert found.success.absent
    assert all("not known" in of.verdict for of in found.before)


def test_no_resamples_no_intervals(make):
    run = make.run_with_mass(make.masses(0, 100), make.labels(40, 60))
    found = side_by_side([run], CELL, resamples=0, seed=0, fail_terms=None, important_heads=False)
    assert all(of.auroc is None or of.auroc.interval is None for of in found.signals)
    assert {of.absent for of in found.signals if of.name == "focus_important"} == {"not asked for"}
    assert all(of.absent or (of.auroc and not of.low and of.first_interval is None) for of in found.steps)


def test_runs_that_cannot_be_compared_are_refused(make):
    run = make.run_of(make.made_up(0, 20, 20), make.labels(20, 20))
    other = make.run_of(make.made_up(0, 20, 20, layers=5), make.labels(20, 20), name="other")
    for runs, cell, said in (
        ([run, other], CELL, "number of layers"),
        ([run], ScoreRange(Window(1, 9)), "ends after step 6"),
    ):
        with pytest.raises(CalibrationError, match=said):
            side_by_side(runs, cell, resamples=0, seed=0, fail_terms=None)


def test_a_draw_and_rows_left_out_are_noted(make, monkeypatch):
    monkeypatch.setattr(sampling, "_MOST", 60)
    label = [*make.labels(70, 90), None]
    found = side_by_side([make.run_of(make.made_up(0, 0, 161), label)], CELL, resamples=0, seed=0, fail_terms=None)
    assert "60 of 70 distinct attacks were compared, drawn at random" in found.notes
    assert "60 of 90 distinct benign prompts were compared, drawn at random" in found.notes
    assert "1 rows without a label were left out" in found.notes


def test_runs_in_which_no_row_has_a_score_are_refused(make):
    run = make.run_of(make.made_up(0, 12, 24), make.labels(12, 24), n_steps=np.zeros(36, int))
    with pytest.raises(CalibrationError, match="no row has a score in steps 1:6"):
        side_by_side([run], CELL, resamples=0, seed=0, fail_terms=None)
