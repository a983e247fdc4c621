"""The report's numbers against planted effects and scikit-learn's AUROC."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from headrift import signal
from headrift.corpus import summary as summaries
from headrift.report.extremes import extremes
from headrift.report.gather import cell_of, gather, open_runs
from headrift.report.measure import by_layer, by_run, by_step, grid, relation
from headrift.signal import ScoreRange


def read(*folders, cell=None):
    runs = open_runs(folders)
    return gather(runs, cell or cell_of(runs), lambda text: None)


@pytest.fixture(scope="module")
def found(write, tmp_path_factory):
    """Attacks have 0.1 more in steps 3 to 5 of layers 4 to 6: over twice the noise of a cell."""
    return read(write(tmp_path_factory.mktemp("runs") / "run", effect=0.1))


def test_where_and_when_an_effect_was_planted(found):
    steps, layers = by_step(found, 20), by_layer(found, 20)
    assert (steps.auroc[2:5] > 0.9).all()  # steps 3 to 5; the first is step 1
    assert (np.abs(np.delete(steps.auroc, [2, 3, 4]) - 0.5) < 0.3).all()
    assert set(np.argsort(-layers.auroc)[:3]) == {4, 5, 6}
    assert (steps.low[2:5] > 0.5).all()
    start, end, highest = grid(found).best
    assert 3 <= start <= end <= 5
    # The fifth of each class whose answers end at step 1 ranks lowest, in ties: 0.8 * 1 + 0.2 * 0.2 / 2.
    assert highest == pytest.approx(0.82, abs=0.01)
    difference = found.samples.means["attack"] - found.samples.means["benign"]
    planted = np.zeros_like(difference)
    planted[3:6, 4:7] = 0.1
    # A cell's mean over 40 and 70 prompts has a standard error of 0.03 * sqrt(1/40 + 1/70) = 0.006, over 24 and 42
    # where answers ended 0.008: 5 of these.
    np.testing.assert_allclose(difference, planted, atol=0.04)


def test_the_grid_and_the_steps_are_aurocs_of_what_they_say(found):
    attack = found.samples.mine("attack")
    windows = grid(found)
    scores = np.nan_to_num(found.score[found.samples.row], nan=-1.0)  # no score: lowest
    own = windows.auroc[found.cell.window.start - 1, found.cell.window.end - 1]
    assert own == pytest.approx(roc_auc_score(attack, scores))
    assert np.isnan(windows.auroc[3, 2])
    at_three = found.samples.by_step[:, 3]
    there = ~np.isnan(at_three)
    assert not there.all()
    assert by_step(found, 0).auroc[2] == pytest.approx(roc_auc_score(attack[there], at_three[there]))
    assert by_step(found, 0).reach["attack"][2] == pytest.approx(there[attack].mean())


def test_another_window_than_the_runs(write, tmp_path):
    run = write(tmp_path / "run")
    cell = ScoreRange(signal.Window(3, 4), 0.0, 0.0)
    of = read(run, cell=cell)
    own = read(run)
    assert np.nanmax(np.abs(of.score - own.score)) > 1e-3
    (batch,) = open_runs([run])[0].batches(["instability", "n_steps"])
    for row, score in zip(batch.to_pylist(), of.score):
        values = np.array(row["instability"], np.float32).reshape(-1, 10)
        expected = cell.score(values, row["n_steps"]).value
        assert np.isnan(score) if expected is None else score == pytest.approx(expected)
    assert of.summary.scored == np.isfinite(of.score).sum()
    assert set(of.summary.no_score) == {signal.ANSWER_ENDED}


def test_runs_by_themselves_and_their_names(write, tmp_path):
    of = read(write(tmp_path / "a" / "run"), write(tmp_path / "b" / "run", n_attack=0, n_benign=50, seed=1))
    assert of.names == ["a/run", "b/run"]
    first, second = by_run(of)
    assert first.n == {"attack": 40, "benign": 70}
    assert second.score is None
    assert first.score.auroc == read(tmp_path / "a" / "run").summary.comparisons()[0].measures[summaries.SCORE].auroc


def test_a_relation(found):
    scores = found.score
    assert relation(found, -scores).spearman == {"attack": pytest.approx(-1), "benign": pytest.approx(-1)}
    assert relation(found, np.ones(len(scores))).spearman == {"attack": None, "benign": None}


def test_which_rows_stand_out(found):
    of = extremes(found, texts=True)
    benign, attack = found.samples.mine("benign"), found.samples.mine("attack")
    scores = found.score[found.samples.row]
    assert [at.score for at in of.suspicious] == sorted(scores[benign & ~np.isnan(scores)])[::-1][:5]
    assert [at.score for at in of.quiet] == sorted(scores[attack & ~np.isnan(scores)])[:5]
    assert of.suspicious[0].percentile == 100
    assert of.without_score == np.isnan(scores[attack]).sum() > 0
    row = found.samples.row[benign][np.nanargmax(scores[benign])]
    assert of.suspicious[0].id == f"run-{row:03d}"
    assert of.suspicious[0].prompt.startswith(f"prompt {row} ")
    assert extremes(found, texts=False).quiet[0].prompt is None


def test_of_many_rows_a_draw_is_read(write, tmp_path, monkeypatch):
    monkeypatch.setattr(summaries, "_MOST_OF_CLASS", 30)
    of = read(write(tmp_path / "run"))
    assert {label: int(of.samples.mine(label).sum()) for label in of.classes} == {"attack": 30, "benign": 30}
    assert of.summary.by_class()["benign"]["n"] == 70
    assert of.summary.sampled
    assert len(of.samples.by_layer) == 60
