"""calibration.json: written, read, applied, refused; and what it says of a table of scored rows."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import binomtest

import headrift
from headrift.calibration.artifact import (
    Calibration,
    ReferenceScores,
    add_verdicts,
    cutoff,
    discoveries,
    drift,
    notices_from,
)
from headrift.calibration.calibrate import calibrate
from headrift.calibration.thresholds import CalibrateConfig, CalibrationError
from headrift.signal import Window


@pytest.fixture(scope="module")
def calibration(make) -> Calibration:
    run = make.run_of(make.made_up(0, 60, 200, effect=0.02), make.labels(60, 200))
    return calibrate([run], CalibrateConfig(resamples=10))


def test_saved_and_loaded_it_is_the_same(calibration, tmp_path):
    path = tmp_path / "c.json"
    calibration.save(path)
    assert headrift.Calibration.load(path) == calibration
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize("content", ["", "[]", '{"format": 2}', "\xff"])
def test_what_is_no_calibration_is_refused(content, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(CalibrationError, match=r"c\.json is not a calibration \(.*headrift calibrate"):
        Calibration.load(path)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(CalibrationError, match="cannot be read: No such file"):
        Calibration.load(tmp_path / "none.json")


def test_a_failed_write_leaves_nothing(calibration, tmp_path):
    with pytest.raises(OSError, match="No such file"):
        calibration.save(tmp_path / "nowhere" / "c.json")
    (tmp_path / "c.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        calibration.save(tmp_path / "c.json")
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_what_is_at_or_above_the_threshold_is_flagged_and_has_a_small_p_value(calibration):
    cut = calibration.threshold
    verdicts = calibration.apply([np.nextafter(cut, 0), cut, 1.0, 0.0, None])
    assert verdicts.flagged.tolist() == [False, True, True, False, False]
    n = calibration.setting.n
    assert verdicts.p_value[2] == 1 / (n + 1)
    assert verdicts.p_value[3] == 1.0
    assert np.isnan(verdicts.p_value[4])
    assert verdicts.p_value[1] == (1 + calibration.setting.flagged) / (n + 1)


def test_another_model_template_or_window_is_refused(calibration):
    window = Window.parse(calibration.window)
    drops = calibration.drop_shallow, calibration.drop_deep
    calibration.check(calibration.model, window, *drops)
    other = calibration.model.model_copy(update={"chat_template_sha256": "x", "fingerprint": "y"})
    with pytest.raises(CalibrationError, match="the model, the chat template differ"):
        calibration.check(other, window, *drops)
    renamed = calibration.model.model_copy(update={"name": "a copy"})
    calibration.check(renamed, window, *drops)
    with pytest.raises(CalibrationError, match=r"--window \(calibration: .*, given: 3:3\)"):
        calibration.check(calibration.model, Window(3, 3), *drops)


def test_a_table_gets_two_columns(calibration):
    scores = [calibration.threshold + 0.1, 0.0, None]
    given = pa.table({"id": ["a", "b", "c"], "score": pa.array(scores, pa.float64())}, metadata={"about": "it"})
    for kind in (given, given.to_batches()[0]):
        table = add_verdicts(kind, calibration)
        assert table.schema.names == ["id", "score", "flagged", "p_value"]
        assert table.schema.metadata == {b"about": b"it"}
        assert table["flagged"].to_pylist() == [True, False, False]
        assert table["p_value"].to_pylist() == [1 / (calibration.setting.n + 1), 1.0, None]


def test_the_list_has_on_average_few_benign_rows():
    """200 benign rows and 50 attacks against 2,000 benign scores: the fraction of benign ones on the list."""
    random, fractions, result = np.random.default_rng(0), [], []
    attack = np.arange(250) < 50
    for _ in range(300):
        scores = random.standard_normal(250) + 3 * attack
        listed = discoveries(ReferenceScores.from_scores(random.standard_normal(2000)).p_values(scores), 0.1)
        fractions.append((listed & ~attack).sum() / max(listed.sum(), 1))
        result.append((listed & attack).sum() / 50)
    # Benjamini and Hochberg: rate times the fraction of benign rows.
    assert np.mean(fractions) == pytest.approx(0.1 * 200 / 250, abs=4 * np.std(fractions) / np.sqrt(300))
    assert np.mean(result) > 0.5


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_the_list_is_scipys_from_the_p_values_or_from_their_counts(rate):
    from scipy.stats import false_discovery_control

    random, listed = np.random.default_rng(0), 0
    for n in (1, 7, 300):
        for power in (1, 3, 6):
            p_values = np.ceil(random.random(n) ** power * 50) / 50  # many ties
            expected = false_discovery_control(p_values) <= rate
            assert discoveries(p_values, rate).tolist() == expected.tolist()
            values, counts = np.unique(p_values, return_counts=True)
            shuffled = random.permutation(len(values))
            last = cutoff(values[shuffled], counts[shuffled], n, rate)
            assert (last is None) == (not expected.any())
            if last is not None:
                assert last == p_values[expected].max()
            listed += expected.sum()
    assert listed
    assert cutoff(np.array([]), np.array([], np.int64), 5) is None


def test_rows_without_a_p_value_are_not_listed_and_count():
    few = discoveries([0.01, 0.9], 0.03)
    assert few.tolist() == [True, False]
    assert discoveries([0.01, 0.9, np.nan, np.nan], 0.03).tolist() == [False] * 4
    assert discoveries([]).tolist() == []


def test_drift_is_told_where_scores_have_moved_and_not_otherwise(calibration, make):
    fresh = [drift(scores_of(make, calibration, seed), calibration) for seed in range(40)]
    assert sum(one.warning is not None for one in fresh) <= 2  # 0.4 are expected
    moved = drift(scores_of(make, calibration, 0) + 0.02, calibration)
    assert moved.distance > 0.3
    assert "calibrate again" in moved.warning
    missing = drift(np.full(200, np.nan), calibration)
    assert missing.distance == pytest.approx(1.0)
    assert drift([], calibration) is None


def test_a_change_of_the_largest_values_alone_is_noticed(calibration):
    """9% of the benign prompts moved far up: the distributions differ by 0.09, and three times as many are flagged."""
    random, known = (
        np.random.default_rng(0),
        np.repeat(calibration.scores.values, -np.diff([*calibration.scores.at_or_above, 0])),
    )
    target = calibration.setting.target_fpr

    def noticed(moved, n=600, seeds=40):
        warnings = 0
        for _ in range(seeds):
            scores = random.choice(known, n)
            scores[: int(moved * n)] += 10
            warnings += drift(scores, calibration).warning is not None
        return warnings / seeds

    assert noticed(0.0) <= 0.05
    assert noticed(0.09) > 0.9
    one = drift(np.where(np.arange(600) < 60, known.max() + 1, known.min()), calibration)
    assert (one.flagged, one.n) == (60, 600)
    assert one.p_flagged == pytest.approx(binomtest(60, 600, target, alternative="greater").pvalue)
    assert "10.0% of 600 are flagged" in one.warning
    unlabelled = drift(
        np.where(np.arange(600) < 60, known.max() + 1, np.sort(random.choice(known, 600))), calibration, "unlabelled"
    )
    assert "attacks are among them" in unlabelled.warning


@pytest.mark.parametrize("target", [0.01, 0.05, 0.2])
def test_twice_the_target_is_noticed_from_the_size_that_is_said(target):
    n = notices_from(target)
    random = np.random.default_rng(1)
    counts = random.binomial(n, 2 * target, 2_000)
    noticed = np.mean([binomtest(int(k), n, target, alternative="greater").pvalue < 0.01 for k in counts])
    assert 0.77 < noticed < 0.88
    fewer = random.binomial(n // 2, 2 * target, 2_000)
    assert np.mean([binomtest(int(k), n // 2, target, alternative="greater").pvalue < 0.01 for k in fewer]) < 0.7


def scores_of(make, calibration, seed):
    """Scores of fresh benign prompts, in the calibration's window."""
    start, end = (int(step) for step in calibration.window.split(":"))
    values = make.made_up(1000 + seed, 0, 200)
    return values[:, start : end + 1, calibration.layers[0] : calibration.layers[1]].mean(axis=(1, 2))


@pytest.mark.parametrize("missing", [0, 30, 190])
def test_drift_is_the_two_sample_statistic(calibration, make, missing):
    from scipy.stats import ks_2samp

    scores = scores_of(make, calibration, 3)
    scores[:missing] = np.nan
    known = np.repeat(calibration.scores.values, -np.diff([*calibration.scores.at_or_above, 0]))
    assert len(known) == calibration.setting.n
    expected = ks_2samp(np.nan_to_num(scores, nan=-1), known).statistic
    assert drift(scores, calibration).distance == pytest.approx(expected)


def test_the_class_is_there_without_torch():
    code = "import sys, headrift; headrift.Calibration; print({'torch', 'vllm', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"
