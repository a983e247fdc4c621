"""`--engine ray`: two engines on a real Ray cluster, two nodes on this machine, make what one local engine makes."""

import json
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from typer.testing import CliRunner

from headrift.calibration.artifact import Calibration
from headrift.cli import app
from headrift.runs.parts import Journal
from headrift.signals.detectors import Moments, Readout

FAULTS = Path(__file__).resolve().parent / "fault_injection"
DATA = Path(__file__).resolve().parents[1] / "data"
PAUSE = "0.004"  # seconds a row of the fake engine: shards of 100 rows, so that there is a middle to be killed in

NO_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'headrift[ray]'")


def write_log(path: Path, rows: int, *, poison: bool) -> Path:
    """Log rows with ids that come again, malformed rows and, for the fake engine, poison rows."""
    lines = [json.dumps({"prompt": f"Tell me of number {n}, {'please ' * (n % 9)}"}) for n in range(rows)]
    lines[5] = lines[rows - 5] = json.dumps({"prompt": "Who is there?", "id": "twice"})
    lines[rows // 4], lines[rows // 2] = '{"prompt": 3}', "malformed"
    if poison:
        lines[rows // 3] = json.dumps({"prompt": "KILL whoever reads this", "id": "poison"})
        lines[rows // 5] = json.dumps({"prompt": "KILL ONCE a", "id": "frail"})
    path.write_text("\n".join(lines))
    return path


class Jobs:
    """Starts jobs on one input, each with the output folder that it is told."""

    def __init__(self, engine: str, given: Path, model: Path, *calibration: Path) -> None:
        self._engine, self._given, self._model, self._calibration = engine, given, model, calibration

    def start(self, out: Path, *, ray: bool) -> subprocess.Popen:
        marks = out.with_suffix(".marks")
        marks.mkdir(exist_ok=True)
        script = FAULTS / ("run_ray_job.py" if ray else "run_job.py")
        arguments = [script, self._engine, self._given, self._model, out, marks, PAUSE if ray else "0"]
        arguments += self._calibration
        log = out.with_suffix(".log").open("a")
        return subprocess.Popen([sys.executable, *map(str, arguments)], stderr=log, start_new_session=True)

    def finish(self, out: Path, *, ray: bool) -> Path:
        assert self.start(out, ray=ray).wait(300) == 0, log_of(out)
        return out


def log_of(out: Path) -> str:
    return out.with_suffix(".log").read_text()


@pytest.fixture
def fake_jobs(tmp_path, fake_model) -> Jobs:
    return Jobs("fake", write_log(tmp_path / "in.jsonl", 1500, poison=True), fake_model)


@pytest.fixture
def real_jobs(tmp_path, faulty, tiny_model) -> Jobs:
    """Jobs with a readout of arbitrary coefficients, over steps 1 to 4."""
    layers, heads = 2, 4
    d = layers * heads * 2 + layers
    readout = Readout(
        shape=(layers, heads),
        layers=list(range(layers)),
        windowed=True,
        moments=Moments(mean=[0.0] * d, spread=[1.0] * d, n=30),
        coefficients=np.random.default_rng(0).standard_normal(d).tolist(),
        intercept=0.0,
        inverse_penalty=1.0,
        head_map=[],
    )
    scored = {"window": "1:4", "drop_shallow": 0.25, "drop_deep": 0.15}
    calibration = Calibration.load(DATA / "calibration.json").model_copy(update={"detector": readout, **scored})
    calibration.save(tmp_path / "calibration.json")
    log = write_log(tmp_path / "in.jsonl", 1200, poison=False)
    return Jobs("vllm", log, tiny_model, tmp_path / "calibration.json")


def rows_of(out: Path, kind: str) -> list[dict]:
    return [row for path in sorted(out.glob(f"{kind}-*.parquet")) for row in pq.read_table(path).to_pylist()]


def assert_alike(actual: Path, expected: Path, tolerance: float) -> None:
    """The same files with the same rows in the same order, the same rejects and counts, and scores and values of the
    detector within tolerance.

    Of 6,000 tokens chosen, one in a hundred thousand has a rival within rounding: one row in all may go another way.
    """
    names = [sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) for out in (actual, expected)]
    assert names[0] == names[1]
    assert [(r["row"], r["id"]) for r in rows_of(actual, "part")] == [
        (r["row"], r["id"]) for r in rows_of(expected, "part")
    ]
    reasons = [[(r["row"], r["id"], r["reason"]) for r in rows_of(out, "rejects")] for out in (actual, expected)]
    assert reasons[0] == reasons[1]
    assert {"duplicate_id", "wrong_type", "bad_json"} <= {reason for _, _, reason in reasons[0]}
    runs = [json.loads((out / "run.json").read_text()) for out in (actual, expected)]
    assert runs[0]["status"] == runs[1]["status"] == "done"
    assert runs[0]["counts"] == runs[1]["counts"]
    columns = [name for name in ("score", "detector") if name in rows_of(actual, "part")[0]]
    for name in columns:
        values = [[row[name] for row in rows_of(out, "part")] for out in (actual, expected)]
        assert [value is None for value in values[0]] == [value is None for value in values[1]]
        differ = sorted(abs(a - b) for a, b in zip(*values) if a is not None)
        assert len(differ) > 300
        assert differ[-2] <= tolerance, (name, differ[-5:])


def wait_for_parts(process: subprocess.Popen, out: Path, number: int) -> None:
    deadline = time.monotonic() + 200
    while len(list(out.glob("part-*.parquet"))) < number:
        assert process.poll() is None, f"it ended too early to be disturbed: {log_of(out)}"
        assert time.monotonic() < deadline, log_of(out)
        time.sleep(0.01)


def processes_below(process: subprocess.Popen, name: str, parent: str) -> list[psutil.Process]:
    """Processes that a job started, and those these did, by what is in their command line and in their parent's."""
    processes = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if name in str(child.cmdline()) and parent in str(child.parent().cmdline()):
                processes.append(child)
    return processes


def actors_of(process: subprocess.Popen) -> list[psutil.Process]:
    return processes_below(process, "ray::_Actor", "raylet")


@pytest.mark.slow
@NO_RAY
def test_two_engines_on_ray_make_what_one_here_makes(real_jobs, tmp_path):
    """1e-4, of scores from 0 to 0.5 and log-odds of units: rounding, as other prompts are beside each."""
    ray = real_jobs.finish(tmp_path / "ray", ray=True)
    assert json.loads((ray / "run.json").read_text())["engine_restarts"] == 0
    assert_alike(ray, real_jobs.finish(tmp_path / "local", ray=False), 1e-4)
    values = [row["detector"] for row in rows_of(ray, "part")]
    assert len(values) > 1000
    assert np.std(values) > 0.1


@pytest.mark.slow
@NO_RAY
@pytest.mark.parametrize(("engine", "lost"), [("fake", "machine"), ("real", "actor")])
def test_what_is_lost_in_the_middle_costs_no_row(engine, lost, request, tmp_path):
    """An actor's process is killed, or Ray's on a machine, which takes the actor along and leaves no room for another.

    Tolerance as above; the fake engine does not round.
    """
    jobs = request.getfixturevalue(f"{engine}_jobs")
    process = jobs.start(tmp_path / "ray", ray=True)
    wait_for_parts(process, tmp_path / "ray", 2)
    scoring = processes_below(process, "ray::_Actor.score", "raylet")
    if lost == "actor":
        scoring[0].kill()
    else:  # not the one that the driver is on
        next(actor.parent() for actor in scoring if "--head" not in actor.parent().cmdline()).kill()
    assert process.wait(300) == 0, log_of(tmp_path / "ray")
    assert "was lost and its shards go to others; another one is started" in log_of(tmp_path / "ray")
    assert json.loads((tmp_path / "ray" / "run.json").read_text())["engine_restarts"] >= 1
    assert_alike(tmp_path / "ray", jobs.finish(tmp_path / "local", ray=False), 1e-4 if engine == "real" else 0.0)


@pytest.mark.slow
@NO_RAY
def test_a_worker_lost_while_it_starts_is_replaced(fake_jobs, tmp_path):
    process = fake_jobs.start(tmp_path / "ray", ray=True)
    while not (starting := processes_below(process, "ray::_Actor.begin", "raylet")):
        assert process.poll() is None, log_of(tmp_path / "ray")
        time.sleep(0.01)
    starting[0].kill()
    assert process.wait(300) == 0, log_of(tmp_path / "ray")
    assert "was lost while it started; another one is started" in log_of(tmp_path / "ray")
    assert_alike(tmp_path / "ray", fake_jobs.finish(tmp_path / "local", ray=False), 0.0)


@pytest.mark.slow
@NO_RAY
def test_a_killed_job_goes_on_on_ray_and_then_without(fake_jobs, tmp_path):
    """The driver is killed twice, and its engines end with it. Prompts that kill engines are found on Ray."""
    out = tmp_path / "ray"
    for parts in (3, 7):
        process = fake_jobs.start(out, ray=True)
        wait_for_parts(process, out, parts)
        while not (engines := processes_below(process, "headrift.corpus.worker", "ray::_Actor")):
            time.sleep(0.01)  # they are being started again
        started, actors = psutil.Process(process.pid).children(recursive=True), actors_of(process)
        assert len(actors) == 2
        process.kill()
        process.wait()
        try:
            assert not psutil.wait_procs([*engines, *actors], timeout=60)[1]
        finally:  # agents of Ray's, which the cluster of a killed driver leaves behind
            for child in started:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
    with Journal(out) as journal:
        names = [f"part-{shard.number:05d}.parquet" for shard in journal.finished()]
    kept = {name: (out / name).stat().st_mtime_ns for name in names}
    assert len(kept) >= 6
    fake_jobs.finish(out, ray=False)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert_alike(out, fake_jobs.finish(tmp_path / "local", ray=False), 0.0)
    assert [r["id"] for r in rows_of(out, "rejects") if r["reason"] == "engine_died"] == ["poison"]


def score(folder: Path, *options: str) -> Result:
    """`headrift score` in this process, with options that must not be."""
    places = [folder / "in.txt", "--model", folder, "--out", folder / "out"]
    return CliRunner().invoke(app, ["score", *map(str, places), *options])


def test_without_ray_installed_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "headrift.corpus.ray_workers", raising=False)
    done = score(tmp_path, "--engine", "ray")
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: --engine ray needs Ray, which is not installed: pip install 'headrift[ray]'")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_number_of_workers_goes_with_ray(tmp_path):
    done = score(tmp_path, "--workers", "2")
    assert done.exit_code == 2
    assert "--workers is the number of engines on a Ray cluster" in done.stderr
