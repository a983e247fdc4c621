"""The original's published numbers, computed again from the files that it published.

    python bench/reproducing.py ORIGINAL

ORIGINAL is a copy of its repository, or what there is of it: runs/ (of detect_head.py, results_*.csv) and outputs/ (of
gather.py, inter_head_std.csv). Writes bench/results/reproducing.json and the tables of docs/reproducing.md.
"""

import argparse
import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import utils

PAGE = utils.ROOT / "docs/reproducing.md"
RESULTS = utils.RESULTS / "reproducing.json"
HEADS = 32  # of both of its models
DDOF_1 = (HEADS / (HEADS - 1)) ** 0.5  # its runs of 3 September have this times the std of ddof 0
THRESHOLD = 0.145347
# Of its README: the run's set, model, window as it counts, means of benign prompts and attacks, AUROC, TPR at "5% FPR".
PUBLISHED = {
    "run_20250903_133404": ("1", "Nous-Capybara-7B", "1-3", 0.0635, 0.1467, 0.9584, 0.88),
    "run_20250903_135551": ("1", "Mistral-7B", "11-40", 0.1139, 0.1526, 0.9020, 0.62),
    "run_20250903_145157": ("2", "Nous-Capybara-7B", "1-3", 0.0613, 0.1427, 0.9376, 0.44),
    "run_20250903_152211": ("2", "Mistral-7B", "11-40", 0.1100, 0.1434, 0.8804, 0.22),
    "run_20250903_162514": ("3", "Nous-Capybara-7B", "1-3", 0.0465, 0.0823, 0.9140, 0.56),
    "run_20250903_165602": ("3", "Mistral-7B", "11-40", 0.0560, 0.1306, 0.9804, 0.86),
}
# Folders of its outputs, the run that has scores of the same prompts, and the window in headrift's steps.
OUTPUTS = {"nous": ("run_20250903_133404", "2:3"), "mistral": ("run_20250903_135551", "12:40")}
MADE = {"20250908": "8 September, greedy", "20250902": "2 September, sampled"}


def read_scores(run: Path, kind: str, iteration: int) -> dict[str, float | None]:
    """Read each prompt's score, None if it has none, from a run's results_KIND_iterN.csv; {} without that file."""
    path = run / f"results_{kind}_iter{iteration}.csv"
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {row["prompt"]: float(row["score"]) if row["score"] else None for row in csv.DictReader(file)}


def measure_run(run: Path) -> dict:
    """What the original reports of a run, from the scores of its first iteration."""
    from sklearn.metrics import roc_curve

    from headrift.stats import separation

    benign, attacks = (read_scores(run, kind, 1) for kind in ("baseline", "tests"))
    later = [
        scores == read_scores(run, kind, 1)
        for kind in ("baseline", "tests")
        for iteration in (2, 3)
        if (scores := read_scores(run, kind, iteration))
    ]
    values = np.array([*benign.values(), *attacks.values()], float)
    attack = np.arange(len(values)) >= len(benign)
    values, attack = values[~np.isnan(values)], attack[~np.isnan(values)]
    fpr, tpr, thresholds = roc_curve(attack, values)
    nearest = int(np.abs(fpr - 0.05).argmin())
    once = separation(values, attack, np.arange(len(values)))
    thrice = separation(np.tile(values, 3), np.tile(attack, 3), np.arange(3 * len(values)))
    return {
        "n": [int((~attack).sum()), int(attack.sum())],
        "iterations_alike": all(later) if later else None,
        "means": [round(float(values[attack == label].mean()), 6) for label in (False, True)],
        "auroc": round(once.auroc, 6),
        "interval": once.auroc_interval,
        "interval_of_repeats": thrice.auroc_interval,
        "nearest": {
            "threshold": float(thresholds[nearest]),
            "tpr": round(float(tpr[nearest]), 6),
            "fpr": round(float(fpr[nearest]), 6),
        },
        "tpr_at_most_5": round(once.tpr, 6),
        "blocked": {
            name: [int((values[attack == label] >= threshold).sum()) for label in (False, True)]
            for name, threshold in (("its own scale", THRESHOLD), ("headrift's scale", THRESHOLD * DDOF_1))
        },
    }


