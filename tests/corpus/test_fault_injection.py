"""A job that is killed again and again, anywhere, and resumed, ends with what an undisturbed one has."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

RUN_JOB = Path(__file__).resolve().parent / "fault_injection" / "run_job.py"
ROWS = 1500
PAUSE = "0.003"  # seconds a row: a run takes about five seconds, so that interruptions hit it anywhere


def write_log(path: Path, *, poison: bool = True) -> None:
    """Log rows of all sorts: repeats, repeated ids, malformed and too long ones, and poison rows, always or once."""
    lines = []
    for n in range(ROWS):
        row = {"prompt": f"prompt {n % 1100}", "label": "attack" if n % 3 else "benign"}
        if n % 53 == 0:
            row["prompt"] += " and so on" * 60
        if n % 4 == 0:
            row["id"] = f"id {n if n % 40 else n - 40}"  # some ids come again
        lines.append(json.dumps(row))
        if n % 97 == 0:
            lines.append('{"prompt": "cut off')
    if poison:
        lines[333] = json.dumps({"prompt": "KILL whoever reads this", "id": "poison"})
        lines[700] = json.dumps({"prompt": "KILL ONCE a", "id": "frail a"})
        lines[1204] = json.dumps({"prompt": "KILL ONCE b", "id": "frail b"})
    path.write_text("\n".join(lines))


def start(engine: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(RUN_JOB), engine, *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def results(out: Path) -> tuple[list, dict, dict]:
    """Places of the scored rows in their order; scores and rejects by place."""
    parts = [row for path in sorted(out.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]
    rejects = [row for path in sorted(out.glob("rejects-*.parquet")) for row in pq.read_table(path).to_pylist()]
    scores = {(row["row"], row["id"]): row["score"] for row in parts}
    reasons = {(row["row"], row["id"]): row["reason"] for row in rejects}
    assert len(scores) == len(parts)
    assert len(reasons) == len(rejects)
    return [(row["row"], row["id"]) for row in parts], scores, reasons


def counts(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())["counts"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, fake_model) -> Path:
    """The output of a run that nothing disturbs but the poison rows; the input is in.jsonl beside it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_log(folder / "in.jsonl")
    (folder / "marks").mkdir()
    process = start("fake", folder / "in.jsonl", fake_model, folder / "whole", folder / "marks", 0)
    assert process.wait(120) == 0, process.stderr.read()
    return folder / "whole"


def engine_of(process: subprocess.Popen) -> int | None:
    """The number of the process in which a job's engine is, while there is one."""
    try:
        children = psutil.Process(process.pid).children()
        return next((child.pid for child in children if "headrift.corpus.worker" in str(child.cmdline())), None)
    except psutil.NoSuchProcess:
        return None


def interrupt(process: subprocess.Popen, kind: str) -> int:
    """Do it, wait until the job has ended, and see that no engine is left; the exit code."""
    engine = engine_of(process)
    if kind.startswith("kill engine") and engine is not None:
        os.kill(engine, signal.SIGKILL)
        while process.poll() is None and engine_of(process) in (engine, None):
            time.sleep(0.01)
        process.terminate()  # when another engine is there, so that something is left for the next interruption
    elif kind == "kill parent":
        process.kill()
    else:
        for _ in range(2 if kind == "terminate twice" else 1):
            process.terminate()
            time.sleep(0.02)
    code = process.wait(300)
    deadline = time.monotonic() + 60
    while engine is not None and is_alive(engine) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine is None or not is_alive(engine)
    return code


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def drawn_seed() -> int:
    """A seed that is printed, and can be given again as FAULT_SEED."""
    seed = int(os.environ.get("FAULT_SEED") or random.SystemRandom().randrange(10**6))
    print(f"FAULT_SEED={seed}")
    return seed


