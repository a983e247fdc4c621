"""`headrift heads overlap`: shared heads against counting by hand, and against chance."""

import json
from dataclasses import asdict
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import spearmanr
from typer.testing import CliRunner

from headrift.cli import app
from headrift.safety_heads.overlap import overlap
from headrift.safety_heads.ships import rank


def write(folder, means: np.ndarray, **more):
    """A run's ships.json with these mean scores [layers, heads]."""
    folder.mkdir()
    heads = [asdict(head) for head in rank(means[None].astype(float))]
    (folder / "ships.json").write_text(json.dumps({"settings": {}, "heads": heads, **more}), encoding="utf-8")
    return folder


def test_what_two_rankings_share(tmp_path):
    one = np.array([[9.0, 8, 7], [6, 5, 4]])
    other = np.array([[1.0, 8, 0], [9, 7, 2]])
    result = overlap(write(tmp_path / "a", one), write(tmp_path / "b", other), 3)
    # The first three: (0,0) (0,1) (0,2), and (1,0) (0,1) (1,1).
    assert result.shared == [(0, 1)]
    assert result.jaccard == pytest.approx(1 / 5)
    assert result.by_chance == pytest.approx(9 / 6)
    choices = list(combinations(range(6), 3))
    assert result.p_value == pytest.approx(np.mean([bool({0, 1, 2} & set(chosen)) for chosen in choices]))
    assert result.rank_correlation == pytest.approx(spearmanr(one.ravel(), other.ravel()).statistic)


def test_the_command(tmp_path):
    means = np.random.default_rng(0).random((6, 5))
    labelled = {"heads_by_label": {"attack": [asdict(head) for head in rank(means[None, ::-1])]}}
    a, b = write(tmp_path / "a", means), write(tmp_path / "b", means * 2, **labelled)
    out = tmp_path / "result.json"
    done = CliRunner().invoke(app, ["heads", "overlap", str(a), str(b), "--top", "4", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "first 4 of 30 heads, shared" in done.stdout
    assert "1.000" in done.stdout
    assert json.loads(out.read_text())["jaccard"] == 1.0
    assert overlap(b, b, 4, "attack").shared == [(5 - layer, head) for layer, head in overlap(b, b, 4).shared]


def test_runs_that_cannot_be_compared(tmp_path):
    a = write(tmp_path / "a", np.eye(3))
    wide = write(tmp_path / "wide", np.eye(4))
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "ships.json").write_text('{"settings": {}}', encoding="utf-8")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "ships.json").write_text("{", encoding="utf-8")
    for other, more, message in (
        (wide, [], "different heads (9 and 16)"),
        (begun, [], "not finished"),
        (broken, [], "cannot be read"),
        (tmp_path, [], "has no results"),
        (a, ["--top", "9"], "give 1 to 8"),
        (a, ["--label", "attack"], "no queries with the label attack"),
    ):
        done = CliRunner().invoke(app, ["heads", "overlap", str(a), str(other), "--top", "3", *more])
        assert done.exit_code == 2, done.output
        assert message in done.output
