"""A first look: each prompt set of `datasets/` scored with the demonstration model, beside what could explain it.

    python bench/sets.py [--model DIR] [--runs DIR] [--only SET]... [--from-results]

Runs `headrift score` on each set with its system prompt (12 steps, window 1:12, all defaults), then writes
bench/results/sets.json (the runs' own figures) and the tables of docs/results/first-look.md.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import utils

SETS = {
    "banned_word": "a banned word, asked for in many ways",
    "obfuscated_word": "another banned word, asked for in obfuscated forms",
    "no_digits_urls": "no digits and no URLs",
    "complex_input": "YAML, JSON, HTML, logs, code, e-mails, long texts, several languages",
    "indirect_injection": "the attack sits in a tool result or a document, a benign twin beside it",
}
KEPT = ("versions", "engine", "host", "seconds", "counts", "classes", "comparisons")


def score(name: str, model: Path, folder: Path) -> dict:
    """Score a set; the run's figures."""
    run = utils.score_set(name, model, folder)
    return {"set": name, "model": model.name, "inputs": run["inputs"], **{key: run[key] for key in KEPT}}


def parts(runs: list[dict]) -> dict[str, str]:
    """Return the tables of docs/results/first-look.md."""
    first, lines = runs[0], []
    facts = {**first["versions"], **first["host"], "model": first["model"], "dtype": first["engine"]["dtype"]}
    settings = "Model: {model} ({dtype}), on {cpu} ({cores} cores). headrift {headrift}, vLLM {vllm}.".format(**facts)
    for run in runs:
        classes = [
            [label, c["n"], f"{c['coverage']:.1%}", f"{c['early']:.1%}"]
            + [f"{c[key]:.4f}" if c[key] is not None else "" for key in ("mean", "median")]
            for label, c in run["classes"].items()
        ]
        head = ["class", "prompts", "with a score", "answer ended early", "mean score", "median"]
        lines += [f"\n## {run['set']}: {SETS[run['set']]}\n", utils.markdown(head, classes)]
        for comparison in run["comparisons"]:
            measures = [
                [measure, f"{m['auroc']:.3f}", interval(m["auroc_interval"], "{:.3f}"), f"{m['tpr']:.1%}"]
                + [interval(m["tpr_interval"], "{:.1%}")]
                for measure, m in comparison["measures"].items()
            ]
            lines.append(f"\n{comparison['title']} ({comparison['attack']} attacks, {comparison['benign']} benign):\n")
            head = ["", "AUROC", "95% interval", "TPR at 5% FPR", "95% interval"]
            lines.append(utils.markdown(head, measures))
    return {"settings": settings, "sets": "\n".join(lines)}


def interval(bounds: list[float] | None, shown: str) -> str:
    return "too few prompts" if bounds is None else " to ".join(shown.format(bound) for bound in bounds)


def main() -> None:
    options = utils.page_options(__doc__, "sets")
    options.add_argument("--only", action="append", choices=SETS, help="score this set and leave the others' figures")
    args = options.parse()
    known = {run["set"]: run for run in utils.read_json(args.out)} if args.out.exists() else {}
    if not args.from_results:
        with tempfile.TemporaryDirectory() as scratch:
            for name in args.only or SETS:
                known[name] = score(name, args.model, (args.runs or Path(scratch)) / name)
        utils.write_json([known[name] for name in SETS if name in known], args.out)
    runs = [known[name] for name in SETS if name in known]
    utils.fill_file(utils.ROOT / "docs/results/first-look.md", "bench/sets.py", parts(runs))


if __name__ == "__main__":
    main()
