"""What detecting costs: the prefill alone against 12 steps, learning on a million rows, and one verdict.

    python bench/detectors.py [--rows 1000000] [--turns 4] [--short]

- Steps: 300 prompts of four sets behind one system prompt of 103 tokens, `steps=0` and `steps=12` in turns, each an
  engine in a process of its own with an empty prefix cache in every turn.
- Rows: a made-up run of step 0 alone (28 layers of 12 heads; an effect on four heads of the attacks) is calibrated with
  `--signal auto` in a process of its own; seconds and peak memory.
- Verdict: a readout's value of one result, beside the time that scoring a prompt takes in the turns above.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import utils

LAYERS, HEADS = 28, 12
PLANTED = [(10, 3), (11, 4), (12, 5), (20, 1)]
SETS = ("obfuscated_word", "banned_word", "no_digits_urls", "complex_input")
PART_ROWS = 10_000


class Scored:
    """A Scorer that takes no result from an earlier turn."""

    def start(self, model: str, steps: int) -> dict[str, Any]:
        from headrift import Scorer

        self._scorer = Scorer(model, steps=steps, repeat_bytes=0, engine_args={"kv_cache_memory_bytes": utils.KV_BYTES})
        return {}

    def run(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        self._scorer.engine.llm_engine.reset_prefix_cache()
        start = time.perf_counter()
        results = list(self._scorer.score(rows))
        seconds = time.perf_counter() - start
        tokens = [result.prompt_tokens for result in results]
        return {"seconds": seconds, "prompts": len(results), "mean_tokens": float(np.mean(tokens))}


class Calibrated:
    """A calibration of a run."""

    def start(self, folder: str) -> dict[str, Any]:
        from headrift.calibration.calibrate import calibrate
        from headrift.calibration.thresholds import CalibrateConfig
        from headrift.runs.reading import open_run

        start = time.perf_counter()
        calibration = calibrate([open_run(Path(folder))], CalibrateConfig())
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "verdict": calibration.verdict.lines, "set_on": calibration.setting.n}

    def verdict(self, n: int) -> dict[str, Any]:
        """Seconds of one readout's value, over the layers and heads of the demonstration model."""
        from headrift.signals.detectors import Training, learn_readout
        from headrift.signals.features import Prompts

        random = np.random.default_rng(0)
        log_odds = random.standard_normal((400, 1, LAYERS, HEADS)).astype(np.float32)
        prompts = Prompts({}, np.full(400, 0.7), log_odds)
        attack = np.arange(400) < 200
        readout = learn_readout(Training(prompts, attack, np.zeros(400, np.int64), np.arange(400) % 4))
        one = [prompts.take(np.array([number])) for number in range(400)]
        start = time.perf_counter()
        for number in range(n):
            readout.values(one[number % 400])
        return {"seconds": (time.perf_counter() - start) / n}


