"""`headrift heads instability`: scores without heads and of them alone, worked out head by head; and planted truth."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from scipy.stats import spearmanr
from typer.testing import CliRunner

from headrift import signal
from headrift.cli import app
from headrift.runs.folder import JobError
from headrift.safety_heads.instability import instability
from headrift.safety_heads.ships import rank
from headrift.stats import separation

STEPS, LAYERS, HEADS = 6, 8, 4
SCORED = range(*signal.layer_range(LAYERS))
# The leading heads, in order; the first lies in a layer that is not scored.
LEADING = [(0, 1), (3, 2), (3, 0), (5, 3)]
INSIDE = LEADING[1:]


def heads_run(folder, leading=LEADING, fingerprint="f"):
    means = np.random.default_rng(0).random((LAYERS, HEADS))
    for place, head in enumerate(leading):
        means[head] = 9 - place
    folder.mkdir()
    settings = {"kind": "undifferentiated", "epsilon": 1e-5, "model": fingerprint}
    heads = [asdict(head) for head in rank(means[None])]
    (folder / "ships.json").write_text(json.dumps({"settings": settings, "heads": heads}), encoding="utf-8")
    return folder


def shares_of(seed, n, leading_alone=False):
    """Shares [n, steps + 1, layers, heads], of attacks in the first third: only the leading heads move, or all do."""
    random = np.random.default_rng(seed)
    size = random.uniform(0.05, 0.3, n)
    size[: n // 3] += 0.1
    moves = random.standard_normal((n, STEPS + 1, LAYERS, HEADS))
    if leading_alone:
        mask = np.zeros((LAYERS, HEADS))
        mask[tuple(np.transpose(INSIDE))] = 1
        moves = moves * mask
    return (0.5 + 0.3 * size[:, None, None, None] * np.tanh(moves)).astype(np.float16)


def scored_run(made, folder, shares, labels=None, **more):
    n = len(shares)
    labels = made.labels(n // 3, n - n // 3) if labels is None else labels
    values = signal.instability(shares).astype(np.float32)
    saved = [row.ravel() for row in shares]
    return made.write_run(folder, values, labels, save=("shares",), shares=saved, **more)


def by_hand(shares, chosen):
    """Of each row the score of all heads, without the chosen ones, of these alone, and their part of the variance."""
    rows = []
    for row in shares.astype(np.float64):
        full, without, alone, own_part, every = [], [], [], 0.0, 0.0
        for step in range(1, STEPS + 1):
            for layer in SCORED:
                heads, own = row[step, layer], [head for at, head in chosen if at == layer]
                full.append(np.std(heads))
                without.append(np.std(np.delete(heads, own)))
                away = heads - heads.mean()
                if own:
                    alone.append(np.sqrt(np.mean(away[own] ** 2)))
                own_part, every = own_part + np.sum(away[own] ** 2), every + np.sum(away**2)
        rows.append([np.mean(full), np.mean(without), np.mean(alone), own_part / every])
    return np.transpose(rows)


def test_each_score_is_that_of_its_heads(made, tmp_path):
    shares = shares_of(1, 60)
    result = instability(heads_run(tmp_path / "h"), scored_run(made, tmp_path / "s", shares), top=4, draws=50)
    assert (result.prompts, result.layers, result.heads) == (60, (SCORED.start, SCORED.stop), INSIDE)
    full, *others, variance = by_hand(shares, INSIDE)
    attack = np.arange(60) < 20
    lines = {line.heads: line for line in result.lines}
    for name, values in zip(("all heads", "without the first 3", "the first 3 alone"), (full, *others), strict=True):
        assert lines[name].rank_correlation.value == pytest.approx(spearmanr(full, values).statistic)
        expected = separation(values, attack, np.arange(60))
        assert lines[name].auroc.value == pytest.approx(expected.auroc)
        assert lines[name].auroc.bounds == pytest.approx(expected.auroc_interval)
    assert result.variance == pytest.approx(variance.mean())
    # Heads that are like all others have 3 of the 4 x 4 scored heads' part of it, and no draw is far from that.
    expected = 3 / (len(SCORED) * HEADS)
    assert result.variance == pytest.approx(expected, rel=0.15)
    assert result.variance_of_draws.value == pytest.approx(expected, rel=0.05)
    assert result.p_value > 0.05


def test_heads_that_alone_move_are_all_of_the_score(made, tmp_path):
    shares = shares_of(2, 60, leading_alone=True)
    result = instability(heads_run(tmp_path / "h"), scored_run(made, tmp_path / "s", shares), top=4, draws=200)
    lines = {line.heads: line for line in result.lines}
    assert result.variance > 0.7
    assert result.variance_of_draws.value < 0.5
    # Of 6 x 4 ways to draw heads of these two layers few hold all three.
    assert result.p_value < 0.1
    assert lines["the first 3 alone"].rank_correlation.value > 0.95
    assert lines["without the first 3"].auroc.value == 0.5
    assert lines["all heads"].auroc.value > 0.7


def test_an_answer_that_ended_early_and_a_layer_that_is_not_counted(made, tmp_path):
    """Both are left out of every score, and a row without any counted cell has none."""
    shares = shares_of(3, 30)
    values = signal.instability(shares).astype(np.float32)
    values[4, :, 3] = np.nan
    values[5] = np.nan
    n_steps = np.full(30, STEPS)
    n_steps[6] = 0
    saved = [row[: last + 1].ravel() for row, last in zip(shares, n_steps, strict=True)]
    labels = made.labels(10, 20)
    folder = made.write_run(tmp_path / "s", values, labels, save=("shares",), shares=saved, n_steps=n_steps)
    result = instability(heads_run(tmp_path / "h"), folder, top=4, draws=5)
    assert result.prompts == 28
    kept = [row for row in range(30) if row not in (5, 6)]
    full, without, _, _ = by_hand(shares[kept], INSIDE)
    four = shares[4].astype(float)[1:, [layer for layer in SCORED if layer != 3]]
    at = kept.index(4)
    full[at] = four.std(axis=-1).mean()
    left = [np.delete(four[:, i], [h for a, h in INSIDE if a == layer], axis=1) for i, layer in enumerate((2, 4, 5))]
    without[at] = np.mean([row.std(axis=1) for row in left])
    (line,) = [line for line in result.lines if line.heads.startswith("without the first")]
    assert line.rank_correlation.value == pytest.approx(spearmanr(full, without).statistic)


def test_the_command_shows_a_table_of_each_run(made, tmp_path):
    run = heads_run(tmp_path / "h")
    labelled = scored_run(made, tmp_path / "a", shares_of(1, 60))
    unlabelled = scored_run(made, tmp_path / "b", shares_of(4, 30), labels=[None] * 30)
    out = tmp_path / "result.json"
    command = ["heads", "instability", run, labelled, unlabelled, "--top", 4, "--draws", 20, "--out", out]
    done = CliRunner().invoke(app, [*map(str, command)])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("without the first 3") == 2
    assert max(map(len, done.stdout.replace(str(tmp_path), "").splitlines())) <= 100
    first, second = json.loads(out.read_text("utf-8"))
    assert first["lines"][0]["auroc"]["value"] > 0.5
    assert {line["heads"]: line["auroc"] for line in second["lines"]} == dict.fromkeys(
        ("all heads", "without the first 3", "without 3 at random", "the first 3 alone", "3 at random alone")
    )


def test_runs_that_cannot_be_used(made, tmp_path):
    run = heads_run(tmp_path / "h")
    good = scored_run(made, tmp_path / "good", shares_of(1, 9))
    bare = made.write_run(tmp_path / "bare", signal.instability(shares_of(1, 9)).astype(np.float32), ["attack"] * 9)
    for heads, scores, top, message in (
        (heads_run(tmp_path / "other", fingerprint="g"), good, 4, "of different models"),
        (run, bare, 4, "--save shares"),
        (run, good, 1, "none of the first 1 heads"),
        (run, good, 99, "has 32 heads"),
        (run, good, 32, "some are left"),
        (tmp_path / "nothing", good, 4, "has no results"),
        (run, tmp_path / "nothing", 4, "is not a run"),
    ):
        with pytest.raises(ValueError, match=message):
            instability(heads, scores, top)
    (run / "ships.json").write_text('{"settings": {}}', encoding="utf-8")
    with pytest.raises(JobError, match="not finished"):
        instability(run, good, 4)