@pytest.mark.parametrize("time_of_three", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in (1, 2))])
def test_five_random_interruptions_and_the_results_are_the_undisturbed_runs(
    undisturbed, tmp_path, fake_model, time_of_three
):
    """15 interruptions in all: SIGKILL of the parent or of the engine's process, SIGTERM once and twice."""
    seed = drawn_seed()
    chosen = random.Random(seed)
    marks, out = tmp_path / "marks", tmp_path / "out"
    marks.mkdir()
    log = []
    for _ in range(5):
        process = start("fake", undisturbed.parent / "in.jsonl", fake_model, out, marks, PAUSE)
        while process.poll() is None and engine_of(process) is None:
            time.sleep(0.01)
        kind = chosen.choice(["kill parent", "kill engine", "terminate", "terminate twice"])
        delay = chosen.uniform(0.0, 1.5)
        time.sleep(delay)
        code = interrupt(process, kind)
        log.append(f"{kind} after {delay:.2f} s: {code}, {len(list(out.glob('part-*')))} parts")
    process = start("fake", undisturbed.parent / "in.jsonl", fake_model, out, marks, 0)
    assert process.wait(120) == 0, (seed, log, process.stderr.read())
    print("; ".join(log))
    assert results(out) == results(undisturbed), (seed, log)
    assert counts(out) == counts(undisturbed)
    assert not list(out.glob(".*")), "temporary files are left"


def test_the_poison_row_is_rejected_and_those_that_kill_once_are_not(undisturbed):
    order, scores, reasons = results(undisturbed)
    assert [place for place, reason in reasons.items() if reason == "engine_died"] == [(334, "poison")]
    assert {(701, "frail a"), (1205, "frail b")} <= set(scores)
    assert order == sorted(order)
    assert len(order) + len(reasons) == len((undisturbed.parent / "in.jsonl").read_text().splitlines())
    assert json.loads((undisturbed / "run.json").read_text())["engine_restarts"] > 5


def test_scores_do_not_depend_on_rows_that_kill_the_engine(undisturbed, tmp_path, fake_model):
    write_log(tmp_path / "calm.jsonl", poison=False)
    process = start("fake", tmp_path / "calm.jsonl", fake_model, tmp_path / "calm", tmp_path, 0)
    assert process.wait(120) == 0, process.stderr.read()
    calm, torn = (results(folder)[1] for folder in (tmp_path / "calm", undisturbed))
    both = {row: score for (row, _), score in calm.items()}
    same = [(both[row], score) for (row, name), score in torn.items() if not name.startswith(("frail", "poison"))]
    assert len(same) > 1300
    assert all(a == b for a, b in same)


# In a mount namespace of its own, which ends with the shell.
FULL = """
mount -t tmpfs -o size=20m tmpfs "$SMALL"
cp -a "$OUT/." "$SMALL"
had=$(ls "$SMALL" | grep -c part-)
"$PYTHON" "$RUN_JOB" "$@" &
while kill -0 $! 2>/dev/null && [ "$(ls "$SMALL" | grep -c part-)" -le $((had + PARTS)) ]; do sleep 0.02; done
cat /dev/zero > "$SMALL/filler" 2>/dev/null
wait $!
code=$?
rm "$SMALL/filler"
cp -a "$SMALL/." "$OUT"
exit $code
"""
UNSHARE = [shutil.which("unshare") or "false", "--map-root-user", "--mount"]


def can_mount(folder: Path) -> bool:
    """Whether this machine lets its users mount a file system."""
    return not subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode


def fill_up(engine: str, given: Path, model: Path, out: Path, parts: int, pause: str) -> subprocess.CompletedProcess:
    """Let a job go on, on a small disk that fills up when more than so many more parts are there."""
    small, marks = out.with_suffix(".small"), out.with_suffix(".marks")
    for folder in (out, small, marks):
        folder.mkdir(exist_ok=True)
    names = {"SMALL": small, "OUT": out, "PYTHON": sys.executable, "RUN_JOB": RUN_JOB, "PARTS": parts}
    command = [*UNSHARE, "sh", "-c", FULL, "sh", engine, given, model, small, marks, pause]
    environment = {**os.environ, **{name: str(value) for name, value in names.items()}}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.nightly
def test_a_disk_that_fills_up_and_then_has_room_again(undisturbed, tmp_path, fake_model):
    if not can_mount(tmp_path):
        pytest.skip("this machine lets its users mount no file system")
    given, out = undisturbed.parent / "in.jsonl", tmp_path / "out"
    done = fill_up("fake", given, fake_model, out, 2, "0.005")
    assert done.returncode == 1, done.stderr
    assert "No space left on device" in done.stderr or "full" in done.stderr
    left = [path.name for path in out.iterdir()]
    assert "part-00002.parquet" in left
    assert "part-00014.parquet" not in left, "the disk filled up too late to matter"
    assert not [name for name in left if name.startswith(".")]
    process = start("fake", given, fake_model, out, out.with_suffix(".marks"), 0)
    assert process.wait(120) == 0, process.stderr.read()
    assert results(out) == results(undisturbed)


# --------------------------------------------------------------------------------------------------- the real engine


