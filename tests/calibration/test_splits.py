"""What is a sample, and which part it has."""

import numpy as np
import pytest

from headrift.calibration import splits as module
from headrift.calibration.splits import divide
from headrift.calibration.thresholds import CalibrateConfig, CalibrationError, Rule
from headrift.runs.reading import BENIGN, read_rows


def rows_of(make, label, **columns):
    values = np.full((len(label), 3, 4), 0.1, np.float32)
    return read_rows([make.run_of(values, label, **columns)])


def test_exact_repeats_are_one_sample(make):
    group = [*range(50), *range(50), *range(100, 200), *([100] * 30)]
    rows = rows_of(make, make.labels(100, 130), group=group)
    division = divide(rows, CalibrateConfig(), 100)
    samples = division.samples
    assert (division.n_attack, division.n_benign) == (50, 100)
    assert sorted(samples.row) == [*range(50), *range(100, 200)]
    repeats = dict(zip(samples.row.tolist(), samples.repeats.tolist()))
    assert [repeats[0], repeats[49], repeats[100], repeats[101]] == [2, 2, 31, 1]


def test_a_prompt_under_another_system_prompt_is_another_sample_of_the_same_group(make):
    group = [*range(50), *np.repeat(range(100, 175), 2)]
    system = [*["a" * 16] * 50, *["a" * 16, "b" * 16] * 75]
    rows = rows_of(make, make.labels(50, 150), group=group, system_hash=system)
    division = divide(rows, CalibrateConfig(), 100)
    samples = division.samples
    assert (division.n_attack, division.n_benign) == (50, 150)
    assert (samples.repeats == 1).all()
    for number in range(100, 175):
        own = np.array([group[row] == number for row in samples.row])
        assert len(set(samples.fold[own])) == len(set(samples.chooses[own])) == len(set(samples.group[own])) == 1
    same = rows_of(make, make.labels(50, 150), group=group)
    assert divide(same, CalibrateConfig(), 100).n_benign == 75


def test_no_group_is_on_two_sides(make):
    """Prompts that are attack in one row and benign in another are in one fold."""
    group = [*range(60), *range(30, 230)]
    rows = rows_of(make, make.labels(60, 200), group=group)
    samples = divide(rows, CalibrateConfig(), 100).samples
    assert len(samples.row) == 260
    folds_of = {}
    for row, fold in zip(samples.row, samples.fold):
        folds_of.setdefault(group[row], set()).add(int(fold))
    assert all(len(folds) == 1 for folds in folds_of.values())
    for fold in range(5):
        assert (samples.attack & (samples.fold == fold)).sum() == pytest.approx(12, abs=3)


def test_categories_are_held_out_whole(make):
    category = [f"c{at % 9}" for at in range(60)] + [f"c{at % 13}" for at in range(200)]
    rows = rows_of(make, make.labels(60, 200), category=category)
    samples = divide(rows, CalibrateConfig(by_category=True), 100).samples
    folds_of = {}
    for row, fold in zip(samples.row, samples.fold):
        folds_of.setdefault(category[row], set()).add(int(fold))
    assert all(len(folds) == 1 for folds in folds_of.values())
    assert samples.n_folds > 1


def test_parts_do_not_overlap_and_b_is_large_enough_in_every_fold(make):
    rows = rows_of(make, make.labels(40, 131))
    division = divide(rows, CalibrateConfig(), 100)
    samples = division.samples
    assert not (samples.chooses & samples.sets).any()
    assert (samples.sets == ~samples.attack & ~samples.chooses).all()
    assert set(division.part_b) == set(samples.row[samples.sets])
    assert samples.chooses[samples.attack].all()
    assert division.cross_validated
    for fold in range(5):
        assert (samples.sets & (samples.fold != fold)).sum() >= 59


def test_b_takes_only_what_it_must_where_there_is_little(make):
    division = divide(rows_of(make, make.labels(20, 75)), CalibrateConfig(), 100)
    assert not division.cross_validated
    assert len(division.part_b) == 59
    assert (division.samples.chooses & ~division.samples.attack).sum() == 16


def test_nothing_chooses_where_there_is_nothing_to_choose(make):
    division = divide(rows_of(make, make.labels(3, 59)), CalibrateConfig(), 1)
    assert not division.samples.chooses.any()
    assert len(division.part_b) == 59


def test_of_very_many_a_draw_measures_and_the_rest_sets(make, monkeypatch):
    monkeypatch.setattr(module, "_MOST_MEASURED", 100)
    monkeypatch.setattr(module, "_MOST_CHOOSE", 40)
    rows = rows_of(make, make.labels(300, 600))
    division = divide(rows, CalibrateConfig(), 1_000_000)
    samples = division.samples
    assert [samples.attack.sum(), (~samples.attack).sum()] == [100, 100]
    assert [(samples.chooses & samples.attack).sum(), (samples.chooses & ~samples.attack).sum()] == [40, 40]
    assert len(division.part_b) == 600 - 40
    benign = set(np.flatnonzero(rows.label == BENIGN)) - set(samples.row[samples.chooses])
    assert set(division.part_b) == benign


def test_another_seed_divides_otherwise_and_the_same_one_alike(make):
    rows = rows_of(make, make.labels(40, 131))
    first, again, other = (divide(rows, CalibrateConfig(seed=seed), 100).part_b for seed in (0, 0, 1))
    assert (first == again).all()
    assert set(first) != set(other)


def test_with_benign_only_rows_without_a_label_are_benign_and_attacks_are_left_out(make):
    rows = rows_of(make, ["attack"] * 20 + ["benign"] * 30 + [None] * 50)
    division = divide(rows, CalibrateConfig(benign_only=True), 1)
    assert (division.n_attack, division.n_benign) == (0, 80)
    assert set(division.part_b) == set(range(20, 100))


@pytest.mark.parametrize(
    ("n_attack", "n_benign", "settings", "message"),
    [
        (20, 68, {}, "at least 59 distinct benign prompts .* and 10 more .* there are 68"),
        (20, 300, {"target_fpr": 0.01}, "at least 299 distinct .* there are 300"),
        (20, 28, {"rule": Rule.CONFORMAL}, "0.05 on average needs at least 19 .* there are 28"),
        (9, 300, {}, "at least 10 distinct attacks, and there are 9"),
        (0, 300, {}, "no row is labelled attack"),
        (0, 59, {"benign_only": True}, "at least 60 distinct prompts .*; there are 59"),
    ],
)
def test_too_few_are_refused_with_the_number_needed(make, n_attack, n_benign, settings, message):
    rows = rows_of(make, make.labels(n_attack, n_benign))
    options = CalibrateConfig(**settings)
    with pytest.raises(CalibrationError, match=message):
        divide(rows, options, 1 if options.benign_only else 100)
