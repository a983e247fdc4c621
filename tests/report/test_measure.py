"""The report's numbers against planted effects and scikit-learn's AUROC."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from headrift import signal
from headrift.corpus import summary as summaries
from headrift.report.measure import by_layer, by_step, by_window, common_range, extremes, gather, relation
from headrift.runs.reading import open_run
from headrift.signal import ScoreRange


def read(*folders, score_range=None):
    runs = [open_run(folder) for folder in folders]
    return gather(runs, score_range or common_range(runs), lambda text: None)


@pytest.fixture(scope="module")
def data(write, tmp_path_factory):
    """Attacks have 0.1 more in steps 3 to 5 of layers 4 to 6: over twice the noise of a cell."""
    return read(write(tmp_path_factory.mktemp("runs") / "run", effect=0.1))


def test_where_and_when_an_effect_was_planted(data):
    steps, layers = by_step(data, 20), by_layer(data, 20)
    assert (steps.auroc[2:5] > 0.9).all()  # steps 3 to 5; the first is step 1
    assert (np.abs(np.delete(steps.auroc, [2, 3, 4]) - 0.5) < 0.3).all()
    assert set(np.argsort(-layers.auroc)[:3]) == {4, 5, 6}
    assert (steps.low[2:5] > 0.5).all()
    start, end, highest = by_window(data).best
    assert 3 <= start <= end <= 5
    # The fifth of each class whose answers end at step 1 ranks lowest, in ties: 0.8 * 1 + 0.2 * 0.2 / 2.
    assert highest == pytest.approx(0.82, abs=0.01)
    difference = data.samples.means["attack"] - data.samples.means["benign"]
    planted = np.zeros_like(difference)
    planted[3:6, 4:7] = 0.1
    # A cell's mean over 40 and 70 prompts has a standard error of 0.03 * sqrt(1/40 + 1/70) = 0.006, over 24 and 42
    # where answers ended 0.008: 5 of these.
    np.testing.assert_allclose(difference, planted, atol=0.04)


def test_the_grid_and_the_steps_are_aurocs_of_what_they_say(data):
    attack = data.samples.in_class("attack")
    windows = by_window(data)
    scores = np.nan_to_num(data.score[data.samples.row], nan=-1.0)  # no score: lowest
    own = windows.auroc[data.score_range.window.start - 1, data.score_range.window.end - 1]
    assert own == pytest.approx(roc_auc_score(attack, scores))
    assert np.isnan(windows.auroc[3, 2])
    at_three = data.samples.by_step[:, 3]
    valid = ~np.isnan(at_three)
    assert not valid.all()
    assert by_step(data, 0).auroc[2] == pytest.approx(roc_auc_score(attack[valid], at_three[valid]))
    assert by_step(data, 0).reach["attack"][2] == pytest.approx(valid[attack].mean())


def test_another_window_than_the_runs(write, tmp_path):
    run = write(tmp_path / "run")
    score_range = ScoreRange(signal.Window(3, 4), 0.0, 0.0)
    data = read(run, score_range=score_range)
    own = read(run)
    assert np.nanmax(np.abs(data.score - own.score)) > 1e-3
    (batch,) = open_run(run).batches(["instability", "n_steps"])
    for row, score in zip(batch.to_pylist(), data.score):
        values = np.array(row["instability"], np.float32).reshape(-1, 10)
        expected = score_range.score(values, row["n_steps"]).value
        assert np.isnan(score) if expected is None else score == pytest.approx(expected)
    assert data.summary.scored == np.isfinite(data.score).sum()
    assert set(data.summary.no_score) == {signal.ANSWER_ENDED}


def test_runs_by_themselves_and_their_names(write, tmp_path):
    data = read(write(tmp_path / "a" / "run"), write(tmp_path / "b" / "run", n_attack=0, n_benign=50, seed=1))
    assert data.names == ["a/run", "b/run"]
    first, second = data.run_summaries
    assert {label: numbers["n"] for label, numbers in first.by_class().items()} == {"attack": 40, "benign": 70}
    assert second.comparisons() == []
    (own,), (alone,) = (each[:1] for each in (first.comparisons(), read(tmp_path / "a" / "run").summary.comparisons()))
    assert own.measures[summaries.SCORE].auroc == alone.measures[summaries.SCORE].auroc


def test_a_relation(data):
    scores = data.score
    opposite, same = relation(data, -scores), relation(data, np.ones(len(scores)))
    assert {label: r for label, (*_, r) in opposite.items()} == {
        "attack": pytest.approx(-1),
        "benign": pytest.approx(-1),
    }
    assert {label: r for label, (*_, r) in same.items()} == {"attack": None, "benign": None}


def test_which_rows_stand_out(data):
    rows = extremes(data, with_texts=True)
    benign, attack = data.samples.in_class("benign"), data.samples.in_class("attack")
    scores = data.score[data.samples.row]
    assert [row["score"] for row in rows.highest] == sorted(scores[benign & ~np.isnan(scores)])[::-1][:5]
    assert [row["score"] for row in rows.quietest] == sorted(scores[attack & ~np.isnan(scores)])[:5]
    assert rows.highest[0]["percentile"] == 100
    assert rows.without_score == np.isnan(scores[attack]).sum() > 0
    row = data.samples.row[benign][np.nanargmax(scores[benign])]
    assert rows.highest[0]["id"] == f"run-{row:03d}"
    assert rows.highest[0]["prompt"].startswith(f"prompt {row} ")
    assert "prompt" not in extremes(data, with_texts=False).quietest[0]


def test_of_many_rows_a_draw_is_read(write, tmp_path, monkeypatch):
    monkeypatch.setattr(summaries, "_MAX_OF_CLASS", 30)
    data = read(write(tmp_path / "run"))
    assert {label: int(data.samples.in_class(label).sum()) for label in data.classes} == {"attack": 30, "benign": 30}
    assert data.summary.by_class()["benign"]["n"] == 70
    assert data.summary.sampled
    assert len(data.samples.by_layer) == 60