KINDS = ["kill parent", "kill engine", "terminate", "terminate twice", "kill engine while it starts"]


def torn(
    engine: str, folder: Path, model: Path, kinds: list[str], chosen: random.Random, pause: float = 0.0
) -> list[str]:
    """Run folder/in.jsonl to its end as it is into `whole`, and with these interruptions into `out`; what happened."""
    given, whole, out, log = folder / "in.jsonl", folder / "whole", folder / "out", []
    out.mkdir()
    process = start(engine, given, model, whole, folder, 0)
    assert process.wait(3000) == 0, process.stderr.read()
    for kind in kinds:
        have = len(list(out.glob("part-*")))
        if kind == "fill the disk":
            code = fill_up(engine, given, model, out, 0, str(pause)).returncode
        else:
            process = start(engine, given, model, out, folder, pause)
            while process.poll() is None:
                if engine_of(process) if kind.endswith("starts") else len(list(out.glob("part-*"))) > have:
                    break
                time.sleep(0.01)
            time.sleep(chosen.uniform(0.0, 0.2))
            code = interrupt(process, kind)
        log.append(f"{kind} at {len(list(out.glob('part-*')))} parts: {code}")
    process = start(engine, given, model, out, folder, 0)
    assert process.wait(3000) == 0, (log, process.stderr.read())
    return log


def assert_alike(folder: Path, log: list[str]) -> None:
    """The same rows, rejects and counts in `out` as in `whole`. Scores may differ by rounding, as other prompts are
    beside them: 1e-4, in units of a score from 0 to 0.5.

    Of 2,000 tokens chosen, one in a hundred thousand has a rival within rounding: one row in all may go another way.
    """
    expected, (order, scores, reasons) = results(folder / "whole"), results(folder / "out")
    assert (order, reasons) == (expected[0], expected[2]), log
    differ = [abs(scores[place] - score) for place, score in expected[1].items() if score is not None]
    assert len(differ) == len([score for score in scores.values() if score is not None]) > 0.75 * len(order)
    print(f"{len(order)} scored, {len(reasons)} rejected; scores differ by at most {sorted(differ)[-2:]}")
    assert sorted(differ)[-2] < 1e-4, log
    assert counts(folder / "out") == counts(folder / "whole")


@pytest.mark.nightly
def test_five_random_interruptions_of_the_real_engine(tmp_path, faulty, tiny_model):
    chosen = random.Random(drawn_seed())
    rows = [{"prompt": f"Tell me of number {n % 300}, {'please ' * (n % 9)}", "id": f"r{n}"} for n in range(400)]
    lines = [json.dumps(row) for row in rows]
    lines[70], lines[200] = '{"prompt": 3}', "malformed"
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    log = torn("vllm", tmp_path, tiny_model, chosen.sample(KINDS, 5), chosen)
    print("; ".join(log))
    assert_alike(tmp_path, log)


@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_thirty_random_interruptions_of_the_demonstration_model(tmp_path, faulty, demo_model):
    chosen = random.Random(drawn_seed())
    rows = [{"prompt": f"Tell me of number {n % 140}, {'please ' * (n % 9)}", "id": f"r{n}"} for n in range(180)]
    lines = [json.dumps(row) for row in rows]
    lines[70], lines[120] = '{"prompt": 3}', "malformed"
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    kinds = [*KINDS, *(["fill the disk"] if can_mount(tmp_path) else [])]
    kinds += chosen.choices(kinds, k=30 - len(kinds))
    chosen.shuffle(kinds)
    log = torn("small", tmp_path, demo_model, kinds, chosen, pause=0.1)
    print("; ".join(log))
    assert not [entry for entry in log if entry.endswith(": 0")], "some came when all was done"
    assert_alike(tmp_path, log)


@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_a_prompt_that_kills_the_demonstration_models_engine(tmp_path, faulty, demo_model):
    """It is found and rejected, and interruptions of the search for it change nothing."""
    chosen = random.Random(drawn_seed())
    lines = [json.dumps({"prompt": f"Tell me of number {n}.", "id": f"r{n}"}) for n in range(9)]
    lines[4] = json.dumps({"prompt": "KILL whoever reads this", "id": "poison"})
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    log = torn("small", tmp_path, demo_model, ["kill parent", "terminate"], chosen)
    print("; ".join(log))
    assert_alike(tmp_path, log)
    assert results(tmp_path / "out")[2] == {(5, "poison"): "engine_died"}
