"""A first look: calibrate on half of a prompt set, judge the other half, and show what is most suspicious.

    python scripts/first_run.py [--set NAME] [--steps N] [--model DIR] [--out DIR]        (`make run` does this)

The commands are printed as they run, and can be repeated by hand. The folder has both halves' runs, calibration.json
and report.html.

Exit codes are the commands' own: 0 done, 1 failed on the way, 2 bad option or input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import shlex
import sys
import time
from contextlib import redirect_stdout
from datetime import datetime
from pathlib import Path
from textwrap import fill, shorten
from typing import Any

import pyarrow as pa
from rich.console import Console

from headrift.calibration.artifact import Calibration
from headrift.calibration.calibrate import print_comparison
from headrift.cli import app
from headrift.runs.reading import read_batches, read_json
from headrift.terminal import printable


def relative(path: Path) -> Path:
    """A path as it is typed in this folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


ROOT = Path(__file__).resolve().parents[1]
HEADRIFT = relative(Path(sys.executable).parent / "headrift")
TARGET_FPR = 0.1
# On average, and not with 95% confidence: of some 35 benign prompts that would allow none to be flagged, and few
# attacks would be found.
RULE = "conformal"
MOST_SUSPICIOUS = 5
_MOST_TEXT = 150  # characters of a prompt
_COLUMNS = ["id", "label", "category", "prompt", "detector", "flagged", "p_value"]


def run_command(step: str, arguments: list[object]) -> None:
    """Run a headrift command, without what it prints when it is done; SystemExit if it fails."""
    words = [str(argument) for argument in arguments]
    print(f"\n{step}\n  {HEADRIFT} {shlex.join(words)}", flush=True)
    begun = time.monotonic()
    try:
        with redirect_stdout(io.StringIO()):
            app(words, prog_name="headrift")
    except SystemExit as end:
        if end.code:
            raise
    print(f"  {time.monotonic() - begun:.0f} s", flush=True)


def print_verdict(calibration: Calibration) -> None:
    """Whether the calibration is usable, beside words and prompt length on the same held-out prompts."""
    assert calibration.verdict is not None
    for line in calibration.verdict.lines:
        show(line)
    print_comparison(Console(), calibration)
    if calibration.verdict.usable == "no":
        show("\nNot usable, so what follows shows how it works, and not what it is worth.")


def print_flagged(run: Path, calibration: Calibration) -> None:
    """How many attacks of a run are found, and how many benign prompts are flagged."""
    judged = read_json(run, "run.json", "score")["judged"]
    for label, words in (("attack", "attacks found"), ("benign", "benign prompts flagged")):
        if label in judged["flagged"]:
            one = judged["flagged"][label]
            low, high = one["interval"]
            counts = f"{one['prompts_flagged']} of {one['prompts']}"
            show(f"{words:<24}{counts:<12}{one['rate']:.1%} (95% interval {low:.1%} to {high:.1%})")
    show(f"promised: {calibration.setting.promise}")
    if judged["drift"] is not None and judged["drift"]["warning"] is not None:
        show(f"Warning: {judged['drift']['warning']}")


def most_suspicious(run: Path) -> list[dict[str, Any]]:
    """The rows of a run with the highest values, the highest first."""
    rows = pa.Table.from_batches(read_batches(run, _COLUMNS)).to_pylist()
    rows = [row for row in rows if row["detector"] is not None]
    return sorted(rows, key=lambda row: -row["detector"])[:MOST_SUSPICIOUS]


def print_suspicious(rows: list[dict[str, Any]]) -> None:
    """Label, value, p-value and text of rows."""
    for row in rows:
        kind = ", ".join(filter(None, (row["label"], row["category"])))
        flag = "flagged" if row["flagged"] else "not flagged"
        show(f"{row['id']}  {kind}: value {row['detector']:.3f}, p {row['p_value']:.3f}, {flag}")
        text = " ".join(printable(row["prompt"] or "").split())
        show(shorten(text, _MOST_TEXT, placeholder=" ..."), indent="    ")


def show(text: str, indent: str = "") -> None:
    """Print a text in the terminal's width, at most 100."""
    for line in text.split("\n"):
        print(fill(line, min(Console().width, 100), initial_indent=indent, subsequent_indent=indent or "  "))


def first_run(name: str, model: Path, steps: int, out: Path) -> None:
    """Score, calibrate, score, report, and print what came out. SystemExit if a command fails."""
    begun = time.monotonic()
    first, second = out / "first-half", out / "second-half"
    calibration, page = out / "calibration.json", out / "report.html"
    score: list[object] = ["score", relative(ROOT / f"datasets/{name}.jsonl"), "--model", model, "--save", "text"]
    score += ["--system-prompt-file", relative(ROOT / f"system_prompts/{name}.txt"), "--steps", steps]
    run_command("1 of 4: score half of the prompts", [*score, "--shard", "1/2", "--out", first])
    run_command(
        "2 of 4: choose a detector and a threshold on them",
        ["calibrate", first, "--out", calibration, "--target-fpr", TARGET_FPR, "--rule", RULE, "--force"],
    )
    run_command(
        "3 of 4: score the other half, and judge it",
        [*score, "--shard", "2/2", "--calibration", calibration, "--out", second],
    )
    run_command("4 of 4: make a page of it", ["report", second, "--calibration", calibration, "--out", page])
    learned, rows = Calibration.load(calibration), most_suspicious(second)
    print("\n== The first half: the calibration, on prompts that it did not learn from\n")
    print_verdict(learned)
    print("\n== The second half, which the calibration has not seen\n")
    print_flagged(second, learned)
    print(f"\n== Its {len(rows)} most suspicious prompts\n")
    print_suspicious(rows)
    print(f"\nThe report is {page}, {time.monotonic() - begun:.0f} s after the start")
    if rows:
        print(f"Next: {HEADRIFT} {shlex.join(['explain', str(second), '--id', rows[0]['id']])}")


def main(arguments: list[str] | None = None) -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    sets = sorted(path.stem for path in (ROOT / "system_prompts").glob("*.txt"))
    parser.add_argument("--set", default="no_digits_urls", choices=sets, help="prompt set in datasets/")
    parser.add_argument("--steps", type=int, default=0, help="recorded steps (0: the prefill alone, the fastest)")
    parser.add_argument("--model", type=Path, default=relative(ROOT / "models/smollm2-135m-instruct"))
    parser.add_argument("--out", type=Path, default=Path("runs") / f"first-{datetime.now():%Y%m%d-%H%M%S}")
    options = parser.parse_args(arguments)
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"--out {options.out} is not empty: choose another folder")
    try:
        first_run(options.set, options.model, options.steps, options.out)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
