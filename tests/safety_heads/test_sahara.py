"""`headrift heads sahara`: what is refused before any model is loaded; and its results in `overlap`."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from typer.testing import CliRunner

from headrift.cli import app
from headrift.safety_heads.overlap import leading_heads, overlap
from headrift.safety_heads.sahara import Step, hidden_states_for
from headrift.safety_heads.ships import rank


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--r-main", "3"], "2 distinct prompts; give 1 to 2"),
        (["--r-main", "2", "--limit", "1"], "1 distinct prompt;"),
        (["--r-main", "0"], "--r-main 0"),
        (["--steps", "0"], "--steps 0"),
        (["--steps", "271"], "there are 270 heads"),
        (["--steps", "2", "--heads", "3:0"], "there are 1 heads"),
        (["--steps", "65", "--quick"], "there are 64 heads"),
        (["--heads", "30:0"], "it has layers 0 to 29"),
        (["--heads", "3"], "'3' is not LAYER:HEAD"),
        (["--epsilon", "nan"], "epsilon"),
        (["--epsilon", "small"], "Invalid value for '--epsilon'"),
        (["--kind", "zero"], "undifferentiated"),
        (["--model", "nowhere"], "--model nowhere"),
    ],
)
def test_refused(demo_model, tmp_path, options, message):
    queries, out = tmp_path / "queries.txt", tmp_path / "out"
    # The third adds no direction.
    queries.write_text("How are you?\nWhere is it?\nHow are you?\n", encoding="utf-8")
    command = ["heads", "sahara", str(queries), "--model", str(demo_model), "--out", str(out), *options]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert not out.exists()


def test_the_head_with_the_greatest_sum_is_chosen():
    step = Step.from_angles({(0, 0): np.array([1.0, 5.0]), (0, 1): np.array([3.0, 4.0]), (1, 0): np.array([0.0, 5.5])})
    assert step.chosen == (0, 1)
    assert step.ranking == [(0, 1), (0, 0), (1, 0)]
    assert Step.from_angles({(2, 1): np.array([1.0]), (0, 3): np.array([1.0])}).chosen == (2, 1)


def test_a_bank_holds_the_clean_rows_and_a_blocks():
    assert hidden_states_for(20) == 20 * (1 + 25)
    assert hidden_states_for(600) == 2 * 600


def test_overlap_takes_the_ranking_of_the_first_step(tmp_path):
    means = np.random.default_rng(0).random((4, 5))
    ships, sahara, begun = (tmp_path / name for name in ("ships", "sahara", "begun"))
    for folder in (ships, sahara, begun):
        folder.mkdir()
    heads = [asdict(head) for head in rank(means[None])]
    (ships / "ships.json").write_text(json.dumps({"settings": {}, "heads": heads}), encoding="utf-8")
    of_angles = [{"layer": h["layer"], "head": h["head"], "angle": 90 * h["mean"]} for h in heads]
    settings = {"kind": "scaling", "epsilon": 0.1, "model": "abc"}
    results = {"settings": settings, "heads": [of_angles[0], of_angles[7]], "steps": [of_angles, of_angles[1:]]}
    (sahara / "sahara.json").write_text(json.dumps(results), encoding="utf-8")
    (begun / "sahara.json").write_text(json.dumps({"settings": settings}), encoding="utf-8")
    both = overlap(ships, sahara, 3)
    assert (both.jaccard, both.rank_correlation) == (1.0, pytest.approx(1.0))
    # What `evaluate` takes from it is the group.
    leading = leading_heads(sahara)
    assert leading.heads == tuple((h["layer"], h["head"]) for h in (of_angles[0], of_angles[7]))
    for run, more, message in (
        (begun, [], "not finished"),
        (sahara, ["--label", "attack"], "no queries with the label"),
    ):
        done = CliRunner().invoke(app, ["heads", "overlap", str(run), str(ships), "--top", "3", *more])
        assert done.exit_code == 2
        assert message in done.output