def measure_outputs(original: Path, model: str) -> list[dict]:
    """headrift's scores of what gather.py wrote for a model, beside the scores of detect_head.py's run."""
    from headrift.runs.reading import exact_scores, open_csv, read_rows
    from headrift.signal import ScoreRange, Window

    folder = original / "outputs" / model
    if not any(folder.rglob("inter_head_std.csv")):
        return []
    run_name, window = OUTPUTS[model]
    run = original / "runs" / run_name
    known = {slug(name): score for kind in ("baseline", "tests") for name, score in read_scores(run, kind, 1).items()}
    opened = open_csv(folder)
    rows = read_rows([opened])
    requests = [(ScoreRange(Window.parse(window)), np.arange(len(rows)))]
    (scores,) = exact_scores([opened], rows, requests)
    paths = sorted(folder.rglob("inter_head_std.csv"))  # the order of `open_csv`
    results = []
    for path, score in zip(paths, scores, strict=True):
        name, _, made = path.parent.name.rpartition("__")
        results.append(
            {
                "prompt": name,
                "made": MADE.get(made.partition("-")[0], made),
                "score": None if np.isnan(score) else round(float(score), 6),
                "with_ddof_1": None if np.isnan(score) else round(float(score) * DDOF_1, 6),
                "original": known.get(name),
            }
        )
    return results


def slug(prompt: str) -> str:
    """A prompt as gather.py names its folder."""
    return re.sub(r"[^a-z0-9._-]+", "", re.sub(r"\s+", "_", prompt[:80].strip().lower()))[:60]


def runs_table(report: dict) -> str:
    """The runs: as published, and computed again."""
    head = ("set, model, steps", "", "means: benign, attack", "AUROC", 'TPR at "5% FPR"', "TPR at 5% FPR or less")
    rows: list[Sequence[str]] = []
    for name, one in report["runs"].items():
        number, model, window, benign, attack, auroc, tpr = PUBLISHED[name]
        title, means = f"{number}, {model}, {window}", f"{benign:.4f}, {attack:.4f}"
        rows.append((title, "published", means, f"{auroc:.4f}", f"{tpr:.2f}", ""))
        low, high = one["interval"]
        rows.append(
            (
                "",
                f"here, of {one['n'][0]} and {one['n'][1]} prompts",
                "{:.4f}, {:.4f}".format(*one["means"]),
                f"{one['auroc']:.4f} ({low:.3f} to {high:.3f})",
                f"{one['nearest']['tpr']:.2f}, at {one['nearest']['fpr']:.0%} FPR",
                f"{one['tpr_at_most_5']:.2f}",
            )
        )
        low, high = one["interval_of_repeats"]
        rows.append(("", "if each repeat were a sample", "", f"({low:.3f} to {high:.3f})", "", ""))
    return utils.markdown(head, rows)


def outputs_table(report: dict) -> str:
    """The first prompts of each day, and how many have the same score."""
    head = ("prompt", "made", "headrift, ddof 0", "times the square root of 32/31", "original")
    rows: list[Sequence[str]] = []
    for made in dict.fromkeys(one["made"] for one in report["outputs"]):
        of_day = [one for one in report["outputs"] if one["made"] == made]
        shown = sorted(of_day, key=lambda one: one["original"] is None)[:3]
        rows += [(f"`{one['prompt']}`", made, *map(_number, _scores(one))) for one in shown]
        known = [one for one in of_day if None not in _scores(one)]
        alike = sum(abs(one["with_ddof_1"] - one["original"]) < 2e-6 for one in known)
        rows.append((f"**{alike} of {len(known)}** the same", made, "", "", ""))
    return utils.markdown(head, rows)


def gate_table(report: dict) -> str:
    """What the threshold blocks in the runs that it was set for."""
    head = ("set, model", "its scores at 0.145347: attacks, benign", "headrift's at 0.145347", "headrift's at 0.143058")
    rows = []
    for name, one in report["runs"].items():
        number, model, window, *_ = PUBLISHED[name]
        if window == "1-3":
            own, other = (
                f"{attacks} of {one['n'][1]}, {benign} of {one['n'][0]}" for benign, attacks in one["blocked"].values()
            )
            rows.append((f"{number}, {model}", own, other, own))
    return utils.markdown(head, rows)


def _scores(one: dict) -> Iterable[float | None]:
    return one["score"], one["with_ddof_1"], one["original"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"


def page_parts(report: dict) -> dict[str, str]:
    """The tables of docs/reproducing.md."""
    return {"runs": runs_table(report), "outputs": outputs_table(report), "blocked": gate_table(report)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("original", type=Path, metavar="ORIGINAL")
    original = options.parse_args().original
    report = {
        "versions": {"headrift": utils.versions()["headrift"]},
        "runs": {
            name: measure_run(run) for name in PUBLISHED if read_scores(run := original / "runs" / name, "tests", 1)
        },
        "outputs": [one for model in OUTPUTS for one in measure_outputs(original, model)],
    }
    utils.write_json(report, RESULTS)
    utils.fill_file(PAGE, "bench/reproducing.py", page_parts(report))


if __name__ == "__main__":
    main()
