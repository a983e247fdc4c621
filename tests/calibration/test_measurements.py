"""The signals of each sample, against `signal` by hand; which samples are taken; important heads."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from headrift import signal
from headrift.calibration import splits
from headrift.calibration.compare import measurements
from headrift.calibration.thresholds import CalibrationError
from headrift.fail_terms import FailTerms
from headrift.runs.reading import read_rows
from headrift.signal import ScoreRange, Window

LABEL = ["attack"] * 30 + ["benign"] * 50
RANGE = ScoreRange(Window(2, 4))


def read(runs, score_range=RANGE, **options):
    taken = splits.take_samples(runs, read_rows(runs), 0)
    return taken, measurements.measure(runs, taken, score_range, **options)


def region(make, mass, name):
    return mass[..., make.REGIONS.index(name)].astype(np.float64)


def test_signals_are_those_of_signal_py(make):
    """Of every sample, over another window than the run's, with answers that end before and inside it."""
    mass = make.masses(0, 80)
    n_steps = np.random.default_rng(1).integers(0, 7, 80)
    entropy = [np.linspace(1, 2, last + 1, dtype=np.float32) + at for at, last in enumerate(n_steps)]
    score_range = ScoreRange(Window(2, 4), 0.0, 0.3)
    _, result = read([make.run_with_mass(mass, LABEL, n_steps=n_steps, entropy_steps=entropy)], score_range)
    over = {"drop_shallow": 0.0, "drop_deep": 0.3}
    for at in range(80):
        system, user, prompt, bos = (region(make, mass[at], name) for name in make.REGIONS)
        share, without = system / prompt, system / (prompt - bos)
        last = int(n_steps[at])
        window = {"window": score_range.window, "n_steps": last}
        expected = {
            "instability": signal.score(signal.instability(share), **window, **over).value,
            "instability_without_bos": signal.score(signal.instability(without), **window, **over).value,
            "system_share": signal.mean_share(share, **window, **over),
            "system_share_without_bos": signal.mean_share(without, **window, **over),
            "head_agreement": signal.head_agreement(share, **window, **over),
            "entropy": signal.window_mean(entropy[at], **window),
            "focus": signal.focus(signal.focus_heads(system, user)[0]),
        }
        for name, value in expected.items():
            # Masses are float32; BOS is taken off a sum some twice what is left.
            np.testing.assert_allclose(result.values[name][at], np.nan if value is None else value, rtol=2e-5)
    assert np.isnan(result.values["instability"]).sum() == (n_steps < 2).sum() > 0


def test_steps_are_those_of_signal_py(make):
    mass = make.masses(0, 80)
    n_steps = np.random.default_rng(1).integers(0, 7, 80)
    taken, result = read([make.run_with_mass(mass, LABEL, n_steps=n_steps)])
    for at in (0, 11, 79):
        system, user, prompt, _ = (region(make, mass[at], name) for name in make.REGIONS)
        share = system / prompt
        for step in range(1, 7):
            score = signal.score(signal.instability(share), Window(step, step), n_steps=int(n_steps[at])).value
            mean = signal.mean_share(share, Window(step, step), n_steps=int(n_steps[at]))
            for name, value in (("instability", score), ("system_share", mean)):
                expected = np.nan if value is None else value
                np.testing.assert_allclose(result.steps[name][at, step], expected, rtol=1e-5)
        focus = signal.focus_heads(system, user)[: n_steps[at] + 1].mean(axis=(1, 2))
        np.testing.assert_allclose(result.steps["focus"][at, : len(focus)], focus, rtol=1e-5)
        assert np.isnan(result.steps["focus"][at, len(focus) :]).all()
    assert "entropy" in result.steps_absent
    assert len(taken) == 80


def test_shares_serve_where_no_mass_was_saved(make):
    mass = make.masses(0, 80)
    _, exact = read([make.run_with_mass(mass, LABEL)])
    _, rounded = read([make.run_with_mass(mass, LABEL, save=("shares",))])
    # float16 keeps 11 bits: a share is off by up to 2^-11 of itself, and a mean by no more.
    np.testing.assert_allclose(rounded.values["system_share"], exact.values["system_share"], rtol=2**-11)
    assert "score with --save mass" in rounded.absent["instability_without_bos"]
    assert "score with --save focus" in rounded.absent["focus_important"]


