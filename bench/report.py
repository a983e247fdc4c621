"""An example of a report: the five prompt sets of `datasets/`, scored, calibrated and reported.

    python bench/report.py [--model DIR] [--runs DIR]

Scores each set (steps 0 to 40, everything saved, window 1:12), calibrates on all of them and writes
docs/results/five-sets.html (`headrift report`) with its files. What the sets show is in docs/results/evidence.md, made
by bench/public.py.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import utils
from public import OWN


def make(model: Path, folder: Path) -> None:
    """Score, calibrate and report all sets."""
    save = [word for kind in ("shares", "mass", "focus", "text", "entropy") for word in ("--save", kind)]
    folders = [folder / name for name in OWN]
    for name, run in zip(OWN, folders):
        utils.score_set(name, model, run, "--steps", 40, "--window", "1:12", *save)
    calibration = folder / "calibration.json"
    utils.headrift("calibrate", *folders, "--out", calibration, "--window", "1:12", "--quiet", "--force")
    report = utils.ROOT / "docs/results/five-sets.html"
    utils.headrift("report", *folders, "--out", report, "--calibration", calibration)


def main() -> None:
    options = utils.Options(__doc__, "report", short=False)
    options.add_argument("--model", type=Path, default=utils.MODEL)
    options.add_argument("--runs", type=Path, help="keep the runs' folders here, and take finished ones")
    args = options.parse()
    with tempfile.TemporaryDirectory() as scratch:
        make(args.model, args.runs or Path(scratch))


if __name__ == "__main__":
    main()
