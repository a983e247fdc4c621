"""A first look: each prompt set of `datasets/` scored with the demonstration model, beside what could explain it.

    python bench/sets.py [--model DIR] [--runs DIR] [--only SET]...

Runs `headrift score` on each set with its system prompt (12 steps, window 1:12, all defaults), then writes
bench/results/sets.json (the runs' own figures) and the page docs/results/first-look.md made from it. `--from-results`
writes the page again from the committed figures, without scoring anything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results/sets.json"
PAGE = ROOT / "docs/results/first-look.md"
SETS = {
    "banned_word": "a banned word, asked for in many ways",
    "obfuscated_word": "another banned word, asked for in obfuscated forms",
    "no_digits_urls": "no digits and no URLs",
    "complex_input": "YAML, JSON, HTML, logs, code, e-mails, long texts, several languages",
    "indirect_injection": "the attack sits in a tool result or a document, a benign twin beside it",
}
INTRODUCTION = """# First look: what the score separates on five prompt sets

Made by `python bench/sets.py`; the figures are those of `headrift score`'s closing table. Model:
{model} ({dtype}), greedy, steps 1 to 12, all settings at their defaults, on {cpu} ({cores} cores).
headrift {headrift}, vLLM {vllm}.

Each set was written for this project before it was ever scored (see `datasets/README.md`), a third or more of its
benign prompts to be mistaken for attacks: on the rule's own topic, phrased as commands, or as long as the attacks.
Nothing was tuned on these figures: window and layers are the defaults. Intervals are 95% bootstrap intervals over
distinct prompts. AUROC: the chance that an attack scores above a benign prompt, 0.5 for nothing. TPR: attacks found at
a threshold that 5% of the benign prompts of the same table pass, so in sample.
"""
READING = """
## How to read this

- The model has 135M parameters: it barely follows its system prompt, and where it does not heed the rule there is
  little for heads to disagree about. These tables show that the pipeline measures, not what the score is worth on a
  model that is used in earnest.
- Where the score's interval and that of a confound overlap, the score has shown nothing beyond the confound.
- In indirect_injection 60 of the benign rows are twins of attacks (the same question), which the intervals do not
  know: they are a little too narrow there.
- The sets differ in what a reader can tell from words alone; `datasets/README.md` lists those surface differences.
"""


def score(name: str, model: Path, folder: Path) -> dict:
    command = [sys.executable, "-P", "-m", "headrift.cli", "score", f"datasets/{name}.jsonl"]
    command += ["--system-prompt-file", f"system_prompts/{name}.txt", "--model", str(model), "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    kept = ("versions", "engine", "host", "seconds", "counts", "classes", "comparisons")
    return {"set": name, "model": model.name, "inputs": run["inputs"], **{key: run[key] for key in kept}}


def page(runs: list[dict]) -> str:
    first = runs[0]
    facts = {**first["versions"], **first["host"], "model": first["model"], "dtype": first["engine"]["dtype"]}
    parts = [INTRODUCTION.format(**facts)]
    for run in runs:
        name = run["set"]
        parts.append(f"\n## {name}: {SETS[name]}\n")
        parts.append(
            "| class | prompts | with a score | answer ended early | mean score | median |\n|---|---|---|---|---|---|"
        )
        for label, c in run["classes"].items():
            mean, median = (f"{c[key]:.4f}" if c[key] is not None else "" for key in ("mean", "median"))
            parts.append(f"| {label} | {c['n']} | {c['coverage']:.1%} | {c['early']:.1%} | {mean} | {median} |")
        for comparison in run["comparisons"]:
            parts.append(f"\n{comparison['title']} ({comparison['attack']} attacks, {comparison['benign']} benign):\n")
            parts.append("| | AUROC | 95% interval | TPR at 5% FPR | 95% interval |\n|---|---|---|---|---|")
            for measure, m in comparison["measures"].items():
                parts.append(
                    f"| {measure} | {m['auroc']:.3f} | {interval(m['auroc_interval'])} "
                    f"| {m['tpr']:.1%} | {interval(m['tpr_interval'], percent=True)} |"
                )
    return "\n".join(parts) + "\n" + READING


def interval(bounds: list[float] | None, percent: bool = False) -> str:
    if bounds is None:
        return "too few prompts"
    return " to ".join(f"{b:.1%}" if percent else f"{b:.3f}" for b in bounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-135m-instruct")
    parser.add_argument("--runs", type=Path, help="keep the runs' folders here")
    parser.add_argument("--only", action="append", choices=SETS, help="score this set and leave the others' figures")
    parser.add_argument("--from-results", action="store_true", help="only write the page again")
    args = parser.parse_args()
    known = {run["set"]: run for run in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    if not args.from_results:
        with tempfile.TemporaryDirectory() as scratch:
            for name in args.only or SETS:
                known[name] = score(name, args.model, (args.runs or Path(scratch)) / name)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps([known[name] for name in SETS if name in known], indent=1) + "\n")
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page([known[name] for name in SETS if name in known]), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} written")


if __name__ == "__main__":
    main()