def test_a_run_of_scores_alone_gives_its_own_columns_and_says_so(make):
    own = {name: np.linspace(0, 1, 80) + at for at, name in enumerate(("system_share", "head_agreement", "focus"))}
    run = make.run_of(make.made_up(0, 30, 50), LABEL, **own)
    _, result = read([run])
    for name, values in own.items():
        np.testing.assert_array_equal(result.values[name], values)
    assert "own column over steps 1:6, not the requested range" in result.how["system_share"]
    _, same = read([run], run.score_range)
    assert "not the requested range" not in same.how["system_share"]
    assert set(result.absent) == {
        "instability_without_bos",
        "system_share_without_bos",
        "focus_important",
        "entropy",
    }
    assert all(result.absent.values())
    assert set(result.steps) == {"instability"}
    assert all(reason and "score with" in reason for reason in result.steps_absent.values())


def test_layers_that_are_not_counted_are_left_out_of_all(make):
    """Instability that is NaN (the layer no longer sees the system prompt) takes its shares with it."""
    mass = make.masses(0, 80)
    share = region(make, mass[0], "system") / region(make, mass[0], "prompt")
    counted = np.ones((7, 8), np.bool_)
    counted[3:, 4] = False
    (_, all_layers), (_, some) = (read([make.run_with_mass(mass, LABEL, counted=one)]) for one in (True, counted))
    expected = signal.mean_share(share, Window(2, 4), n_steps=6, counted=counted)
    assert some.values["system_share"][0] == pytest.approx(expected, rel=1e-5)
    assert some.values["system_share"][0] != pytest.approx(all_layers.values["system_share"][0], rel=1e-5)
    assert some.values["instability_without_bos"][0] != all_layers.values["instability_without_bos"][0]


def test_rows_are_found_across_runs_whose_regions_are_in_another_order(make):
    mass = make.masses(0, 80)
    reversed_mass = np.ascontiguousarray(mass[..., ::-1])
    first = make.run_with_mass(mass, LABEL)
    second = make.run_of(
        signal.instability(region(make, mass, "system") / region(make, mass, "prompt")).astype(np.float32),
        LABEL,
        name="turned",
        regions=make.REGIONS[::-1],
        group=np.arange(80, 160),
        mass=[one.ravel() for one in reversed_mass],
    )
    taken, result = read([first, second])
    assert taken.sets == ["made-up", "turned"]
    assert taken.row.tolist() == list(range(160))
    for name in ("system_share_without_bos", "focus"):
        np.testing.assert_allclose(result.values[name][:80], result.values[name][80:], rtol=1e-6)


def test_exact_repeats_are_one_sample_and_unlabelled_rows_none(make):
    label = [*LABEL, *LABEL, None, None]
    group = [*range(80), *range(80), 200, 201]
    taken = splits.take_samples(runs := [make.run_of(make.made_up(0, 0, 162), label, group=group)], read_rows(runs), 0)
    assert taken.row.tolist() == list(range(80))
    assert taken.attack.tolist() == [True] * 30 + [False] * 50
    assert taken.n_distinct == (30, 50)


def test_very_many_prompts_are_drawn_from(make, monkeypatch):
    monkeypatch.setattr(splits, "_MOST_COMPARED", 20)
    run = make.run_of(make.made_up(0, 30, 50), LABEL)
    taken = splits.take_samples([run], read_rows([run]), 0)
    assert (taken.attack.sum(), (~taken.attack).sum(), taken.n_distinct) == (20, 20, (30, 50))
    other = splits.take_samples([run], read_rows([run]), 1)
    assert taken.row.tolist() != other.row.tolist()


def test_the_largest_sets_are_kept(make, monkeypatch):
    monkeypatch.setattr(splits, "_MOST_SETS", 2)
    hashes = ["a" * 16] * 40 + ["b" * 16] * 10 + ["c" * 16] * 30
    run = make.run_of(make.made_up(0, 30, 50), LABEL, system_hash=hashes)
    taken = splits.take_samples([run], read_rows([run]), 0)
    assert taken.sets == ["made-up, system prompt aaaaaaaa", "made-up, system prompt cccccccc"]
    assert taken.set.tolist() == [0] * 40 + [-1] * 10 + [1] * 30


def test_a_missing_class_is_said(make):
    run = make.run_of(make.made_up(0, 0, 80), ["benign"] * 80)
    with pytest.raises(CalibrationError, match="no row is labelled attack"):
        splits.take_samples([run], read_rows([run]), 0)


def test_answers_with_a_fail_term_are_known(make):
    text = ["The Lantern is lit", "no", None, "lanterns", *["lantern"] * 76]
    run = make.run_of(make.made_up(0, 30, 50), LABEL, text=text)
    _, result = read([run], fail_terms=FailTerms(["lantern"]))
    assert result.succeeded[:5].tolist() == [1, 0, -1, 0, 1]
    _, unasked = read([run])
    assert (unasked.succeeded == -1).all()


