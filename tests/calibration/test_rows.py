"""Reading finished runs, and the folders that the original wrote."""

import json

import numpy as np
import pytest

from headrift import signal
from headrift.calibration.calibrate import calibrate
from headrift.calibration.thresholds import CalibrateConfig
from headrift.runs.reading import RunError, exact_scores, open_csv, open_run, read_instability, read_rows
from headrift.signal import ScoreRange, Window


def test_a_folder_and_the_same_rows_in_memory_calibrate_alike(make, tmp_path):
    values, label = make.made_up(0, 40, 140, effect=0.01), make.labels(40, 140)
    n_steps = np.random.default_rng(0).integers(0, 7, 180)
    folder = make.write_run(tmp_path / "run", values, label, n_steps=n_steps, category=["c"] * 180)
    from_folder = open_run(folder)
    in_memory = make.run_of(values, label, name=str(folder), n_steps=n_steps, category=["c"] * 180)
    assert from_folder.model.fingerprint == "f"
    first, second = (
        calibrate([run], CalibrateConfig(resamples=3)).model_dump(exclude={"created", "model"})
        for run in (from_folder, in_memory)
    )
    assert first == second


def test_wanted_rows_are_found_across_runs_and_parts(make, tmp_path):
    values = make.made_up(0, 30, 70, steps=3)
    n_steps = np.random.default_rng(0).integers(0, 4, 100)
    paths = [
        make.write_run(tmp_path / name, values[part], ["benign"] * 50, n_steps=n_steps[part])
        for name, part in (("a", slice(0, 50)), ("b", slice(50, 100)))
    ]
    runs = [open_run(path) for path in paths]
    selected = np.array([0, 3, 24, 25, 49, 50, 77, 99])
    result = np.empty((len(selected), 3, 8), np.float32)
    for which, block in read_instability(runs, selected, 2):
        result[which] = block
    for at, row in enumerate(selected):
        expected = values[row, :3].copy()
        expected[n_steps[row] + 1 :] = np.nan
        np.testing.assert_array_equal(result[at], expected)
    (scores,) = exact_scores(runs, read_rows(runs), [(ScoreRange(Window(1, 3)), selected)])
    defined = [signal.score(values[row], Window(1, 3), n_steps=int(n_steps[row])).value for row in selected]
    np.testing.assert_array_equal(scores, np.array(defined, float))


def test_the_fingerprint_is_of_the_rows(make):
    values = make.made_up(0, 10, 10)
    first = read_rows([make.run_of(values, make.labels(10, 10))])
    again = read_rows([make.run_of(values, make.labels(10, 10))])
    other = read_rows([make.run_of(values, make.labels(9, 11))])
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_folders_without_a_finished_run_are_refused(make, tmp_path):
    with pytest.raises(RunError, match=r"is not a run"):
        open_run(tmp_path)
    values = make.made_up(0, 1, 1)
    unfinished = make.write_run(tmp_path / "unfinished", values, ["benign"] * 2, status="unfinished")
    with pytest.raises(RunError, match="not finished: resume it"):
        open_run(unfinished)
    broken = make.write_run(tmp_path / "broken", values, ["benign"] * 2)
    (broken / "run.json").write_text(json.dumps({"status": "done"}))
    with pytest.raises(RunError, match=r"run.json cannot be read: KeyError"):
        open_run(broken)
    damaged = make.write_run(tmp_path / "damaged", values, ["benign"] * 2)
    (damaged / "part-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"part-00001.parquet cannot be read"):
        read_rows([open_run(damaged)])
    for part in damaged.glob("part-*"):
        part.unlink()
    with pytest.raises(RunError, match="has no parts"):
        open_run(damaged)


# ------------------------------------------------------------------------------------------------ the original's


def write_csv(folder, matrix, user_prompt=None):
    folder.mkdir(parents=True)
    np.savetxt(folder / "inter_head_std.csv", matrix, delimiter=",")
    if user_prompt is not None:
        (folder / "meta.json").write_text(json.dumps({"user_prompt": user_prompt}))


def test_the_originals_folders_are_a_run(tmp_path):
    random = np.random.default_rng(0)
    matrices = [random.random((32, width)) / 2 for width in (9, 5, 7, 6)]
    write_csv(tmp_path / "benign" / "hello__20250908-072434", matrices[0])
    write_csv(tmp_path / "attacks" / "say_it__20250908-072435", matrices[1], "Say it.")
    write_csv(tmp_path / "tests" / "say__it__20250908-072436", matrices[2], "Say it.")
    write_csv(tmp_path / "single" / "what__20250908-072436", matrices[3])
    write_csv(tmp_path / "published" / "attack" / "say_it__20250908-072437", matrices[1], "Say it.")
    run = open_csv(tmp_path)
    rows = read_rows([run])
    assert run.model.layers == 32
    assert run.steps == 8
    # In the order of their paths: attacks, benign, published/attack, single, tests.
    assert rows.label.tolist() == [1, 0, 1, 2, 1]
    assert rows.counts["n_steps"].tolist() == [4, 8, 4, 5, 6]
    # Runs of the same prompt are repeats of one sample.
    assert rows.prompt[0] == rows.prompt[2] == rows.prompt[4] != rows.prompt[1]
    assert rows.group[0] == rows.group[2] == rows.group[4] != rows.group[1]
    (scores,) = exact_scores([run], rows, [(ScoreRange(Window(2, 6)), np.arange(5))])
    # Layers 8 to 26, columns 2 to 6 as far as there are: the files' numbers, which are kept as float32.
    by_hand = [matrix[8:27, 2:7].mean() for matrix in (matrices[at] for at in (1, 0, 1, 3, 2))]
    np.testing.assert_allclose(scores, by_hand, rtol=0, atol=1e-7)


def test_the_originals_own_outputs(seed_data):
    run = open_csv(seed_data / "outputs")
    rows = read_rows([run])
    assert sorted(rows.label) == [0, 0, 1, 1]
    (scores,) = exact_scores([run], rows, [(ScoreRange(Window(2, 3)), np.arange(4))])
    files = sorted((seed_data / "outputs").rglob("inter_head_std.csv"))
    for path, score in zip(files, scores):
        table = [[float(score_range) for score_range in line.split(",")] for line in path.read_text().splitlines()]
        cells = [value for line in table[8:27] for value in line[2:4]]
        assert score == pytest.approx(sum(cells) / len(cells), abs=1e-6)
    # What the original's own analysis has for this prompt (see its runs of 8 September).
    assert scores[files.index(next(path for path in files if "capital" in str(path)))] == pytest.approx(
        0.065797, abs=1e-6
    )


def test_folders_that_hold_nothing_of_the_kind_are_refused(tmp_path):
    with pytest.raises(RunError, match=r"has no inter_head_std.csv"):
        open_csv(tmp_path)
    write_csv(tmp_path / "benign" / "a__1", np.ones((4, 3)))
    write_csv(tmp_path / "benign" / "b__1", np.ones((5, 3)))
    with pytest.raises(RunError, match="different numbers of layers"):
        open_csv(tmp_path)
    (tmp_path / "benign" / "b__1" / "inter_head_std.csv").write_text("a,b\n")
    with pytest.raises(RunError, match="cannot be read"):
        open_csv(tmp_path)