def make_run(folder: Path, n: int) -> None:
    """Write a run of n rows, 2% of them attacks."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from headrift.near_duplicates import NUMBERS
    from headrift.runs.parts import part_schema

    schema = part_schema((), layers=LAYERS, heads=HEADS, regions=("system", "user", "prompt"))
    random = np.random.default_rng(0)
    for number, first in enumerate(range(0, n, PART_ROWS)):
        rows = min(PART_ROWS, n - first)
        attack = random.random(rows) < 0.02
        log_odds = random.standard_normal((rows, LAYERS, HEADS), np.float32)
        for layer, head in PLANTED:
            log_odds[:, layer, head] += 1.5 * attack
        size = LAYERS * HEADS
        columns = {
            "label": np.where(attack, "attack", "benign"),
            "group": [f"{first + place:016x}" for place in range(rows)],
            "minhash": [random.bytes(2 * NUMBERS) for _ in range(rows)],
            "system_hash": ["0" * 16] * rows,
            "source": ["made-up.jsonl"] * rows,
            "n_steps": np.zeros(rows, np.int32),
            "prompt_tokens": random.integers(60, 200, rows).astype(np.int32),
            "system_tokens": np.full(rows, 40, np.int32),
            "answer_tokens": np.ones(rows, np.int32),
            "logit_shares": pa.ListArray.from_arrays(
                np.arange(0, (rows + 1) * size, size, dtype=np.int32), pa.array(log_odds.astype(np.float16).ravel())
            ),
        }
        table = pa.table({name: columns.get(name, pa.nulls(rows, schema.field(name).type)) for name in schema.names})
        pq.write_table(table.cast(schema), folder / f"part-{number:05d}.parquet")
    settings = {"steps": 0, "window": "none", "drop_shallow": 0.25, "drop_deep": 0.15, "replay": False}
    about = {
        "status": "done",
        "settings": settings,
        "model": {"path": "made-up", "fingerprint": "f"},
        "engine": {"dtype": "float32", "layers": LAYERS, "heads": HEADS},
        "chat_template_sha256": "t",
    }
    (folder / "run.json").write_text(json.dumps(about))


def prompts(n: int) -> list[dict[str, Any]]:
    """The shortest prompts of four sets, all with the system prompt of the first."""
    system = utils.ROOT / f"system_prompts/{SETS[0]}.txt"
    rows = [row for name in SETS for row in utils.read_prompts(utils.ROOT / f"datasets/{name}.jsonl", system)]
    shortest = sorted((row for row in rows if "prompt" in row), key=lambda row: len(row["prompt"]))[:n]
    return [{"prompt": row["prompt"], "system": row["system"]} for row in shortest]


def main() -> None:
    options = utils.Options(__doc__, "detectors")
    options.amount("prompts", 300, 20, "prompts of a turn")
    options.amount("turns", 4, 1, "turns")
    options.amount("rows", 1_000_000, 20_000, "rows to calibrate on")
    args = options.parse()
    report = utils.new_report(args)
    rows = prompts(args.prompts)
    with utils.Child("detectors.py", "scored") as prefill, utils.Child("detectors.py", "scored") as steps:
        for child, n in ((prefill, 0), (steps, 12)):
            child.call("start", model=str(args.model), steps=n)
            child.call("run", rows=rows[:20])
        arms = {0: lambda: prefill.call("run", rows=rows), 12: lambda: steps.call("run", rows=rows)}
        runs = utils.run_in_turns(arms, args.turns)
    seconds = {n: [run["seconds"] for run in runs[n]] for n in runs}
    report["steps"] = {
        "prompts": len(rows),
        "mean_tokens": runs[0][0]["mean_tokens"],
        "prompts_per_second": {n: utils.over_all([len(rows)] * args.turns, seconds[n]) for n in seconds},
        "ratio": utils.median_ratio(seconds[12], seconds[0]),
    }
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder), args.rows)
        with utils.Child("detectors.py", "calibrated") as child:
            report["rows"] = {"n": args.rows, **child.call("start", folder=folder)}
            report["verdict"] = child.call("verdict", n=2_000)
    per_prompt = 1 / report["steps"]["prompts_per_second"][0]["all"]
    report["verdict"]["share_of_scoring"] = report["verdict"]["seconds"] / per_prompt
    utils.write(report, render(report), args.out)


def render(report: dict[str, Any]) -> str:
    steps, rows, verdict = report["steps"], report["rows"], report["verdict"]
    rates = [(f"steps={n}", utils.cell(rate, 2)) for n, rate in steps["prompts_per_second"].items()]
    return utils.page(
        utils.title(report, "What detecting costs"),
        f"Made by `bench/detectors.py`. {steps['prompts']} prompts of {steps['mean_tokens']:.0f} tokens in the mean, "
        f"in turns: step 0 alone is {utils.cell(steps['ratio'], 2)} times as fast as 12 steps.",
        utils.markdown(["recorded", "prompts/s"], rates),
        f"Calibrating on {rows['n']:,} rows of {LAYERS} x {HEADS} heads at step 0, `--signal auto`: "
        f"{rows['seconds']:.0f} s, {rows['peak_bytes'] / 1e9:.2f} GB at most; {rows['set_on']:,} set the threshold.",
        f"One verdict of a readout takes {verdict['seconds'] * 1e6:.0f} µs, {verdict['share_of_scoring']:.2%} of a "
        "prompt's prefill here.",
    )


if __name__ == "__main__":
    utils.run_script(main, scored=Scored, calibrated=Calibrated)