# Important heads


def test_the_rule_is_attention_trackers():
    """One head moves by more than 2, not 3, times the sum of the standard deviations, and one by more than 1."""
    attack = np.array([True, False] * 50)
    noise = np.where(np.arange(100) % 4 < 2, 0.01, -0.01)  # std 0.01 in both classes
    values = np.tile(0.5 + noise[:, None, None], (1, 2, 3))
    values[attack, 1, 2] -= 0.05  # 2.5 * (0.01 + 0.01)
    values[attack, 0, 0] -= 0.03  # 1.5
    values[attack, 0, 1] += 0.09  # the wrong way
    n, chosen = measurements.choose_heads(values, attack)
    assert n == 2
    assert np.argwhere(chosen).tolist() == [[1, 2]]
    values[attack, 1, 2] -= 0.05  # 5
    assert measurements.choose_heads(values, attack)[0] == 4


def test_where_no_head_passes_the_best_tenth_is_taken():
    random = np.random.default_rng(0)
    attack = np.array([True, False] * 100)
    values = random.normal(0.5, 0.05, (200, 5, 4))
    values[attack, 2, 1] -= 0.04
    values[attack, 4, 3] -= 0.03
    n, chosen = measurements.choose_heads(values, attack)
    assert n is None
    assert np.argwhere(chosen).tolist() == [[2, 1], [4, 3]]


def test_heads_are_chosen_without_the_fold_they_are_measured_on(make):
    """Noise, of which the heads that were chosen on a sample make it look as if attacks had the lower focus."""
    run = make.run_with_mass(make.masses(0, 80), LABEL)
    taken = splits.take_samples([run], read_rows([run]), 0)
    seen, unseen = [], []
    for seed in range(20):
        focus = np.random.default_rng(seed).normal(0.5, 0.05, (80, 8, 4))
        by_fold = measurements.choose_without_folds(focus, taken)
        chosen = np.stack([by_fold[fold][1] for fold in taken.fold])
        for result, one in ((unseen, chosen), (seen, measurements.choose_heads(focus, taken.attack)[1][None])):
            mean = (focus * one).sum(axis=(1, 2)) / one.sum(axis=(1, 2))
            result.append(roc_auc_score(taken.attack, measurements.standardise(mean, taken)))
    # One AUROC of 30 and 50 has a standard error of 0.067, the mean of 20 one of 0.015.
    assert np.mean(unseen) == pytest.approx(0.5, abs=0.06)
    assert np.mean(seen) < 0.35
    assert measurements.describe_heads(focus, taken, by_fold).per_fold == [3] * 5


def test_standardised_values_are_against_the_other_folds_benign_prompts(make):
    run = make.run_with_mass(make.masses(0, 80), LABEL)
    taken = splits.take_samples([run], read_rows([run]), 0)
    values = np.random.default_rng(0).normal(3, 2, 80)
    values[5] = np.nan
    result = measurements.standardise(values + 100 * taken.fold, taken)
    known = (values + 100 * taken.fold)[(taken.fold != taken.fold[9]) & ~taken.attack]
    assert result[9] == pytest.approx((values[9] + 100 * taken.fold[9] - known.mean()) / known.std())
    assert np.isnan(result[5])
    both = measurements.standardise(np.stack([values, values * 7 + 1], axis=1), taken)
    np.testing.assert_allclose(both[:, 0], both[:, 1], rtol=1e-9)


def test_planted_heads_are_recovered(make):
    mass = make.masses(0, 80, layers=8, heads=4)
    mass[..., 1] = 0.2 + 0.01 * np.random.default_rng(1).standard_normal(mass.shape[:-1])
    mass[..., 0] = 0.2 + 0.01 * np.random.default_rng(2).standard_normal(mass.shape[:-1])
    for layer, head in ((2, 1), (5, 3)):
        mass[:30, :, layer, head, 0] -= 0.15
    _, result = read([make.run_with_mass(mass, LABEL)])
    assert result.important.heads == [(2, 1), (5, 3)]
    assert result.important.per_fold == [2] * 5
    assert result.important.in_all_folds == 2
    assert result.values["focus_important"][:30].max() < result.values["focus_important"][30:].min()


def test_too_few_prompts_choose_no_heads(make):
    label = ["attack"] * 8 + ["benign"] * 50
    _, result = read([make.run_with_mass(make.masses(0, 58), label)])
    assert "at least 10 attacks" in result.absent["focus_important"]
    assert result.important is None
